# SPDX-License-Identifier: Apache-2.0
"""Checks the kernels' results: fresh random inputs, float64 on the CPU, poisoned memory."""

import dataclasses
import math
import secrets

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.testing import decode_attention, flash_attention, grouped_matmul
from pallas_kernels.testing.decode_attention import Case as Decode
from pallas_kernels.testing.flash_attention import Case as Attention
from pallas_kernels.testing.grouped_matmul import Case as Grouped

SUITES = {Attention: flash_attention, Decode: decode_attention, Grouped: grouped_matmul}
# Error allowed, relative in the 2-norm. A kernel that is wrong is off by far more; what bfloat16
# rounds is about 4e-3 a result, and float32 means float32: no product is TF32.
TOLERANCE = {"bfloat16": 1.5e-2, "float16": 3e-3, "float32": 2e-4}
POOL_BYTES = 1 << 30


def _attention(**more):
    return Attention(
        **dict(queries=1000, keys=1000, heads=4, head_dim=128, dtype="bfloat16") | more
    )


def _decode(**more):
    base = dict(batch=2, slots=5000, heads=16, kv_heads=2, head_dim=128, dtype="bfloat16")
    return Decode(**base | more)


def _grouped(**more):
    base = dict(
        rows=800, summed=512, columns=640, sizes=(0, 300, 7, 128, 0, 260, 65), dtype="bfloat16"
    )
    return Grouped(**base | more)


CASES = {
    "check-attention": [
        _attention(batch=2),
        _attention(head_dim=64, heads=8, kv_heads=1, queries=1024, keys=1024),
        _attention(head_dim=256),
        _attention(head_dim=192, value_dim=128),
        _attention(head_dim=96, heads=3, kv_heads=3, queries=777, keys=777),
        _attention(head_dim=512, queries=300, keys=300),
        _attention(causal=False, keys=700),
        _attention(window=300),
        _attention(soft_cap=20.0),
        _attention(sinks=True),
        _attention(carry=True, layout="pads"),
        _attention(head_dim=256, carry=True, window=300),
        _attention(layout="zigzag", queries=1024, keys=1024),
        _attention(layout="future", sinks=True, queries=200, keys=200),
        _attention(documents=5, window=200, batch=2),
        _attention(dtype="float16", head_dim=64),
        _attention(dtype="float16", soft_cap=20.0, carry=True),
        _attention(dtype="float32", layout="pads"),
        _attention(dtype="float32", head_dim=256, queries=400, keys=400),
        _attention(dtype="float32", head_dim=64, soft_cap=5.0, window=90, documents=3, sinks=True),
        _attention(outliers=True),
    ],
    "check-decode": [
        _decode(),
        _decode(cache="int8"),
        _decode(cache="float8_e4m3fn"),
        _decode(cache="int8", queries=16, scale_dtype="bfloat16"),
        _decode(window=700, queries=4, sinks=True),
        _decode(layout="dealt", queries=7, cache="int8"),
        _decode(layout="pads", soft_cap=20.0, queries=4),
        _decode(layout="future", sinks=True),
        _decode(slots=70_001, batch=1, heads=8, kv_heads=1),
        _decode(slots=7),
        _decode(head_dim=256),
        _decode(head_dim=64, cache="float8_e4m3fn", outliers=True),
        _decode(dtype="float32", head_dim=80, value_dim=48, window=200),
        _decode(dtype="float32", cache="bfloat16"),
    ],
    "check-grouped": [
        _grouped(),
        _grouped(sizes=(3, 0, 9, 1, 0, 5), rows=20),  # few rows a group: other block sizes
        _grouped(summed=72, columns=40),
        _grouped(swiglu=True),
        _grouped(swiglu=True, sizes=(3, 0, 9, 1, 0, 5), rows=20),
        _grouped(weights="int8"),
        _grouped(weights="float8_e4m3fn"),
        _grouped(weights="int8", block=True, swiglu=True),
        _grouped(weights="float8_e4m3fn", block=True),
        _grouped(weights="mxfp8"),
        _grouped(weights="mxfp8", swiglu=True, sizes=(3, 0, 9, 1, 0, 5), rows=20),
        _grouped(weights="mxfp4"),
        _grouped(weights="mxfp4", sizes=(3, 0, 9, 1, 0, 5), rows=20, summed=192),
        _grouped(weights="nvfp4", swiglu=True, columns=200),
        _grouped(weights="nvfp4", sizes=(3, 0, 9, 1, 0, 5), rows=20, outliers=True),
        _grouped(weights="nvfp4", dtype="float32"),
        _grouped(weights="int4"),
        _grouped(weights="int4", group=32, swiglu=True, sizes=(3, 0, 9, 1, 0, 5), rows=20),
        _grouped(outliers=True),
        _grouped(dtype="float32"),
        _grouped(dtype="float32", swiglu=True, clamp=1.5),
    ],
}  # fmt: skip
SMOKE = {
    "check-attention": [_attention(queries=70, keys=70, head_dim=32, heads=2, window=40)],
    "check-decode": [_decode(slots=70, head_dim=32, cache="int8")],
    "check-grouped": [_grouped(sizes=(3, 0, 20), rows=30, summed=40, columns=24)],
}


