# SPDX-License-Identifier: Apache-2.0
"""Long-context hybrid-MoE language models in JAX, the sequence spread over many chips."""

from jaxcp.context_parallel import AllGather, Ring, attention_fn, context_parallel_attention, ring_attention
from jaxcp.layout import Contiguous, Striped, Zigzag
from jaxcp.mesh import MeshConfig, emulate_devices, make_mesh

__all__ = [
    "AllGather",
    "Contiguous",
    "MeshConfig",
    "Ring",
    "Striped",
    "Zigzag",
    "attention_fn",
    "context_parallel_attention",
    "emulate_devices",
    "make_mesh",
    "ring_attention",
]
