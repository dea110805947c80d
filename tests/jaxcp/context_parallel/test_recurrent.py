# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers over shards give what a scan over the whole sequence gives."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from slow import slow_but

from jaxcp.compile import collectives
from jaxcp.context_parallel.gated_delta import (
    WIDE,
    context_parallel_convolution,
    context_parallel_gated_delta,
    delta_of_pieces,
)
from jaxcp.context_parallel.recurrent import Pieces, inputs_cost, summaries_cost
from jaxcp.layout import Contiguous, Striped, Zigzag
from pallas_kernels import PAD_POSITION
from pallas_kernels.gated_delta import gated_delta

B, K, N, H, V, WIDTH = 2, 2, 4, 4, 6, 3
TOLERANCE = 2e-5
CASES = [
    (layout, shards, length, packed)
    for layout in (Zigzag(), Contiguous())
    for shards, length in ((1, 9), (2, 16), (3, 31), (4, 61), (8, 37), (8, 130))
    for packed in (False, True)
]
QUICK = (Zigzag(), 8, 37, True), (Contiguous(), 3, 31, True)


def problem(length, *, by_channel=False):
    rng = np.random.default_rng(length)
    q, k = (rng.normal(size=(B, length, K, H)) for _ in range(2))
    x = {
        "q": q, "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": rng.normal(size=(B, length, N, V)),
        "log_decay": -rng.uniform(0, 0.3, (B, length, N, *[H] * by_channel)),
        "beta": rng.uniform(0, 1, (B, length, N)),
    }  # fmt: skip
    return {name: y.astype(np.float32) for name, y in x.items()}


