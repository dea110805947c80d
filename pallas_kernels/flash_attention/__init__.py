# SPDX-License-Identifier: Apache-2.0
from pallas_kernels.flash_attention.api import (
    RESULT,
    apply_sinks,
    attention_backward,
    attention_forward,
    check,
    flash_attention,
    named,
    row_delta,
)
from pallas_kernels.flash_attention.mask import NO_POSITION, PAD_POSITION, Mask

__all__ = [
    "NO_POSITION",
    "PAD_POSITION",
    "RESULT",
    "Mask",
    "apply_sinks",
    "attention_backward",
    "attention_forward",
    "check",
    "flash_attention",
    "named",
    "row_delta",
]