def rows(part: str, smoke: bool):
    """Pairs of what a case is called and a function that gives its row."""
    for case in (SMOKE if smoke else CASES)[part]:
        fresh = dataclasses.replace(case, seed=secrets.randbits(32))
        yield label(case), lambda case=fresh: check(case, POOL_BYTES >> 7 if smoke else POOL_BYTES)


def label(case) -> str:
    """The fields that say something: those that are not a case's default."""
    default = type(case)()
    said = {f.name: getattr(case, f.name) for f in dataclasses.fields(case)}
    return " ".join(
        f"{name}={value}".replace(" ", "")
        for name, value in said.items()
        if value != getattr(default, name)
    )


def check(case, pool_bytes: int) -> dict:
    """Errors of every result against float64, and what is wrong with them."""
    suite = SUITES[type(case)]
    fn, given = suite.program("triton", case)
    arrays, again = poisoned(fn, given, pool_bytes)
    problems, errors = [], {}
    for name, exact in suite.expected(case).items():
        error = relative(arrays[name], exact)
        if math.isnan(error):
            problems.append(f"{name}: NaN, or rows with nothing to see differ")
            continue
        errors[name] = error
        if not errors[name] <= TOLERANCE[case.dtype]:
            problems.append(f"{name}: relative error {errors[name]:.2e}")
        if np.asarray(arrays[name]).tobytes() != np.asarray(again[name]).tobytes():
            problems.append(f"{name}: two runs differ")
    return {"seed": case.seed, "errors": errors, "problems": problems}


def relative(got, exact) -> float:
    """Error as a part of `exact`, in the 2-norm; NaN where got is, or where its -inf differ."""
    got, dead = np.asarray(got, np.float64), np.isneginf(exact)
    if got.shape != exact.shape or not np.array_equal(dead, np.isneginf(got)):
        return float("nan")
    got, exact = (np.where(dead, 0, x) for x in (got, exact))
    return float(np.linalg.norm(got - exact) / (np.linalg.norm(exact) or 1.0))


def poisoned(fn, given, pool_bytes: int) -> list[dict]:
    """Two runs of `fn(given)` where every result, and the memory that is free, held NaN before."""
    shapes = jax.eval_shape(fn, given)

    def junk():
        return jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), shapes)

    run = jax.jit(lambda junk, given: fn(given), donate_argnums=0, keep_unused=True)
    run = run.lower(junk(), given).compile()
    results = []
    for _ in range(2):
        pool = [jnp.full(pool_bytes // 32, jnp.nan, jnp.float32) for _ in range(8)]
        donated = jax.block_until_ready((pool, junk()))[1]
        del pool  # the allocator hands it out again
        results.append(jax.device_get(run(donated, given)))
    return results
