# SPDX-License-Identifier: Apache-2.0
from pallas_kernels.decode_attention.api import MAX_QUERIES, decode_attention, quantize_cache

__all__ = ["MAX_QUERIES", "decode_attention", "quantize_cache"]
