# SPDX-License-Identifier: Apache-2.0
from pallas_kernels.grouped_matmul.api import grouped_matmul, grouped_swiglu
from pallas_kernels.grouped_matmul.quantised import Quantised, dequantise, quantise

__all__ = ["Quantised", "dequantise", "grouped_matmul", "grouped_swiglu", "quantise"]
