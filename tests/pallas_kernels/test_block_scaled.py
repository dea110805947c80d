# SPDX-License-Identifier: Apache-2.0
"""MXFP8 and NVFP4: what rounding costs, by emulation; the kernel compiles for sm_120."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcp.plan import compile_for, parse_target, target
from pallas_kernels.grouped_matmul import block_scaled as narrow

# 2026-11: jax 0.11 and later warn when Pallas-Triton is used; it works through 0.12.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

SIZES = [40, 0, 21]  # and three rows past the last group
# Error of the product with both sides rounded, relative to its norm: random, outliers (1 entry
# in 500 of both sides is 30 times as large, and takes the scale of its block).
ROUNDING = {"mxfp8": (0.045, 0.045), "nvfp4": (0.16, 0.16)}


def problem(outliers):
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal((64, 256)), rng.standard_normal((3, 128, 256))
    return [np.where(rng.random(x.shape) < outliers, 30 * x, x) for x in arrays]


def product(lhs, rhs):
    ends = np.cumsum(SIZES)
    out = np.zeros((lhs.shape[0], rhs.shape[1]))
    for group, (end, size) in enumerate(zip(ends, SIZES, strict=True)):
        out[end - size : end] = lhs[end - size : end] @ rhs[group].T
    return out


@pytest.mark.parametrize("format", narrow.FORMATS)
def test_what_rounding_costs(format):
    for outliers, allowed in zip((0.0, 0.002), ROUNDING[format], strict=True):
        lhs, rhs = problem(outliers)
        weights = narrow.block_scaled(jnp.asarray(rhs, jnp.float32), format)
        got = narrow.grouped_matmul_block_scaled(
            jnp.asarray(lhs, jnp.float32), weights, jnp.asarray(SIZES), implementation="emulated"
        )
        exact = product(lhs, rhs)
        relative = np.linalg.norm(np.asarray(got) - exact) / np.linalg.norm(exact)
        assert allowed / 2 < relative < allowed, (outliers, relative)
        assert not np.asarray(got)[sum(SIZES) :].any()


@pytest.mark.parametrize("format", narrow.FORMATS)
def test_what_has_a_code_comes_back(format):
    exact = np.tile(np.array(narrow.E2M1 + tuple(-x for x in narrow.E2M1)), (2, 4))
    exact *= np.array([[1.0], [2.0**-20]])
    back = narrow.exact(narrow.block_scaled(jnp.asarray(exact, jnp.float32), format))
    np.testing.assert_allclose(np.asarray(back), exact, rtol=1e-6, atol=0)
    zeros = narrow.exact(narrow.block_scaled(jnp.zeros((2, 32)), format))
    assert not np.asarray(zeros).any()


@pytest.mark.parametrize("tokens", [8, 128])
@pytest.mark.parametrize("format", narrow.FORMATS)
def test_compiles_for_sm_120_or_says_why_not(format, tokens, monkeypatch):
    def described_as_it_is(chip, found=target.target_config):  # sm_120a, as XLA sees a real one
        return found(chip).replace(
            "minor: 0 }", "minor: 0 feature_extension: ACCELERATED_FEATURES }"
        )

    monkeypatch.setattr(target, "target_config", described_as_it_is)
    mesh = parse_target("rtx-pro-6000:1").mesh(seq=1)

    def described(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

    weights = jax.eval_shape(
        lambda w: narrow.block_scaled(w, format), jax.ShapeDtypeStruct((4, 256, 512), jnp.bfloat16)
    )
    args = (
        described((4 * tokens, 512), jnp.bfloat16),
        jax.tree.map(lambda x: described(x.shape, x.dtype), weights),
        described((4,), jnp.int32),
    )
    if jax.__version__ not in narrow.PROVED:
        with pytest.raises(NotImplementedError, match="proved on jax"):
            compile_for(narrow.grouped_matmul_block_scaled, args, mesh)
        return
    assert compile_for(narrow.grouped_matmul_block_scaled, args, mesh).kernels == 1


def test_what_does_not_fit_is_named():
    lhs, sizes = jnp.ones((4, 64)), jnp.array([4])
    weights = narrow.block_scaled(jnp.ones((1, 8, 64)), "mxfp8")
    run = narrow.grouped_matmul_block_scaled
    with pytest.raises(ValueError, match="mxfp8"):
        narrow.block_scaled(lhs, "int4")
    with pytest.raises(ValueError, match="group_sizes"):
        run(jnp.ones((4, 32)), weights, sizes)
    with pytest.raises(ValueError, match="emulated"):
        run(lhs, weights, sizes, implementation="xla")
    with pytest.raises(NotImplementedError, match="sm_120"):
        run(lhs, weights, sizes, implementation="triton")
