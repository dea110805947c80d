# SPDX-License-Identifier: Apache-2.0
"""What each strategy sends, counted on the compiled program."""

import collections

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from slow import slow_but
from strategies import VARIANTS

import jaxcp
from jaxcp.compile import collectives
from jaxcp.context_parallel import (
    USP,
    AllGather,
    Halo,
    Ring,
    RingPassQ,
    Shapes,
    Ulysses,
)

TOKENS, HEADS, KV_HEADS, HEAD_DIM = 8, 4, 2, 16  # a shard's
KEYS = TOKENS * KV_HEADS * HEAD_DIM  # elements of K, and of V, on a shard
ROTATED = (
    2 * KEYS + TOKENS
) * 4  # bytes: K, V and positions (XLA on CPU sends bfloat16 as float32)
GRADIENTS = 2 * KEYS * 4  # bytes: dK and dV in float32

# XLA of jax 0.10 drops barriers on CPU, and sees that the first rotation is that of both passes
SHARED = 1 if jax.__version_info__ < (0, 11) else 0


COUNTED = (*VARIANTS, USP(ulysses=4), Halo(checked=False))
TELLING = (Ring(bidirectional=True), AllGather(chunks=3), USP(ulysses=2), Halo())
"""Strategies that `make test` counts: each kind of collective is one of theirs."""
MASKS = {
    "plain": {"value_dim": 8},
    "window": {"window": 5, "batch": 2},
    "packed": {"window": 11, "causal": False, "segments": True, "num_kv_heads": 4},
}


def shapes_of(shards, **more):
    """A shard's, in float32: XLA on CPU sends bfloat16 so."""
    sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM} | more
    return Shapes(shards=shards, tokens=TOKENS, itemsize=4, **sizes)


def sent(strategy, shards, *, backward, **more):
    """{kind: (count, bytes)} of a device in one call, under the mesh in scope."""
    s = shapes_of(shards, **more)

    def like(*width, dtype=jnp.float32):
        shape = (s.batch, TOKENS * shards, *width)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=P(None, "seq"))

    def forward(q, k, v, positions, segment_ids=None):
        return jaxcp.context_parallel_attention(
            q, k, v, positions, strategy=strategy, segment_ids=segment_ids, causal=s.causal,
            window=s.window,
        )  # fmt: skip

    def both(dout, q, k, v, *ids):
        out, pull = jax.vjp(lambda *qkv: forward(*qkv, *ids), q, k, v)
        return out, *pull(dout)

    k, v = like(s.num_kv_heads, s.head_dim), like(s.num_kv_heads, s.value_dim)
    arrays = like(HEADS, s.head_dim), k, v, *[like(dtype=jnp.int32)] * s.ids
    dout = like(HEADS, s.value_dim)
    program = jax.jit(both).lower(dout, *arrays) if backward else jax.jit(forward).lower(*arrays)
    text = program.compile().as_text()
    return {c.kind: (c.count, c.bytes) for c in collectives(text)}


def by_kind(traffic):
    """`{kind: (count, bytes)}` of a cost, as `sent` has it."""
    counts, sizes = collections.Counter(), collections.Counter()
    for x in traffic:
        counts[x.kind] += x.count
        sizes[x.kind] += x.bytes
    return {kind: (counts[kind], sizes[kind]) for kind in counts}


def ring_of(shards):
    """A mesh of one axis: over further ones, even of size one, shard_map sums every gradient."""
    devices = jax.devices()[:shards]
    types = (AxisType.Explicit,)
    return jax.set_mesh(jax.make_mesh((shards,), ("seq",), axis_types=types, devices=devices))


def turns_of(strategy, shards):
    return {Ring: shards - 1, USP: shards // getattr(strategy, "ulysses", 1) - 1}.get(
        type(strategy), 0
    )


@pytest.mark.parametrize(
    "strategy, shards, mask",
    slow_but(
        [(x, n, mask) for x in COUNTED for n, mask in ((4, "packed"), (4, "window"), (8, "plain"))],
        lambda case: case[2] == "packed" and case[0] in TELLING,
    ),
    ids=str,
)
def test_the_cost_of_a_strategy_is_what_its_program_sends(strategy, shards, mask):
    more = MASKS[mask]
    shapes = shapes_of(shards, **more)
    if (isinstance(strategy, Halo) and shapes.window is None) or (
        isinstance(strategy, Ulysses) and HEADS % shards
    ):
        with pytest.raises((NotImplementedError, ValueError)):
            strategy.cost(shapes)
        return
    cost = strategy.cost(shapes)
    with ring_of(shards):
        assert sent(strategy, shards, backward=False, **more) == by_kind(cost.forward)
        count, size = by_kind(cost.forward).get("collective-permute", (0, 0))
        expected = by_kind((*cost.forward, *cost.backward))
        if turns := turns_of(strategy, shards):
            both = expected["collective-permute"]
            shared = SHARED * count // turns, SHARED * size // turns
            expected["collective-permute"] = both[0] - shared[0], both[1] - shared[1]
        assert sent(strategy, shards, backward=True, **more) == expected


@pytest.mark.parametrize("strategy", [Ring(), RingPassQ(), AllGather(), Ulysses()], ids=str)
def test_one_device_sends_nothing(strategy):
    cost = strategy.cost(shapes_of(1))
    assert not cost.forward and not cost.backward and cost.sent == cost.sent_backward == 0


