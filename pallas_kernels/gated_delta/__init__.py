# SPDX-License-Identifier: Apache-2.0
from pallas_kernels.gated_delta.api import gated_delta, gated_delta_chunks
from pallas_kernels.gated_delta.chunks import Chunks

__all__ = ["Chunks", "gated_delta", "gated_delta_chunks"]
