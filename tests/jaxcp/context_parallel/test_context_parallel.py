# SPDX-License-Identifier: Apache-2.0
"""Every strategy is dense attention, forward and backward, and sends what it says it sends."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_attention import dense
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from pairwise import each_value, pairwise
from slow import slow_but
from strategies import VARIANTS

import jaxcp
from jaxcp.context_parallel import (
    STRATEGIES,
    USP,
    AllGather,
    FixedOrder,
    Halo,
    Ring,
    RingPassQ,
    Ulysses,
)
from jaxcp.layout import Contiguous, Striped, Zigzag
from pallas_kernels import PAD_POSITION

B, T, N, K, H = 2, 45, 8, 2, 8  # T: no number of shards but 1 and 3 divides it
EVERYTHING = {"window": 17, "soft_cap": 2.0, "scale": 0.4}
LAYOUTS = (Zigzag(), Contiguous(), Striped())
TOLERANCE = 2e-6  # float32, relative to the greatest entry (at least 1)
OPTIONS = (Ring(bidirectional=True), AllGather(chunks=3))
HEADS, TOKENS = P("data", "seq", "model"), P("data", "seq")
SPECS = {"q": HEADS, "k": HEADS, "v": HEADS, "dout": HEADS, "sinks": P("model")}
SPECS |= {"positions": TOKENS, "segment_ids": TOKENS}


@functools.cache
def problem():
    """Natural order: three documents a row of uneven lengths, each with positions from 0."""
    rng = np.random.default_rng(0)

    def draw(heads):
        return rng.normal(size=(B, T, heads, H)).astype(np.float32)

    ends = np.array([[11, 30], [20, 21]])
    segment_ids = (np.arange(T) >= ends[..., None]).sum(1).astype(np.int32)
    starts = np.concatenate([np.zeros((B, 1), int), ends], axis=1)
    positions = (np.arange(T) - np.take_along_axis(starts, segment_ids, axis=1)).astype(np.int32)
    return {
        "q": draw(N), "k": draw(K), "v": draw(K), "positions": positions,
        "segment_ids": segment_ids, "dout": draw(N),
        # two heads have none
        "sinks": np.where(np.arange(N) % 4, rng.normal(size=N), -np.inf).astype(np.float32),
    }  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1))
def with_gradients(strategy, options, x):
    """`(out, dq, dk, dv, dsinks)` for the cotangent `x["dout"]`."""

    def attend(q, k, v, sinks):
        return jaxcp.context_parallel_attention(
            q, k, v, x["positions"], strategy=strategy, segment_ids=x.get("segment_ids"),
            sinks=sinks, **dict(options),
        )  # fmt: skip

    out, pull = jax.vjp(attend, x["q"], x["k"], x["v"], x.get("sinks"))
    return out, *pull(x["dout"])


def check(strategy, layout, shards, x, options, *, tolerance=TOLERANCE, implementation=None):
    """Under the mesh in scope, against the float64 reference, in natural order."""
    sinks = {k: x[k] for k in ("sinks",) if k in x}
    there = layout.permute({k: v for k, v in x.items() if k != "sinks"}, shards) | sinks
    pads = there["positions"] == PAD_POSITION
    there = {k: jax.device_put(v, SPECS[k]) for k, v in there.items()}
    *found, dsinks = with_gradients(
        strategy, tuple({**options, "implementation": implementation}.items()), there
    )
    expected = dense(**x, **{k: v for k, v in options.items() if k != "consecutive"})
    assert (np.asarray(found[0])[pads] == 0).all()
    found = [*layout.inverse(found, shards, x["q"].shape[1]), dsinks]
    for name, ours, theirs in zip(
        ("out", "dq", "dk", "dv", "dsinks"), found, expected, strict=True
    ):
        if ours is not None:
            limit = tolerance * max(1.0, np.abs(theirs).max())
            np.testing.assert_allclose(ours, theirs, atol=limit, rtol=0, err_msg=name)


# Equal to dense attention


def test_every_strategy_is_tested():
    assert {type(strategy) for strategy in VARIANTS} == set(STRATEGIES)


def refused(strategy, shards):
    """Tell whether heads or 16 pieces cannot be dealt to so many shards."""
    if isinstance(strategy, FixedOrder):
        return 16 % shards != 0 or Zigzag().padded_length(T, shards) % 16 != 0
    among = {Ulysses: shards, USP: getattr(strategy, "ulysses", 1)}.get(type(strategy), 1)
    return N % among != 0 or shards % among != 0


def masked(mask):
    """A problem and its options: every option at once, or one kind of mask alone."""
    x = problem()
    if mask == "everything":  # packing, window, sinks, soft cap, GQA, pads
        return x, EVERYTHING
    if mask == "not causal":
        return x, {"causal": False, "window": 6}
    if mask == "plain":
        plain = {k: v for k, v in x.items() if k not in ("segment_ids", "sinks")}
        return plain | {"positions": np.tile(np.arange(T, dtype=np.int32), (B, 1))}, {}
    # a row of pads alone, and keys that lie after most queries: zero, and no NaN
    positions = np.stack([np.full(T, PAD_POSITION), np.arange(T)]).astype(np.int32)
    positions[1, :30] = PAD_POSITION
    return {k: v for k, v in x.items() if k != "segment_ids"} | {"positions": positions}, {
        "window": 17
    }


MASKS = ("everything", "plain", "not causal", "nothing to see")
BESIDE = {"data": 2, "seq": 2, "model": 2}
PAIRS = pairwise({"strategy": VARIANTS, "mask": MASKS, "axes": ({"seq": 3}, {"seq": 8}, BESIDE)})
RUN = [case for case in PAIRS if not refused(case["strategy"], case["axes"]["seq"])]
QUICK = each_value(RUN) + each_value(case for case in RUN if case["mask"] == "everything")
REST = [
    {"strategy": strategy, "mask": "everything", "axes": {"seq": shards}}
    for strategy in VARIANTS
    for shards in (1, 2, 5)
    if strategy not in OPTIONS
]


@pytest.mark.parametrize(
    "case",
    slow_but([*PAIRS, *REST], lambda case: case in QUICK),
    ids=lambda case: " ".join(map(str, case.values())),
)
def test_dense_attention(case, mesh_of):
    """Every strategy with every mask, and with every number of shards, each in its layout."""
    strategy, mask, axes = case.values()
    mesh_of(**axes)
    x, options = masked(mask)
    attempt = functools.partial(check, strategy, Zigzag(), axes["seq"], x, options)
    if isinstance(strategy, Halo) and "window" not in options:
        with pytest.raises(NotImplementedError, match="needs a window"):
            attempt()
    elif refused(strategy, axes["seq"]):
        with pytest.raises(ValueError, match=r"a multiple of|does not divide"):
            attempt()
    else:
        attempt()


@pytest.mark.parametrize("strategy", slow_but(VARIANTS, lambda x: x in (Ring(), Halo())), ids=str)
def test_in_every_layout(strategy, mesh_of):
    """Only Halo has to know the layout; the others compile once for three."""
    mesh_of(seq=4)
    for layout in LAYOUTS:
        known = {"layout": layout} if isinstance(strategy, Halo) else {}
        check(dataclasses.replace(strategy, **known), layout, 4, problem(), EVERYTHING)


@pytest.mark.parametrize("layout", [Contiguous(), Striped()], ids=str)
def test_halo_answers_nan_where_tokens_lie_otherwise(layout, mesh_of):
    """It sends the rows that its own layout says; nothing else may look like an answer."""
    mesh_of(seq=4)
    x = layout.permute({k: v for k, v in problem().items() if k not in ("sinks", "dout")}, 4)
    attend = functools.partial(jaxcp.context_parallel_attention, strategy=Halo(), window=9)
    assert np.isnan(jax.jit(attend)(**x)).all()


def test_halo_answers_nan_where_a_segment_comes_twice(mesh_of):
    mesh_of(seq=4)
    x = {k: v for k, v in problem().items() if k not in ("sinks", "dout")}
    x["segment_ids"] = np.stack([x["segment_ids"][0] % 2, x["segment_ids"][1]])
    attend = functools.partial(jaxcp.context_parallel_attention, strategy=Halo(), window=9)
    out = Zigzag().inverse(jax.jit(attend)(**Zigzag().permute(x, 4)), 4, T)
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


def test_window_layers_exchange_the_window_where_tokens_are_consecutive(mesh_of):
    mesh_of(seq=4)
    for strategy in (Ring(), AllGather(), Ulysses()):
        check(strategy, Zigzag(), 4, problem(), EVERYTHING | {"consecutive": True})


@pytest.mark.slow
def test_two_mesh_axes():
    """Tokens over an outer axis (the ring) and an inner one (the heads)."""
    mesh = jax.make_mesh((2, 4), ("outer", "inner"), axis_types=(AxisType.Auto,) * 2)
    natural = {k: v for k, v in problem().items() if k not in ("sinks", "dout")}
    x = Zigzag().permute(natural, 8)
    for strategy in (USP(ulysses=4), Ring(), AllGather(), Ulysses(), Halo(), RingPassQ()):
        attend = functools.partial(
            jaxcp.context_parallel_attention,
            strategy=strategy,
            axis_name=("outer", "inner"),
            window=9,
        )
        with jax.set_mesh(mesh):
            out = Zigzag().inverse(jax.jit(attend)(**x), 8, T)
        np.testing.assert_allclose(out, dense(**natural, window=9), atol=2e-6, rtol=0)


def test_bfloat16(mesh_of):
    """Partial results are merged in float32, so more shards round no more."""
    mesh_of(seq=8)
    x = {
        k: v.astype(jnp.bfloat16) if k in ("q", "k", "v", "dout") else v
        for k, v in problem().items()
    }
    check(jaxcp.Ring(), Zigzag(), 8, x, {"window": 17}, tolerance=2e-2)


@pytest.mark.parametrize("implementation", ["triton", "mosaic_tpu"])
def test_pallas_kernels_inside_the_ring(implementation, mesh_of):
    """In interpret mode; `tests/pallas_kernels` compiles them for real."""
    mesh_of(seq=2)
    x = {k: v if k == "sinks" else v[:1, :20] for k, v in problem().items()}
    options = {"window": 9, "soft_cap": 2.0}
    check(jaxcp.Ring(), Zigzag(), 2, x, options, tolerance=1e-5, implementation=implementation)


def test_without_a_mesh():
    x = {k: v for k, v in problem().items() if k != "dout"}
    out = jax.jit(functools.partial(jaxcp.context_parallel_attention, **EVERYTHING))(**x)
    np.testing.assert_allclose(out, dense(**x, **EVERYTHING), atol=2e-6, rtol=0)


@pytest.mark.parametrize("axis_name", ["seq", "cp"])
def test_a_mesh_whose_axes_are_auto(axis_name):
    """Somebody else's mesh: no explicit sharding, other names."""
    mesh = jax.make_mesh((2, 4), ("data", axis_name), axis_types=(AxisType.Auto,) * 2)
    x = Zigzag().permute(
        {k: v for k, v in problem().items() if k in ("q", "k", "v", "positions")}, 4
    )
    with jax.set_mesh(mesh):
        out = jax.jit(functools.partial(jaxcp.ring_attention, axis_name=axis_name))(**x)
    out = Zigzag().inverse(out, 4, T)
    natural = {k: problem()[k] for k in ("q", "k", "v", "positions")}
    np.testing.assert_allclose(out, dense(**natural), atol=2e-6, rtol=0)