@pytest.mark.parametrize("tokens, passes", [(8, True), (84, True), (85, False)])
def test_few_queries_are_passed_around(tokens, passes):
    """In 16 bits and with H = V where `t / s < 2K / 3N`, about: here 2 * 4096 * 8 / (3 * 256)."""
    q = jax.ShapeDtypeStruct((1, tokens, 256, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 4096, 8, 128), jnp.bfloat16)
    assert RingPassQ.fewer_bytes(q, k, k) == passes


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_ring_rotates_n_minus_1_times(shards):
    """Forward K, V and positions; backward the same again, and dK and dV as often.

    For GPUs and TPUs see test_context_parallel_overlap.py.
    """
    turns = shards - 1
    rotations = 2 * turns - SHARED if turns else 0
    count, size = 3 * rotations + 2 * turns, ROTATED * rotations + GRADIENTS * turns
    with ring_of(shards):
        found = sent(jaxcp.Ring(), shards, backward=True)
    assert found == ({"collective-permute": (count, size)} if turns else {})


def test_ring_without_a_gradient():
    with ring_of(3):
        assert sent(jaxcp.Ring(), 3, backward=False) == {"collective-permute": (6, 2 * ROTATED)}


def test_all_gather_gathers_once_and_scatters_once():
    with ring_of(8):
        assert sent(jaxcp.AllGather(), 8, backward=True) == {
            "all-gather": (3, 8 * ROTATED),
            "reduce-scatter": (2, 8 * GRADIENTS),
        }


def test_all_gather_in_chunks_sends_the_same_bytes():
    with ring_of(4):
        assert sent(jaxcp.AllGather(chunks=4), 4, backward=False) == {
            "all-gather": (3 * 4, 4 * ROTATED)
        }


def test_a_ring_of_two_directions_sends_the_same_bytes():
    turns, rotations = 7, 2 * 7 - SHARED
    with ring_of(8):
        assert sent(jaxcp.Ring(bidirectional=True), 8, backward=True) == {
            "collective-permute": (
                2 * (3 * rotations + 2 * turns),
                ROTATED * rotations + GRADIENTS * turns,
            )
        }


@pytest.mark.parametrize("shards, copies", [(2, 1), (4, 2)])
def test_ulysses_exchanges_heads(shards, copies):
    """q, k, v and out; each KV head to those alone that hold its query heads."""
    queries = TOKENS * HEADS * HEAD_DIM * 4
    with ring_of(shards):
        found = sent(jaxcp.Ulysses(), shards, backward=False)
    assert found.pop("all-to-all") == (4, 2 * queries + 2 * copies * KEYS * 4)
    assert found == {"all-gather": (1, shards * TOKENS * 4)}


def test_pass_q_sends_no_keys():
    """Back: dout, lse and delta to all, dQ in float32 home."""
    queries, partial = TOKENS * HEADS * HEAD_DIM * 4, TOKENS * HEADS * (HEAD_DIM + 1) * 4
    rows = TOKENS * HEADS * 4
    with ring_of(4):
        assert sent(jaxcp.RingPassQ(), 4, backward=True) == {
            "all-gather": (2 + 3, 4 * (queries + TOKENS * 4 + queries + 2 * rows)),
            "reduce-scatter": (1, 4 * queries),
            "all-to-all": (1, 4 * partial),
        }


def test_usp_exchanges_among_neighbours_and_rotates_across():
    queries = TOKENS * HEADS * HEAD_DIM * 4
    with ring_of(8):
        found = sent(jaxcp.USP(ulysses=2), 8, backward=False)
    assert found["all-to-all"] == (4, 2 * queries + 2 * KEYS * 4)
    # K and V of two shards and half of the heads, and two shards' positions
    assert found["collective-permute"] == (9, 3 * (2 * KEYS + 2 * TOKENS) * 4)
    assert found["all-gather"] == (1, 2 * TOKENS * 4)


@pytest.mark.parametrize("shards", [8])
def test_halo_sends_the_window(shards):
    """One way for a shard's early piece, the other way for its late one."""
    window = 3
    strategy = Halo(checked=False)
    row = (2 * KV_HEADS * HEAD_DIM + 1) * 4
    with ring_of(shards):
        found = sent(strategy, shards, backward=False, window=window)
    assert found.keys() == {"collective-permute"}
    count, size = found["collective-permute"]
    assert count == 6 and size <= 2 * (window - 1 + 2 * shards) * row
    assert size < 2 * ROTATED


def test_ring_holds_two_shards_of_keys():
    """The rotations stay in a loop: unrolled, XLA hoists them and holds every shard at once."""

    def temporaries(shards):
        with ring_of(shards):
            shape = (1, 512 * shards, 2, 64)
            x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=P(None, "seq"))
            positions = jax.ShapeDtypeStruct(shape[:2], jnp.int32, sharding=P(None, "seq"))
            compiled = jax.jit(jaxcp.ring_attention).lower(x, x, x, positions).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    keys = 512 * 2 * 64 * 4
    assert temporaries(8) - temporaries(3) < 2 * keys  # of K and V; held, five more shards of both
