# SPDX-License-Identifier: Apache-2.0
"""Every implementation of the grouped matmul, against a float64 loop over groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul, grouped_swiglu
from pallas_kernels.grouped_matmul import dequantise, quantise
from pallas_kernels.grouped_matmul.api import IMPLEMENTATIONS

# rows of each group, rows in all, summed width, columns
GROUPS = {
    "empty, uneven, more than a tile, a rest": ([0, 3, 0, 70, 21, 0], 107, 72, 40),
    "several blocks": ([16, 64, 16], 96, 256, 384),
    "none has a row": ([0, 0], 5, 24, 40),
    "no row": ([0, 0], 0, 24, 40),
}
UNEVEN, BLOCKS, *_ = GROUPS
# What no implementation may exceed, as a part of the greatest entry; and where the reference is
# all but exact, float32 sums in another order.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
NOISE = {"float32": 1e-6, "bfloat16": 4e-3}


def arrays(case, dtype, matrices=1, scale=1.0):
    """lhs, weights, dout: float64, rounded to `dtype` here, so that error is nobody's."""
    sizes, rows, summed, columns = GROUPS[case]
    rng = np.random.default_rng(0)
    weights = (len(sizes), summed, columns)
    shapes = (rows, summed), *[weights] * matrices, (rows, columns)
    found = [rng.standard_normal(shape) * scale for shape in shapes]
    return [x.astype(dtype).astype(np.float64) for x in found]


def group_slices(sizes):
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def product(lhs, rhs, sizes):
    out = np.zeros((lhs.shape[0], rhs.shape[2]))
    for group, rows in enumerate(group_slices(sizes)):
        out[rows] = lhs[rows] @ rhs[group]
    return out


def outer(lhs, dout, sizes):
    return np.stack([lhs[rows].T @ dout[rows] for rows in group_slices(sizes)])


def activation(g, u, clamp):
    if clamp is not None:
        g, u = np.minimum(g, clamp), np.clip(u, -clamp, clamp)
    return g / (1 + np.exp(-g)) * u


def activation_gradient(g, u, clamp):
    inside_g, inside_u = 1.0, 1.0
    if clamp is not None:
        inside_g, inside_u = g < clamp, np.abs(u) < clamp
        g, u = np.minimum(g, clamp), np.clip(u, -clamp, clamp)
    s = 1 / (1 + np.exp(-g))
    return s * (1 + g * (1 - s)) * u * inside_g, g * s * inside_u


def with_gradients(function, inputs, dout):
    """Results of two runs of `function` and its gradients, which are the same bit by bit."""

    def run(inputs, dout):
        out, pullback = jax.vjp(function, *inputs)
        return out, *pullback(dout)

    # an interpreted kernel is a long program that runs twice
    run = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    first, again = ([np.asarray(x) for x in run(inputs, dout)] for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert a.tobytes() == b.tobytes(), "two runs differ"
    return first


def error(got, exact):
    assert got.shape == exact.shape
    assert np.isfinite(got.astype(np.float64)).all()
    greatest = max(1.0, np.abs(exact).max(initial=0))
    return np.abs(got.astype(np.float64) - exact).max(initial=0) / greatest


def assert_as_good(got, reference, exact, dtype):
    for name, mine, theirs, value in zip(
        ("out", "dlhs", "dweights", "dweights 2"), got, reference, exact, strict=False
    ):
        assert mine.dtype == dtype
        off, allowed = error(mine, value), max(1.5 * error(theirs, value), NOISE[dtype])
        assert off <= min(allowed, TOLERANCE[dtype]), f"{name}: off by {off:.1e}, {allowed:.1e}"


@functools.cache
def run_matmul(implementation, case, dtype):
    lhs, rhs, dout = (jnp.asarray(x, dtype) for x in arrays(case, dtype))

    def forward(lhs, rhs):
        sizes = jnp.asarray(GROUPS[case][0])
        return grouped_matmul(lhs, rhs, sizes, implementation=implementation)

    return with_gradients(forward, (lhs, rhs), dout)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, "float32") for case in GROUPS), (UNEVEN, "bfloat16")],
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_matches_a_float64_loop(implementation, case, dtype):
    lhs, rhs, dout = arrays(case, dtype)
    sizes = GROUPS[case][0]
    exact = (
        product(lhs, rhs, sizes),
        product(dout, rhs.swapaxes(1, 2), sizes),
        outer(lhs, dout, sizes),
    )
    got = run_matmul(implementation, case, dtype)
    assert_as_good(got, run_matmul("reference", case, dtype), exact, dtype)
    assert not got[0][sum(sizes) :].any()


@functools.cache
def run_swiglu(implementation, case, dtype, clamp):
    inputs = [jnp.asarray(x, dtype) for x in arrays(case, dtype, matrices=2)]

    def forward(lhs, gate, up):
        sizes = jnp.asarray(GROUPS[case][0])
        return grouped_swiglu(lhs, gate, up, sizes, clamp=clamp, implementation=implementation)

    return with_gradients(forward, tuple(inputs[:3]), inputs[3])


