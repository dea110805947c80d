# SPDX-License-Identifier: Apache-2.0
"""Every implementation of the grouped matmul, against a float64 loop over groups."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow import slow_but

from pallas_kernels import grouped_matmul, grouped_swiglu
from pallas_kernels.grouped_matmul import Quantized, dequantize, quantize, quantized
from pallas_kernels.grouped_matmul.api import IMPLEMENTATIONS
from pallas_kernels.number_formats import four_times_e2m1, from_ue8m0, to_e2m1, to_ue8m0
from pallas_kernels.testing.grouped_matmul import CASES, check, product

rounded, exactly = jax.jit(quantize, static_argnames=("format", "block")), jax.jit(dequantize)
KERNELS = ("triton", "mosaic_tpu")
OTHERS = ("several blocks", "none has a row", "bfloat16", "int8", "mxfp4", "swiglu, bfloat16")
OTHERS += ("float8 by block", "mxfp8")
"""Cases that differ from the others by less: an interpreted kernel runs them in `make test-all`."""


@pytest.mark.parametrize(
    "name, implementation",
    slow_but(
        itertools.product(CASES, IMPLEMENTATIONS),
        lambda case: case[0] not in OTHERS or case[1] == "xla",
    ),
)
def test_matches_a_float64_loop(name, implementation):
    case = CASES[name]
    check(implementation, case)


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
        near = exactly(rounded(jnp.asarray(large, jnp.float32), values, block=block))
        exact = product(lhs, large, sizes)
        off = product(lhs, np.asarray(near, np.float64), sizes) - exact
        relative = np.linalg.norm(off) / np.linalg.norm(exact)
        assert allowed / 2 < relative < allowed, (outliers, relative)


def test_a_matrix_of_zeros_has_scales():
    weights = rounded(jnp.zeros((1, 8, 4)), jnp.float8_e4m3fn)
    assert not np.asarray(exactly(weights)).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_rows_of_no_group_may_hold_anything(implementation):
    lhs = jnp.ones((40, 16)).at[10:].set(jnp.nan)
    sizes = jnp.array([4, 0, 6])

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(rhs):
        out = grouped_matmul(lhs, rhs, sizes, implementation=implementation)
        return out[:10].sum(), out

    (_, out), drhs = loss(jnp.ones((3, 16, 16)))
    assert not np.asarray(out)[10:].any()
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
        quantize(w, jnp.int4)
    with pytest.raises(ValueError, match="scales"):
        grouped_matmul(x, quantize(w).__class__(quantize(w).values, jnp.ones((3, 2, 5))), sizes)
    for implementation in ("triton", "mosaic_tpu"):
        with pytest.raises(NotImplementedError, match="bfloat16"):
            grouped_matmul(x, w.astype("bfloat16"), sizes, implementation=implementation)


def test_what_a_format_can_hold_comes_back():
    """Every e2m1 and e4m3 value, under powers of two; a tie goes to the even code."""
    codes = np.arange(16, dtype=np.uint8)
    float_of, code_of = jax.jit(four_times_e2m1, static_argnames="high"), jax.jit(to_e2m1)
    power_of, exponent_of = jax.jit(from_ue8m0), jax.jit(to_ue8m0)
    e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    exact = np.concatenate([e2m1, -e2m1])
    found = float_of(jnp.asarray(codes, jnp.int32))
    np.testing.assert_array_equal(found, 4 * exact)
    high = float_of(np.asarray(codes, np.int32) << 4 | 5, high=True)
    np.testing.assert_array_equal(high, 4 * exact)
    back = np.asarray(code_of(jnp.asarray(exact)))
    np.testing.assert_array_equal(exact[back], exact)
    ties = code_of(jnp.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0]))
    np.testing.assert_array_equal(exact[np.asarray(ties)], [0, 1, 1, 2, 2, 4, 4, -4])
    np.testing.assert_array_equal(to_e2m1(exact / 4 * 1.1), code_of(jnp.asarray(exact / 4 * 1.1)))
    powers = 2.0 ** np.arange(-90, 90)
    np.testing.assert_array_equal(power_of(exponent_of(jnp.asarray(powers))), powers)
    above = power_of(exponent_of(jnp.asarray(powers * 1.01)))
    np.testing.assert_array_equal(above, 2 * powers)
    np.testing.assert_array_equal(to_ue8m0(powers * 1.01), exponent_of(jnp.asarray(powers * 1.01)))
    whole = np.tile(exact, 12)[:, None] * np.array([1, 0.25, 1024])  # 192 rows
    weights = rounded(jnp.asarray(whole[None], jnp.float32), "mxfp4")
    np.testing.assert_array_equal(exactly(weights)[0], whole)


@pytest.mark.parametrize("packed", [2, 32, 256])
def test_a_slice_of_whole_packs_stands_for_itself(packed):
    codes = np.random.default_rng(0).integers(0, 16, (2, 512, 3), np.uint8)
    values = quantized.pack(codes, packed)
    np.testing.assert_array_equal(quantized.unpack(jnp.asarray(values), packed), codes)
    part = quantized.unpack(jnp.asarray(values[:, 128:]), packed)
    np.testing.assert_array_equal(part, codes[:, 256:])


def test_formats_that_do_not_fit_raise():
    x, sizes = jnp.ones((4, 64)), jnp.array([4])
    w = jnp.ones((1, 64, 5))
    mx, nv = rounded(w, "mxfp4"), rounded(w, "nvfp4")
    with pytest.raises(ValueError, match="gate and up are alike"):
        grouped_swiglu(x, mx, nv, sizes)
    with pytest.raises(ValueError, match="gate and up are alike"):
        grouped_swiglu(x, rounded(w), rounded(w, block=True), sizes)
    with pytest.raises(ValueError, match="32 rows share a scale"):
        quantize(jnp.ones((1, 40, 5)), "mxfp8")
    with pytest.raises(ValueError, match="scales of"):
        grouped_matmul(x, dataclasses.replace(mx, scales=mx.scales[:, :, :4]), sizes)
    with pytest.raises(ValueError, match="zeros are of int4"):
        grouped_matmul(x, dataclasses.replace(mx, zeros=mx.scales), sizes)
    with pytest.raises(ValueError, match="packed values are uint8"):
        grouped_matmul(x, dataclasses.replace(mx, packed=48), sizes)


@pytest.mark.parametrize("implementation", ["triton", "mosaic_tpu"])
def test_what_kernels_have_no_path_for_raises(implementation):
    product = functools.partial(grouped_matmul, implementation=implementation)
    x, sizes, w = jnp.ones((4, 64)), jnp.array([4]), rounded(jnp.ones((1, 64, 5)), "mxfp4")
    with pytest.raises(NotImplementedError, match="no gradient"):
        jax.eval_shape(jax.grad(lambda x, w: product(x, w, sizes).sum()), x, w)
    codes = jnp.zeros((1, 64, 5), jnp.uint8)
    thin = dataclasses.replace(w, values=quantized.pack(codes, 8), packed=8)
    with pytest.raises(NotImplementedError, match="packed"):
        jax.eval_shape(product, x, thin, sizes)


@pytest.mark.parametrize("implementation", ["triton", "mosaic_tpu"])
@pytest.mark.parametrize("packed", [0, 16 * 4])
def test_rows_that_no_block_divides(implementation, packed):
    """Scales of 16 rows, and a rest of a block: nothing past the last row takes part."""
    rng = np.random.default_rng(0)
    summed = 192 if packed else 48
    shape = 2, summed, 40
    scales = jnp.asarray(rng.uniform(0.5, 2, (2, summed // 16, 40)), jnp.float32)
    codes = rng.integers(0, 16, shape, np.uint8)
    values = quantized.pack(codes, packed) if packed else codes.view(np.int8) - np.int8(8)
    w = quantized.Quantized(jnp.asarray(values), scales, packed=packed)
    x = jnp.asarray(rng.normal(size=(20, summed)), jnp.float32)
    sizes = jnp.array([9, 11])
    product = jax.jit(functools.partial(grouped_matmul, implementation=implementation))
    exact = np.asarray(exactly(w), np.float64)
    rows = np.split(np.asarray(x), [9])
    expected = np.concatenate([part @ matrix for part, matrix in zip(rows, exact, strict=True)])
    np.testing.assert_allclose(product(x, w, sizes), expected, atol=1e-3)


INTEGERS = [(0, False), (64, False), (64, True), (256, False), (256, True)]
"""Rows packed together, 0 for 8 bits; zeros."""


@pytest.mark.parametrize(("packed", "has_zeros"), INTEGERS)
@pytest.mark.parametrize("group", slow_but((16, 32, 64, 128), lambda group: group == 64))
@pytest.mark.parametrize("implementation", KERNELS)
def test_integers_with_scales_in_bfloat16(implementation, group, packed, has_zeros):
    """Of 4 bits and of 8, a scale for so many rows: weights as float64 has them, rounded once."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (2, 512, 40), np.int8)
    scales = jnp.asarray(rng.uniform(0.5, 2, (2, 512 // group, 40)), jnp.bfloat16)
    values = quantized.pack(codes.view(np.uint8) & 15, packed).view(np.int8) if packed else codes
    zeros = rng.integers(-8, 8, scales.shape, np.int8) if has_zeros else None
    w = quantized.Quantized(jnp.asarray(values), scales, packed=packed, zeros=zeros)
    spread = np.asarray(scales, np.float64).repeat(group, 1)
    codes = codes - zeros.astype(int).repeat(group, 1) if has_zeros else codes
    np.testing.assert_array_equal(exactly(w), codes * spread)
    x = jnp.asarray(rng.normal(size=(20, 512)), jnp.float32)
    product = jax.jit(functools.partial(grouped_matmul, implementation=implementation))
    rows = np.split(np.asarray(x, np.float64), [9])
    parts = zip(rows, codes * spread, strict=True)
    expected = np.concatenate([part @ matrix for part, matrix in parts])
    np.testing.assert_allclose(product(x, w, jnp.array([9, 11])), expected, atol=5e-3)


def with_zeros(weights):
    four = quantize(weights, "int4")
    zeros = (jnp.arange(four.scales.size) % 15 - 7).reshape(four.scales.shape).astype(jnp.int8)
    return dataclasses.replace(four, zeros=zeros)


STACKS = {
    "plain": lambda w: w,
    "int8": jax.jit(jax.vmap(quantize)),
    "float8 by block": jax.jit(
        jax.vmap(functools.partial(quantize, format="float8_e4m3fn", block=True))
    ),
    "nvfp4": jax.jit(jax.vmap(functools.partial(quantize, format="nvfp4"))),
    "mxfp4": jax.jit(jax.vmap(functools.partial(quantize, format="mxfp4"))),
    "int4": jax.jit(jax.vmap(with_zeros)),
}


@pytest.mark.parametrize(
    ("form", "implementation", "columns"),
    slow_but(
        itertools.product(STACKS, IMPLEMENTATIONS, (128, 40)),  # Mosaic pads 40
        lambda case: (
            (case[1] not in KERNELS and case[2] == 128)
            or case in (("nvfp4", "triton", 128), ("int8", "mosaic_tpu", 40))
        ),
    ),
)
def test_a_layer_of_a_stack_is_its_slice(form, implementation, columns):
    rng = np.random.default_rng(0)
    layers, summed, sizes = 3, 256, jnp.array([5, 0, 8, 4])
    shape = layers, sizes.size, summed, columns
    draw = (rng.normal(size=shape) * summed**-0.5 for _ in range(2))
    gate, up = (STACKS[form](jnp.asarray(w, jnp.float32)) for w in draw)
    x = jnp.asarray(rng.normal(size=(20, summed)), jnp.float32)  # 3 rows of no group

    @jax.jit
    def both(gate, up, layer=None):
        options = {"layer": layer, "implementation": implementation}
        swiglu = grouped_swiglu(x, gate, up, sizes, clamp=2.0, **options)
        return grouped_matmul(x, gate, sizes, **options), swiglu

    @jax.jit
    def scanned(gate, up):
        def step(_, layer):
            return None, both(gate, up, layer)

        return jax.lax.scan(step, None, jnp.arange(layers))[1]

    in_scan = scanned(gate, up)
    for layer in range(layers):
        expected = both(*jax.tree.map(lambda w, i=layer: np.asarray(w)[i], (gate, up)))
        assert all(np.asarray(x).any() for x in expected)
        of_scan = [np.asarray(x)[layer] for x in in_scan]
        for got in (both(gate, up, np.int32(layer)), of_scan):
            jax.tree.map(np.testing.assert_array_equal, tuple(got), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_layer_out_of_range_reads_no_other_memory(implementation):
    weights = jnp.arange(1.0, 4.0)[:, None, None, None] * jnp.ones((3, 2, 16, 16))
    x, sizes = jnp.ones((4, 16)), jnp.array([1, 3])
    product = jax.jit(functools.partial(grouped_matmul, implementation=implementation))
    for layer, nearest in ((-1, 1.0), (3, 3.0)):
        out = product(x, weights, sizes, layer=jnp.int8(layer))
        np.testing.assert_array_equal(out, jnp.full((4, 16), 16 * nearest))


@pytest.mark.parametrize(("layers", "in_place"), [(10, True), (15, False), (40, True)])
def test_triton_slices_stacks_that_it_cannot_reach(layers, in_place):
    """Offsets have 32 bits and a sign up to 4 GiB, and 64 bits above: bytes past 2 GiB are lost."""
    shape = layers, 32, 4096, 1536  # 192 MiB a layer
    weights = Quantized(
        jax.ShapeDtypeStruct(shape, jnp.int8),
        jax.ShapeDtypeStruct((layers, 32, 1, 1536), jnp.float32),
    )
    given = jax.ShapeDtypeStruct((16, 4096), jnp.bfloat16), weights, jnp.zeros(32, jnp.int32)
    product = functools.partial(grouped_matmul, implementation="triton")
    program = jax.make_jaxpr(lambda layer, *given: product(*given, layer=layer))(0, *given)
    (kernel,) = [e for e in program.eqns if e.primitive.name == "pallas_call"]
    matrices = layers * 32 if in_place else 32
    assert (matrices, 4096, 1536) in [x.aval.shape for x in kernel.invars]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_stack_has_no_gradient(implementation):
    x, sizes, w = jnp.ones((4, 16)), jnp.array([1, 3]), jnp.ones((3, 2, 16, 16))
    options = {"layer": 1, "implementation": implementation}
    losses = (
        lambda x, w: grouped_matmul(x, w, sizes, **options).sum(),
        lambda x, w: grouped_swiglu(x, w, w, sizes, **options).sum(),
    )
    for loss, side in itertools.product(losses, (0, 1)):
        with pytest.raises(NotImplementedError, match="slice the layer"):
            jax.eval_shape(jax.grad(loss, side), x, w)


def test_a_stack_that_does_not_fit_is_named():
    x, sizes, w = jnp.ones((4, 16)), jnp.array([1, 3]), jnp.ones((3, 2, 16, 16))
    with pytest.raises(ValueError, match=r"with a layer rhs \[L,E,D,F\].*layer=1"):
        grouped_matmul(x, w[0], sizes, layer=1)
    with pytest.raises(ValueError, match=r"rhs \[E,D,F\].*\(3, 2, 16, 16\).*layer=None"):
        grouped_swiglu(x, w, w, sizes)
    for layer in (-1, 3, np.int64(3)):
        with pytest.raises(ValueError, match=f"one of 3.*layer={layer}"):
            grouped_matmul(x, w, sizes, layer=layer)
    for layer in (1.0, jnp.array([1]), True):
        with pytest.raises(ValueError, match="one integer"):
            grouped_matmul(x, w, sizes, layer=layer)
    one_scale_a_layer = dataclasses.replace(jax.vmap(quantize)(w), scales=jnp.ones((2, 1, 16)))
    with pytest.raises(ValueError, match="scales"):
        grouped_matmul(x, one_scale_a_layer, sizes, layer=1)