@pytest.mark.slow
def test_inside_a_scan_over_layers_that_are_computed_again(mesh_of):
    """`lax.scan` over weights, `jax.checkpoint` around a layer: the gradients of a plain loop."""
    mesh_of(seq=4)
    rng, layers = np.random.default_rng(0), 2
    x = rng.normal(size=(1, 40, 8)).astype(np.float32)
    weights = rng.normal(size=(layers, 8, 3, 2, 4)).astype(np.float32) / 3
    positions = np.arange(40, dtype=np.int32)[None]
    there = Zigzag().permute({"x": x, "positions": positions}, 4)
    x, positions = jax.device_put((there["x"], there["positions"]), TOKENS)

    def layer(x, weight):
        q, k, v = (jnp.einsum("btd,dnh->btnh", x, weight[:, i]) for i in range(3))
        out = jaxcp.context_parallel_attention(q, k, v, positions, window=23)
        return x + jnp.reshape(out, x.shape, out_sharding=TOKENS), None

    def loop(x, weights):
        for weight in weights:
            x, _ = layer(x, weight)
        return (x**2).sum()

    def scan(x, weights):
        return (jax.lax.scan(jax.checkpoint(layer), x, weights)[0] ** 2).sum()

    found = [
        jax.jit(jax.value_and_grad(f, (0, 1))).lower(x, weights).compile()(x, weights)
        for f in (loop, scan)
    ]
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(one).max()), rtol=0)