@pytest.mark.parametrize(  # rounding carries a bfloat16 across the clamp, where the slope jumps
    ("case", "dtype", "clamp"),
    [(BLOCKS, "bfloat16", None), (UNEVEN, "float32", 3.0)],
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_swiglu_matches_float64(implementation, case, dtype, clamp):
    lhs, gate, up, dout = arrays(case, dtype, matrices=2)
    sizes = GROUPS[case][0]
    g, u = product(lhs, gate, sizes), product(lhs, up, sizes)
    dg, du = (dout * slope for slope in activation_gradient(g, u, clamp))
    dlhs = product(dg, gate.swapaxes(1, 2), sizes) + product(du, up.swapaxes(1, 2), sizes)
    exact = activation(g, u, clamp), dlhs, outer(lhs, dg, sizes), outer(lhs, du, sizes)
    got = run_swiglu(implementation, case, dtype, clamp)
    assert_as_good(got, run_swiglu("reference", case, dtype, clamp), exact, dtype)


@functools.cache
def run_quantised(implementation, case, dtype, values, block):
    lhs, rhs, dout = (jnp.asarray(x, dtype) for x in arrays(case, dtype))
    weights = quantise(rhs, values, block=block)

    def forward(lhs):
        sizes = jnp.asarray(GROUPS[case][0])
        return grouped_matmul(lhs, weights, sizes, implementation=implementation)

    return with_gradients(forward, (lhs,), dout), np.asarray(dequantise(weights), np.float64)


@pytest.mark.parametrize(
    ("values", "block", "dtype"),
    [("int8", False, "bfloat16"), ("float8_e4m3fn", True, "float32")],
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weights_of_8_bits(implementation, values, block, dtype):
    case = BLOCKS
    lhs, _, dout = arrays(case, dtype)
    sizes = GROUPS[case][0]
    got, weights = run_quantised(implementation, case, dtype, values, block)
    exact = product(lhs, weights, sizes), product(dout, weights.swapaxes(1, 2), sizes)
    reference, _ = run_quantised("reference", case, dtype, values, block)
    assert_as_good(got, reference, exact, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[2:])
def test_swiglu_of_8_bit_weights(implementation):
    lhs, gate, up, _ = arrays(BLOCKS, "float32", matrices=2)
    sizes = GROUPS[BLOCKS][0]
    weights = [quantise(jnp.asarray(w, jnp.float32), block=True) for w in (gate, up)]
    got = grouped_swiglu(
        jnp.asarray(lhs, jnp.float32), *weights, jnp.asarray(sizes), implementation=implementation
    )
    g, u = (product(lhs, np.asarray(dequantise(w), np.float64), sizes) for w in weights)
    assert error(np.asarray(got), activation(g, u, None)) < TOLERANCE["float32"]


# Error of the product that rounding the weights alone makes, relative to the product's norm.
# Outliers: 1 weight in 500 is 30 times as large, and takes the scale of all that share it.
ROUNDING = {
    # values, block: random, outliers
    ("int8", False): (0.010, 0.05),
    ("int8", True): (0.014, 0.12),
    ("float8_e4m3fn", False): (0.030, 0.030),
    ("float8_e4m3fn", True): (0.030, 0.030),
}


@pytest.mark.parametrize(("values", "block"), ROUNDING)
def test_what_rounding_costs(values, block):
    rng = np.random.default_rng(3)
    lhs, weights = rng.standard_normal((64, 512)), rng.standard_normal((2, 512, 256))
    sizes = [40, 24]
    for outliers, allowed in zip((0.0, 0.002), ROUNDING[values, block], strict=True):
        large = np.where(rng.random(weights.shape) < outliers, 30 * weights, weights)
        rounded = dequantise(quantise(jnp.asarray(large, jnp.float32), values, block=block))
        exact = product(lhs, large, sizes)
        off = product(lhs, np.asarray(rounded, np.float64), sizes) - exact
        relative = np.linalg.norm(off) / np.linalg.norm(exact)
        assert allowed / 2 < relative < allowed, (outliers, relative)


def test_a_matrix_of_zeros_has_scales():
    weights = quantise(jnp.zeros((1, 8, 4)), jnp.float8_e4m3fn)
    assert not np.asarray(dequantise(weights)).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_rows_of_no_group_may_hold_anything(implementation):
    lhs = jnp.ones((40, 16)).at[10:].set(jnp.nan)
    sizes = jnp.array([4, 0, 6])

    def loss(rhs):
        out = grouped_matmul(lhs, rhs, sizes, implementation=implementation)
        return out[:10].sum(), out

    (_, out), drhs = jax.value_and_grad(loss, has_aux=True)(jnp.ones((3, 16, 16)))
    assert not np.asarray(out[10:]).any()
    assert np.isfinite(np.asarray(drhs)).all()


def test_what_does_not_fit_is_named():
    x, w, sizes = jnp.ones((4, 2)), jnp.ones((3, 2, 5)), jnp.array([1, 0, 3])
    with pytest.raises(ValueError, match="group_sizes"):
        grouped_matmul(x, jnp.ones((3, 5, 2)), sizes)
    with pytest.raises(ValueError, match="implementation"):
        grouped_matmul(x, w, sizes, implementation="cuda")
    with pytest.raises(ValueError, match="alike"):
        grouped_swiglu(x, w, jnp.ones((3, 2, 6)), sizes)
    with pytest.raises(ValueError, match="clamp"):
        grouped_swiglu(x, w, w, sizes, clamp=0.0)
    with pytest.raises(ValueError, match="int8"):
        quantise(w, jnp.int4)
    with pytest.raises(ValueError, match="scales"):
        grouped_matmul(x, quantise(w).__class__(quantise(w).values, jnp.ones((3, 2, 5))), sizes)
    for implementation in ("triton", "mosaic_tpu"):
        with pytest.raises(NotImplementedError, match="bfloat16"):
            grouped_matmul(x, w.astype("bfloat16"), sizes, implementation=implementation)
