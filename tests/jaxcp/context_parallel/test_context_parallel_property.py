# SPDX-License-Identifier: Apache-2.0
"""Drawn at random: shapes, masks, packings, pads, shards, strategies, layouts. All are dense."""

import functools

import jax
import numpy as np
import pytest
from dense_attention import PAD, dense
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import jaxcp
from jaxcp import USP, AllGather, Balanced, Contiguous, Ring, RingPassQ, Striped, Ulysses
from jaxcp.context_parallel import Halo
from jaxcp.layout import Zigzag

OUT, GRADIENT = 2e-6, 1e-5  # float32, of the greatest entry (at least 1)
STATIC = Zigzag(), Contiguous(), Striped()


def program_of(rng):
    """What is compiled: `(strategy, shards, shapes, options, leaves)`."""
    shards = rng.choice((1, 2, 3, 4, 5, 8))
    layout = rng.choice(STATIC)
    balanced = rng.choice((layout, Balanced(4)))
    among = rng.choice([u for u in range(1, shards + 1) if shards % u == 0])
    strategy = rng.choice(
        (
            Ring(layout=balanced),
            Ring(layout=layout, bidirectional=True),
            RingPassQ(layout=layout),
            AllGather(layout=balanced, chunks=rng.randint(1, 3)),
            Ulysses(layout=layout),
            USP(layout=layout, ulysses=among),
            Halo(layout=layout),
        )
    )
    batch, tokens, kv_heads, group = (rng.randint(1, most) for most in (2, 40, 3, 3))
    group *= {Ulysses: shards, USP: among}.get(type(strategy), 1)
    widths = rng.randint(1, 9), rng.randint(1, 9)
    halo = isinstance(strategy, Halo)
    options = {
        "causal": rng.random() < 0.7,
        "window": rng.randint(1, tokens + 2) if halo or rng.random() < 0.4 else None,
        "soft_cap": rng.choice((None, 1.5, 20.0)),
        "scale": rng.choice((None, 0.4)),
        # with a window it is Halo that runs
        "consecutive": halo or (not strategy.layout.by_segment and rng.random() < 0.3),
    }
    leaves = {name for name in ("segment_ids", "sinks") if rng.random() < 0.6}
    return strategy, shards, (batch, tokens, kv_heads, group * kv_heads, *widths), options, leaves


def rows_of(rng, program):
    """`(positions, segment_ids or None, layout)` for a program, in natural order."""
    strategy, _, (batch, tokens, *_), options, leaves = program
    index = np.arange(tokens)
    ends = [sorted(rng.choices(range(1, tokens + 1), k=rng.randint(0, 4))) for _ in range(batch)]
    segments = np.stack([np.searchsorted(e, index, side="right") for e in ends])
    starts = np.stack([np.array([0, *e])[s] for e, s in zip(ends, segments, strict=True)])
    packed = "segment_ids" in leaves
    in_order = options["consecutive"] and options["window"] is not None
    positions = np.broadcast_to(index, segments.shape).copy()
    if packed and rng.random() < 0.5:
        positions -= starts
    elif not in_order and rng.random() < 0.3:  # any numbers mask: twice the same, out of order
        positions = np.array(rng.choices(range(30), k=positions.size)).reshape(positions.shape)
        segments = segments[:, ::-1] % 3
    for row in positions:  # pads at the end, or all of a row
        row[tokens - rng.choice((0, 0, 1, tokens // 2, tokens)) :] = PAD
    layouts = (*STATIC, Balanced(rng.randint(1, 8))) if packed else STATIC
    layout = strategy.layout if in_order else rng.choice(layouts)
    return positions.astype(np.int32), segments.astype(np.int32) if packed else None, layout


@functools.partial(jax.jit, static_argnums=(0, 1))
def attend(strategy, options, x):
    def out(q, k, v, sinks):
        return jaxcp.context_parallel_attention(
            q, k, v, x["positions"], strategy=strategy, segment_ids=x.get("segment_ids"),
            sinks=sinks, **dict(options),
        )  # fmt: skip

    out, pull = jax.vjp(out, x["q"], x["k"], x["v"], x.get("sinks"))
    return out, *pull(x["dout"])


def check(program, rows):
    """Every `rows` (of `rows_of`) through one compiled program, against float64."""
    strategy, shards, (batch, tokens, kv_heads, heads, width, value_width), options, leaves = (
        program
    )
    rng, compiled = np.random.default_rng(tokens), None
    mesh = jaxcp.make_mesh(seq=shards, devices=jax.devices()[:shards])
    for positions, segments, layout in rows:
        shapes = (heads, width), (kv_heads, width), (kv_heads, value_width), (heads, value_width)
        x = {
            name: rng.normal(size=(batch, tokens, *shape)).astype(np.float32)
            for name, shape in zip(("q", "k", "v", "dout"), shapes, strict=True)
        }
        x["positions"] = positions
        more = {"sinks": rng.normal(size=heads).astype(np.float32)} if "sinks" in leaves else {}
        for sinks in more.values():
            sinks[: heads // 2] = -np.inf
        if segments is not None:
            x["segment_ids"] = segments
        there = layout.permute(x, shards)
        # what runs by the order of a layout has that layout's pads, and no others
        alone = options["consecutive"] and options["window"] is not None
        length = (layout if alone else Zigzag()).padded_length(tokens, shards)
        with jax.set_mesh(mesh):
            there = {
                name: jax.device_put(y, P("data", "seq", *["model"] * (y.ndim > 2)))
                for name, y in padded(there, shards, length).items()
            } | jax.device_put(more, P("model"))
            if compiled is None:
                # half the time of a compilation, and the same arithmetic
                compiled = attend.lower(strategy, tuple(options.items()), there).compile()
            *found, dsinks = compiled(there)
        places = layout.padded_length(tokens, shards)
        found = [np.asarray(y).reshape(batch, shards, -1, *y.shape[2:]) for y in found]
        found = [y[:, :, : places // shards].reshape(batch, places, *y.shape[3:]) for y in found]
        found = [*layout.inverse(found, shards, tokens, segments), dsinks]
        wanted = dense(**x, **more, **{k: y for k, y in options.items() if k != "consecutive"})
        for name, ours, theirs in zip(
            ("out", "dq", "dk", "dv", "dsinks"), found, wanted, strict=True
        ):
            if ours is not None:
                limit = (OUT if name == "out" else GRADIENT) * max(1.0, np.abs(theirs).max())
                np.testing.assert_allclose(ours, theirs, atol=limit, rtol=0, err_msg=name)


def padded(tree, shards, length):
    """Pads at the end of every shard, so that all layouts have as many places."""
    values = {"positions": PAD, "segment_ids": -1}

    def one(name, x):
        x = x.reshape(x.shape[0], shards, -1, *x.shape[2:])
        pads = [(0, 0)] * x.ndim
        pads[2] = (0, length // shards - x.shape[2])
        x = np.pad(x, pads, constant_values=values.get(name, 0))
        return x.reshape(x.shape[0], length, *x.shape[3:])

    return {name: one(name, x) for name, x in tree.items()}


@pytest.mark.slow
@settings(max_examples=8, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(st.randoms(use_true_random=True))
def test_any_program_is_dense(rng):
    """A program for each example, and three packings through it."""
    program = program_of(rng)
    check(program, [rows_of(rng, program) for _ in range(3)])
