# SPDX-License-Identifier: Apache-2.0
"""One suite for every implementation of the grouped matmul and the grouped SwiGLU.

`check(implementation, case)` compares the result and its gradients with a loop over groups in
float64 NumPy, and with the error that the reference makes in the same dtype. It shares no code
with the implementations. A new backend runs `CASES` and is done.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import dequantize, grouped_matmul, grouped_swiglu, quantize
from pallas_kernels.grouped_matmul.quantized import FORMATS

# What no implementation may exceed, as a part of the greatest entry; and where the reference is
# all but exact, float32 sums in another order.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
NOISE = {"float32": 1e-6, "bfloat16": 4e-3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One problem: `sizes` of the groups, `rows` in all, `summed` x `columns` a matrix.

    `weights`: None for the rows' dtype, else "int8" or "float8_e4m3fn", with a scale a channel, or
    with `block` one for 128 x 128; or "mxfp8", "mxfp4", "nvfp4" or "int4" (for `group`
    rows), which have no gradient. `swiglu` takes two matrices a group.
    """

    sizes: tuple[int, ...] = (16, 64, 16)
    rows: int = 96
    summed: int = 256
    columns: int = 384
    dtype: str = "float32"
    swiglu: bool = False
    clamp: float | None = None
    weights: str | None = None
    block: bool = False
    group: int = 128
    outliers: bool = False  # 1 entry in 500 of rows and weights is thirty times the rest
    seed: int = 0


UNEVEN = Case(sizes=(0, 3, 0, 70, 21, 0), rows=107, summed=72, columns=40)  # some rows of no group

CASES = {
    "empty, uneven, more than a tile, a rest": UNEVEN,
    "several blocks": Case(),
    "none has a row": Case(sizes=(0, 0), rows=5, summed=24, columns=40),
    "no row": Case(sizes=(0, 0), rows=0, summed=24, columns=40),
    "bfloat16": dataclasses.replace(UNEVEN, dtype="bfloat16"),
    # rounding carries a bfloat16 across the clamp, where the slope jumps
    "swiglu, bfloat16": Case(swiglu=True, dtype="bfloat16"),
    "swiglu with a clamp": dataclasses.replace(UNEVEN, swiglu=True, clamp=3.0),
    "int8": Case(weights="int8", dtype="bfloat16"),
    "float8 by block": Case(weights="float8_e4m3fn", block=True),
    "swiglu, int8 by block": Case(weights="int8", block=True, swiglu=True),
    "mxfp8": Case(weights="mxfp8", sizes=(0, 3, 40), rows=50, summed=96, columns=40),
    "mxfp4": Case(weights="mxfp4", dtype="bfloat16", summed=192),  # 64 rows packed together
    "nvfp4": Case(weights="nvfp4", sizes=(5, 0, 20), rows=30, summed=512, columns=200),
    "swiglu, nvfp4": Case(weights="nvfp4", swiglu=True, dtype="bfloat16", outliers=True),
    "int4": Case(weights="int4", sizes=(5, 0, 20), rows=30, summed=384, columns=200),
    "swiglu, int4 in 32": Case(weights="int4", group=32, swiglu=True, outliers=True),
    "int4 in 64": Case(weights="int4", group=64, dtype="bfloat16", summed=192),
}


def check(implementation: str, case: Case) -> None:
    """Assert that `implementation` solves `case`, and repeats itself bit by bit."""
    got, again = run(implementation, case)
    reference, _ = run("reference", case)
    for name, value in expected(case).items():
        where = f"{implementation}, {name}"
        assert got[name].dtype == case.dtype and got[name].shape == value.shape, where
        assert got[name].tobytes() == again[name].tobytes(), f"{where}: two runs differ"
        assert np.isfinite(got[name].astype(np.float64)).all(), f"{where}: not finite"
        allowed = max(1.5 * error(reference[name], value), NOISE[case.dtype])
        off = error(got[name], value)
        assert off <= min(allowed, TOLERANCE[case.dtype]), f"{where}: {off:.1e} > {allowed:.1e}"
    assert not got["out"][sum(case.sizes) :].any(), "rows of no group"


def error(got, exact) -> float:
    """The greatest error, as a part of the greatest entry (at least 1)."""
    off = np.abs(np.asarray(got, np.float64) - exact).max(initial=0)
    return off / max(1.0, np.abs(exact).max(initial=0))


def matrices(case: Case) -> tuple[str, ...]:
    return ("gate", "up") if case.swiglu else ("weights",)


