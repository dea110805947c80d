# SPDX-License-Identifier: Apache-2.0
from pallas_kernels.gated_delta.api import Chunks, gated_delta, gated_delta_chunks

__all__ = ["Chunks", "gated_delta", "gated_delta_chunks"]
