# SPDX-License-Identifier: Apache-2.0
"""Attention over a sequence that no single device holds."""

from jaxcp.context_parallel.all_gather import AllGather
from jaxcp.context_parallel.api import attention_fn, context_parallel_attention, ring_attention
from jaxcp.context_parallel.ring import Ring
from jaxcp.context_parallel.strategy import Strategy

STRATEGIES = (Ring, AllGather)
"""Every strategy; tests and benchmarks walk it."""

__all__ = [
    "STRATEGIES",
    "AllGather",
    "Ring",
    "Strategy",
    "attention_fn",
    "context_parallel_attention",
    "ring_attention",
]