def documents(length):
    """`(positions, segment ids)`: documents in any order of ids; pads between and at the end."""
    positions, segments = np.zeros((2, B, length), np.int32)
    cuts = ([0, length // 3, length], [0, 1, length // 2, length // 2 + 2, length - length // 5])
    for row, ends in enumerate(cuts):
        positions[row], segments[row] = PAD_POSITION, -1
        for i, (start, stop) in enumerate(itertools.pairwise(ends)):
            stop -= i == 1 and stop - start > 2  # a pad ends it
            positions[row, start:stop] = np.arange(stop - start)
            segments[row, start:stop] = (7, 3, 9, 0)[i]
    return positions, segments


def natural(length):
    return np.broadcast_to(np.arange(length, dtype=np.int32), (B, length)), None


def scan(x, positions, segments):
    """The reference, in natural order."""
    pads = positions == PAD_POSITION
    starts = np.zeros_like(pads)
    if segments is not None:
        for row in range(B):
            real = np.flatnonzero(~pads[row])
            begins = np.append(True, np.diff(segments[row, real]) != 0)
            starts[row, real[begins]] = True
    return gated_delta(**x, starts=starts, pads=pads, implementation="reference")[0]


def convolved(x, taps, positions, segments):
    """A convolution in natural order by loops over taps."""
    out = np.zeros_like(x)
    segments = np.zeros_like(positions) if segments is None else segments
    real = positions != PAD_POSITION
    for i in range(WIDTH + 1):
        there = np.zeros_like(real)
        there[:, i:] = real[:, i:] & real[:, : x.shape[1] - i]
        there[:, i:] &= segments[:, i:] == segments[:, : x.shape[1] - i]
        shifted = np.zeros_like(x)
        shifted[:, i:] = x[:, : x.shape[1] - i]
        out += np.where(there[..., None, None], taps[WIDTH - i] * shifted, 0)
    return out


def on_shards(layout, shards, tree):
    return jax.tree.map(lambda y: jax.device_put(y, P(None, "seq")), layout.permute(tree, shards))


def there(layout, shards, x, positions, segments):
    batch = x | {"positions": positions} | ({} if segments is None else {"segment_ids": segments})
    batch = on_shards(layout, shards, batch)
    ids = {name: batch.pop(name) for name in ("positions", "segment_ids") if name in batch}
    return batch, ids


@functools.partial(jax.jit, static_argnames=("layout", "length"))
def over_shards(x, positions, segment_ids=None, *, layout, length):
    arrays = x["q"], x["k"], x["v"], x["log_decay"], x["beta"]
    return context_parallel_gated_delta(
        *arrays, positions, layout=layout, length=length, segment_ids=segment_ids
    )


@pytest.mark.parametrize("layout, shards, length, packed", slow_but(CASES, QUICK.__contains__))
def test_the_same_as_one_scan(layout, shards, length, packed, mesh_of):
    mesh_of(seq=shards)
    x = problem(length, by_channel=shards % 2 == 0)
    ids = documents(length) if packed else natural(length)
    batch, marks = there(layout, shards, x, *ids)
    out = over_shards(batch, **marks, layout=layout, length=length)
    out = layout.inverse(out, shards, length)
    np.testing.assert_allclose(out, scan(x, *ids), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "layout, shards",
    slow_but([(Zigzag(), 4), (Zigzag(), 8), (Contiguous(), 3)], lambda c: c[1] == 4),
)
def test_gradients_are_those_of_one_scan(layout, shards, mesh_of):
    mesh_of(seq=shards)
    length = 45
    x, ids = problem(length), documents(length)
    dout = np.random.default_rng(1).normal(size=x["v"].shape).astype(np.float32)
    batch, marks = there(layout, shards, x, *ids)
    upstream = jax.tree.map(lambda y: jax.device_put(y, WIDE), layout.permute(dout, shards))
    run = functools.partial(over_shards, **marks, layout=layout, length=length)
    (found,) = jax.jit(lambda x, d: jax.vjp(run, x)[1](d))(batch, upstream)
    (expected,) = jax.jit(lambda x, d: jax.vjp(lambda x: scan(x, *ids), x)[1](d))(x, dout)
    for name in x:
        ours = layout.inverse(found[name], shards, length)
        np.testing.assert_allclose(ours, expected[name], atol=1e-4, rtol=0, err_msg=name)


@pytest.mark.parametrize(
    "layout, shards, length, packed", slow_but(CASES, lambda case: case == QUICK[0])
)
def test_short_convolutions_take_their_halo(layout, shards, length, packed, mesh_of):
    """Pieces may be shorter than what a convolution sees."""
    mesh_of(seq=shards)
    rng = np.random.default_rng(length)
    taps = tuple(
        rng.normal(size=(WIDTH + 1, *heads)).astype(np.float32) for heads in ((K, H), (N, V))
    )
    x = {name: problem(length)[name] for name in ("k", "v")}
    ids = documents(length) if packed else natural(length)
    batch, marks = there(layout, shards, x, *ids)
    run = functools.partial(context_parallel_convolution, layout=layout, length=length)
    found = jax.jit(run)((batch["k"], batch["v"]), taps, **marks)
    for ours, y, tap in zip(found, x.values(), taps, strict=True):
        ours = layout.inverse(ours, shards, length)
        np.testing.assert_allclose(ours, convolved(y, tap, *ids), atol=1e-6, rtol=0)


def test_tokens_in_any_places_go_by_their_positions(mesh_of):
    """Rows of a cache: each has pads of its own on every shard, and starts where it was."""
    mesh_of(seq=4)
    length, layout, shards = 64, Zigzag(), 4
    x = problem(length)
    rng = np.random.default_rng(2)
    keep = np.stack([np.sort(rng.permutation(length)[:count]) for count in (40, 40)])
    places = layout.places(length, shards)
    order = np.full((B, shards, length // shards), -1)
    for row in range(B):
        rank = np.full(length, -1)
        rank[keep[row]] = np.arange(40)
        for shard in range(shards):
            own = np.sort(rank[places[shard]])
            own = own[own >= 0]
            order[row, shard, : len(own)] = own
    order = order.reshape(B, length)
    positions = np.where(order < 0, PAD_POSITION, order + 5).astype(np.int32)
    batch = {
        name: np.where(
            (order >= 0).reshape(B, length, *[1] * (y.ndim - 2)), taken(y, order), np.nan
        )
        for name, y in x.items()
    }
    before = rng.normal(size=(B, N, H, V)).astype(np.float32)

    def local(x, positions, before):
        pieces = Pieces.of_positions(positions, layout, "seq")
        arrays = x["q"], x["k"], x["v"], x["log_decay"], x["beta"]
        return delta_of_pieces(pieces, *arrays, pads=positions == PAD_POSITION, before=before)

    spec = P(None, "seq")
    run = jax.shard_map(local, in_specs=(spec, spec, P()), out_specs=(spec, P()), check_vma=False)
    arrays = jax.tree.map(lambda y: jax.device_put(y, spec), (batch, positions))
    out, after = jax.jit(run)(*arrays, before)
    expected, state = gated_delta(
        **{name: y[:, :40] for name, y in x.items()}, state=before, implementation="reference"
    )
    for row in range(B):
        ours = np.asarray(out)[row, np.argsort(np.where(order[row] < 0, length, order[row]))[:40]]
        np.testing.assert_allclose(ours, expected[row], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(after, state, atol=TOLERANCE, rtol=0)


def taken(y, order):
    return np.take_along_axis(y, np.maximum(order, 0).reshape(*order.shape, *[1] * (y.ndim - 2)), 1)


def test_a_pad_inside_a_document_shows(mesh_of):
    mesh_of(seq=2)
    x, (positions, _) = problem(16), natural(16)
    positions = positions.copy()
    positions[1, 5] = PAD_POSITION
    batch, marks = there(Contiguous(), 2, x, positions, None)
    out = np.asarray(over_shards(batch, **marks, layout=Contiguous(), length=16))
    assert np.isfinite(out[0]).all() and np.isnan(out[1, 6:]).all()


@pytest.mark.parametrize(
    "layout", slow_but([Zigzag(), Contiguous()], lambda x: x == Zigzag()), ids=str
)
def test_the_cost_is_what_programs_send(layout, mesh_of):
    shards, length, most = 4, 64, layout.pieces
    mesh_of(seq=shards)
    numbers = B * N * H * (H + V)
    summaries = summaries_cost(shards=shards, most=most, numbers=numbers)
    ends = inputs_cost(shards=shards, most=most, rows=B, width=1, channels=3, itemsize=4)
    inputs = inputs_cost(
        shards=shards, most=most, rows=B, width=WIDTH, channels=K * H + N * V, itemsize=4
    )
    which = inputs_cost(shards=shards, most=most, rows=1, width=WIDTH, channels=1, itemsize=4)

    def arrays(*shapes, dtype=jnp.float32):
        spec = P(None, "seq")
        return [jax.ShapeDtypeStruct((B, length, *s), dtype, sharding=spec) for s in shapes]

    def delta(positions, *x):
        return context_parallel_gated_delta(*x, positions, layout=layout, length=length)

    def convolution(positions, *x):
        taps = tuple(jnp.ones((WIDTH + 1, *y.shape[2:])) for y in x)
        return context_parallel_convolution(x, taps, positions, layout=layout, length=length)

    def both(run):
        def pulled(positions, *x):
            out, pull = jax.vjp(lambda *x: run(positions, *x), *x)
            return out, pull(out)

        return pulled

    (positions,) = arrays((), dtype=jnp.int32)
    for run, x, costs, exact in (
        (delta, arrays((K, H), (K, H), (N, V), (N,), (N,)), (summaries,), (ends,)),
        (convolution, arrays((K, H), (N, V)), (inputs,), (which,)),
    ):
        forward = sent(run, positions, *x)
        expected = [t for cost in (*costs, *exact) for t in cost.forward]
        assert forward == {"all-gather": (len(expected), sum(t.bytes for t in expected))}
        backward = [t for cost in costs for t in cost.backward]
        found = sent(both(run), positions, *x)
        assert found["reduce-scatter"] == (len(backward), sum(t.bytes for t in backward))


def sent(run, *shapes):
    text = jax.jit(run).lower(*shapes).compile().as_text()
    return {c.kind: (c.count, c.bytes) for c in collectives(text)}


def test_what_cannot_be(mesh_of):
    mesh_of(seq=4)
    x, (positions, _) = problem(16), natural(16)
    for layout, length, error, match in (
        (Striped(), 16, NotImplementedError, r"pieces of consecutive tokens.*Zigzag\(\)"),
        (Zigzag(), None, ValueError, "give length="),
    ):
        batch, marks = there(layout, 4, x, positions, None)
        with pytest.raises(error, match=match):
            over_shards(batch, **marks, layout=layout, length=length)