def arrays(case: Case) -> dict[str, np.ndarray]:
    """Make `lhs`, `dout` and matrices, rounded here once: no implementation has that error."""
    rng = np.random.default_rng(case.seed)
    weights = (len(case.sizes), case.summed, case.columns)
    shapes: dict[str, tuple[int, ...]] = {
        "lhs": (case.rows, case.summed),
        "dout": (case.rows, case.columns),
    }
    shapes |= {name: weights for name in matrices(case)}
    found = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    if case.outliers:
        for name in ("lhs", *matrices(case)):
            found[name] = np.where(rng.random(shapes[name]) < 0.002, 30, 1) * found[name]
    if case.swiglu:  # gates of about 1, where the sigmoid is no step
        found |= {name: found[name] * case.summed**-0.5 for name in matrices(case)}
    return {name: x.astype(case.dtype) for name, x in found.items()}


@functools.lru_cache(maxsize=16)
def given_weights(case: Case):
    """Make the weights of each matrix: arrays in the case's dtype, or `Quantized`."""
    found = [jnp.asarray(arrays(case)[name]) for name in matrices(case)]
    if case.weights is None:
        return found
    rounded = jax.jit(
        functools.partial(quantize, format=case.weights, block=case.block, group=case.group)
    )
    return [rounded(w) for w in found]


@functools.lru_cache(maxsize=16)
def expected(case: Case) -> dict[str, np.ndarray]:
    """The result and its gradients in float64, of the weights as they are stored."""
    given = {name: x.astype(np.float64) for name, x in arrays(case).items()}
    lhs, dout, sizes = given["lhs"], given["dout"], case.sizes
    weights = [
        np.asarray(w if case.weights is None else jax.jit(dequantize)(w), np.float64)
        for w in given_weights(case)
    ]
    products = [product(lhs, w, sizes) for w in weights]
    out, slopes = _gated(products, case.clamp) if case.swiglu else (products[0], [1.0])
    cotangents = [dout * slope for slope in slopes]
    dlhs = sum(
        product(d, w.swapaxes(1, 2), sizes) for d, w in zip(cotangents, weights, strict=True)
    )
    found = {"out": out} if case.weights in FORMATS else {"out": out, "dlhs": dlhs}
    if case.weights is None:
        found |= {
            f"d{name}": outer(lhs, d, sizes)
            for name, d in zip(matrices(case), cotangents, strict=True)
        }
    return found


def product(lhs, rhs, sizes):
    out = np.zeros((lhs.shape[0], rhs.shape[2]))
    for group, rows in enumerate(_group_rows(sizes)):
        out[rows] = lhs[rows] @ rhs[group]
    return out


def outer(lhs, dout, sizes):
    return np.stack([lhs[rows].T @ dout[rows] for rows in _group_rows(sizes)])


def _group_rows(sizes):
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _gated(products, clamp):
    """`silu(g) * u` with clamps, and its slopes along g and u."""
    g, u = products
    inside_g, inside_u = 1.0, 1.0
    if clamp is not None:
        inside_g, inside_u = g < clamp, np.abs(u) < clamp
        g, u = np.minimum(g, clamp), np.clip(u, -clamp, clamp)
    s = 1 / (1 + np.exp(-g))
    return g * s * u, [s * (1 + g * (1 - s)) * u * inside_g, g * s * inside_u]


def program(implementation: str, case: Case):
    """`(fn, given)`: `fn(given)` is what `expected` gives, in the case's dtype."""
    names = "out", "dlhs", *(f"d{name}" for name in matrices(case))
    operation: Any = grouped_matmul
    if case.swiglu:
        operation = functools.partial(grouped_swiglu, clamp=case.clamp)

    def forward(lhs, *weights):
        return operation(lhs, *weights, jnp.asarray(case.sizes), implementation=implementation)

    def run(given):
        lhs, dout, weights = given
        if case.weights in FORMATS:
            return {"out": forward(lhs, *weights)}
        if case.weights is not None:
            out, pull = jax.vjp(lambda lhs: forward(lhs, *weights), lhs)
            return {"out": out, "dlhs": pull(dout)[0]}
        out, pull = jax.vjp(forward, lhs, *weights)
        return dict(zip(names, (out, *pull(dout)), strict=True))

    found = arrays(case)
    return run, (jnp.asarray(found["lhs"]), jnp.asarray(found["dout"]), given_weights(case))


@functools.cache
def run(implementation: str, case: Case) -> list[dict[str, np.ndarray]]:
    """Run the case twice."""
    fn, given = program(implementation, case)
    # an interpreted kernel is a long program that runs twice
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    step = jax.jit(fn, compiler_options=quick)
    return [{name: np.asarray(x) for name, x in step(given).items()} for _ in range(2)]
