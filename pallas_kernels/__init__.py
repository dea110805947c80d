# SPDX-License-Identifier: Apache-2.0
"""Attention, recurrence and expert kernels for JAX: reference, XLA, Triton and Mosaic TPU."""

from pallas_kernels.decode_attention import decode_attention, quantize_cache
from pallas_kernels.flash_attention import PAD_POSITION, flash_attention
from pallas_kernels.gated_delta import gated_delta
from pallas_kernels.grouped_matmul import (
    Quantized,
    dequantize,
    grouped_matmul,
    grouped_swiglu,
    quantize,
)
from pallas_kernels.ring_attention import ring_attention

__all__ = [
    "PAD_POSITION",
    "Quantized",
    "decode_attention",
    "dequantize",
    "flash_attention",
    "gated_delta",
    "grouped_matmul",
    "grouped_swiglu",
    "quantize",
    "quantize_cache",
    "ring_attention",
]
