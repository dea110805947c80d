# SPDX-License-Identifier: Apache-2.0
from pallas_kernels.grouped_matmul.api import grouped_matmul, grouped_swiglu
from pallas_kernels.grouped_matmul.quantized import Quantized, dequantize, quantize

__all__ = ["Quantized", "dequantize", "grouped_matmul", "grouped_swiglu", "quantize"]
