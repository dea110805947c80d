# SPDX-License-Identifier: Apache-2.0
"""Bytes that attention holds beside its arguments, as the compiler counts, are `Strategy.cost`'s.

Compiled for NVIDIA GPUs that are not there, up to 16 of them, forward, in bfloat16.
"""

import pytest
from compiled_attention import HEAD_DIM, compiled
from slow import slow_but

from jaxcp.context_parallel import (
    USP,
    AllGather,
    FixedOrder,
    Halo,
    Ring,
    RingPassQ,
    Shapes,
    Ulysses,
)

# jax 0.11 and later warn when Pallas-Triton is used; it works through 0.12.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

TOKENS, WINDOW, N = 131_072, 4096, 8
HEADS = {Ulysses: (32, 16)}  # more than one a device, so that the kernel's own tables are small


def held(strategy, shards, tokens):
    window = WINDOW if isinstance(strategy, Halo) else None
    heads = HEADS.get(type(strategy), (6, 2))
    where = f"rtx-pro-6000:{shards}"
    return compiled(where, strategy, tokens=tokens, heads=heads, window=window).held_bytes


def said(strategy, shards, tokens):
    heads, kv_heads = HEADS.get(type(strategy), (6, 2))
    window = WINDOW if isinstance(strategy, Halo) else None
    shapes = Shapes(
        shards=shards, tokens=tokens, num_heads=heads, num_kv_heads=kv_heads, head_dim=HEAD_DIM,
        window=window,
    )  # fmt: skip
    return strategy.cost(shapes).held


HALO = Halo(checked=False)


@pytest.mark.parametrize(
    "strategy",
    slow_but(
        [
            AllGather(),
            AllGather(chunks=4),
            Ulysses(),
            USP(ulysses=2),
            RingPassQ(),
            HALO,
            FixedOrder(),
        ],
        lambda strategy: strategy == AllGather(chunks=4),
    ),
    ids=str,
)
def test_a_strategy_holds_what_it_says(strategy):
    t = TOKENS // N
    assert held(strategy, N, t) == pytest.approx(said(strategy, N, t), rel=0.1)


@pytest.mark.slow
def test_a_ring_holds_less_on_more_devices():
    """Of one sequence 1/n; of one shard the same on any number, which is why it is a ring."""
    found = {n: held(Ring(), n, TOKENS // n) for n in (2, 4, 16)}
    for n, size in found.items():
        assert size == pytest.approx(said(Ring(), n, TOKENS // n), rel=0.1)
    assert found[4] / found[16] == pytest.approx(4, rel=0.1)
    assert held(Ring(), 8, TOKENS // 16) == pytest.approx(found[16], rel=0.01)
