# SPDX-License-Identifier: Apache-2.0
"""Every implementation of the grouped matmul, against a float64 loop over groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul, grouped_swiglu
from pallas_kernels.grouped_matmul import dequantise, quantise
from pallas_kernels.grouped_matmul.api import IMPLEMENTATIONS
from pallas_kernels.testing_grouped import CASES, check, product


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_matches_a_float64_loop(implementation, case):
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
