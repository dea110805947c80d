# SPDX-License-Identifier: Apache-2.0
"""Attention over a sequence that no single device holds."""

from jaxcp.context_parallel.all_gather import AllGather
from jaxcp.context_parallel.api import (
    attention_fn,
    context_parallel_attention,
    latent_attention,
    ring_attention,
)
from jaxcp.context_parallel.cost import Cost, Shapes, Traffic
from jaxcp.context_parallel.fixed_order import FixedOrder
from jaxcp.context_parallel.halo import Halo
from jaxcp.context_parallel.overlap import compiler_options
from jaxcp.context_parallel.ring import Ring
from jaxcp.context_parallel.ring_pass_q import RingPassQ
from jaxcp.context_parallel.strategy import Strategy
from jaxcp.context_parallel.ulysses import Ulysses
from jaxcp.context_parallel.usp import USP

STRATEGIES = (Ring, RingPassQ, AllGather, Ulysses, USP, Halo, FixedOrder)
"""Every strategy; tests and benchmarks walk it."""

__all__ = [
    "STRATEGIES",
    "USP",
    "AllGather",
    "Cost",
    "FixedOrder",
    "Halo",
    "Ring",
    "RingPassQ",
    "Shapes",
    "Strategy",
    "Traffic",
    "Ulysses",
    "attention_fn",
    "compiler_options",
    "context_parallel_attention",
    "latent_attention",
    "ring_attention",
]
