# SPDX-License-Identifier: Apache-2.0
"""MXFP8 and NVFP4: what rounding costs, by emulation; the kernel compiles for sm_120."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcp.compile import compile_for, parse_target
from pallas_kernels.grouped_matmul import block_scaled as narrow

# 2026-11: jax 0.11 and later warn when Pallas-Triton is used; it works through 0.12.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

SIZES = [40, 0, 21]  # and three rows past the last group
# Error of the product with both sides rounded, relative to its norm: random, outliers (1 entry
# in 500 of both sides is 30 times as large, and takes the scale of its block).
ROUNDING = {"mxfp8": (0.045, 0.045), "nvfp4": (0.16, 0.16)}
INSTRUCTION = {
    "mxfp8": "mma.sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X"
    ".f32.e4m3.e4m3.f32.ue8m0",
    "nvfp4": "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X"
    ".f32.e2m1.e2m1.f32.ue4m3",
}


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


def compile_kernel(target, format, tokens, options=None):
    weights = jax.eval_shape(
        lambda w: narrow.block_scaled(w, format), jax.ShapeDtypeStruct((4, 256, 512), jnp.bfloat16)
    )
    lhs = jax.ShapeDtypeStruct((4 * tokens, 512), jnp.bfloat16)
    args = lhs, weights, jax.ShapeDtypeStruct((4,), jnp.int32)
    run = functools.partial(narrow.grouped_matmul_block_scaled)  # another one: traced once more
    return compile_for(run, args, parse_target(target).mesh(), options)


@pytest.mark.parametrize("tokens", [8, 128])
@pytest.mark.parametrize("format", narrow.FORMATS)
def test_its_machine_code_has_the_block_scaled_instruction(format, tokens, tmp_path):
    options = {"xla_dump_to": str(tmp_path), "xla_gpu_dump_llvmir": True}
    if jax.version.__version_info__ >= (0, 11):
        options["xla_dump_emitter_re"] = "ptx"
    report = compile_kernel("rtx-pro-6000:1", format, tokens, options)
    assert report.kernels == 1
    ptx = "".join(path.read_text() for path in tmp_path.rglob("*.ptx"))
    assert set(re.findall(r"^\.target (\w+)", ptx, re.M)) == {"sm_120a"}
    assert set(re.findall(r"mma\.sync\.\S+", ptx)) == {INSTRUCTION[format]}


def test_what_has_no_such_instruction_is_refused(monkeypatch):
    with pytest.raises(NotImplementedError, match="NVIDIA H200"):
        compile_kernel("h200:1", "mxfp8", 8)
    monkeypatch.setattr(narrow, "PROVED", ("none",))
    with pytest.raises(NotImplementedError, match="proved on jax none"):
        compile_kernel("rtx-pro-6000:1", "mxfp8", 8)


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
