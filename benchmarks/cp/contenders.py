# SPDX-License-Identifier: Apache-2.0
"""Every strategy of ours, and the package `ringattention`, as functions of q, k and v."""

import dataclasses
import importlib
from collections.abc import Callable, Iterator

import jax
import jax.extend.backend
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jaxcp
from benchmarks.cp.problem import RANKS

STRATEGIES = {
    "Ring()": jaxcp.Ring(),
    "Ring(bidirectional=True)": jaxcp.Ring(bidirectional=True),
    "AllGather()": jaxcp.AllGather(),
    "AllGather(chunks=4)": jaxcp.AllGather(chunks=4),
    "Ulysses()": jaxcp.Ulysses(),
    "USP(ulysses=2)": jaxcp.USP(ulysses=2),
    "RingPassQ()": jaxcp.RingPassQ(),
    "FixedOrder()": jaxcp.FixedOrder(),
}


@dataclasses.dataclass(frozen=True)
class Contender:
    """`layer(q, k, v)`, whose tokens lie over RANKS devices in `order`."""

    name: str
    layer: Callable
    order: np.ndarray
    dtype: str = "float32"
    note: str = ""


def ours(tokens: int) -> Iterator[Contender]:
    for name, strategy in STRATEGIES.items():
        order = strategy.layout.order(tokens, RANKS)
        layer = layer_of(strategy, order)
        yield Contender(f"jaxcp {name}", layer, order, note="zigzag")
        if name == "Ring()":
            yield Contender(f"jaxcp {name}, bfloat16", layer, order, "bfloat16", "zigzag")


def layer_of(strategy, order: np.ndarray) -> Callable:
    positions = jnp.asarray(order, jnp.int32)[None]

    def layer(q, k, v):
        return jaxcp.context_parallel_attention(
            q, k, v, positions, strategy=strategy, implementation="xla"
        )

    return layer


def ringattention(tokens: int) -> Iterator[Contender]:
    """Import and wrap the package, in each of its chunk sizes.

    Version 0.1.2 asks `jax.lib` for `xla_bridge`, which jax 0.10 no longer has there.
    """
    if not hasattr(jax.lib, "xla_bridge"):
        jax.lib.xla_bridge = jax.extend.backend  # get_backend() is all that it takes of it
    attend = importlib.import_module("ringattention.ringattention_jax").ring_attention
    for chunk in (c for c in (64, 128, 256, 512) if c <= tokens // RANKS):
        options = dict(
            causal_block_size=1,
            query_chunk_size=chunk,
            key_chunk_size=chunk,
            deterministic=True,
            dropout_rng=None,
            attn_pdrop=0.0,
            dtype=jnp.float32,
            policy=jax.checkpoint_policies.nothing_saveable,
            precision=None,
            prevent_cse=True,
        )

        def local(q, k, v, options=options):
            return attend(q, k, v, None, None, None, "seq", True, options)

        specs = dict(in_specs=(P(None, "seq"),) * 3, out_specs=P(None, "seq"))
        layer = jax.shard_map(local, **specs, check_vma=False)
        name = f"ringattention, chunks of {chunk}"
        yield Contender(name, layer, np.arange(tokens), note="contiguous")


GROUPS = {"ours": ours, "ringattention": ringattention}
