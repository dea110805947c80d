# SPDX-License-Identifier: Apache-2.0
"""One suite for every implementation of flash attention.

`check(implementation, case)` compares `out`, `lse` and the gradients of q, k, v and sinks, through
both results, with attention written out in float64 and differentiated by JAX. It shares no code
with the implementations, their mask or their gradient rule. A new backend runs `CASES` and is done.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_attention import PAD_POSITION, flash_attention

FLOAT32 = ("dout", "dlse", "carry_out", "carry_lse")  # whatever q, k and v are
# Greatest error allowed, as a part of the greatest entry (at least 1) of the array compared.
# float32 leaves room for sums in another order; bfloat16 keeps 8 bits, and rounds p and ds as well.
TOLERANCE = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One problem. `layout` and `documents` say what the positions and segment ids look like.

    `layout`: "natural"; "zigzag", the two ends of the sequence first; "shuffled"; "pads", where
    the first keys come late, so that early queries see nothing, and both sides have pads;
    "future", where every key is after every query.
    """

    batch: int = 1
    queries: int = 96
    keys: int = 96
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 32
    value_dim: int | None = None
    dtype: str = "float32"
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    scale: float | None = None
    sinks: bool = False
    sinkless: int = 0  # heads, of those with sinks, whose sink is -inf
    carry: bool = False
    layout: str = "natural"
    documents: int = 1
    outliers: bool = False  # one channel of the keys and of the values is thirty times the rest
    seed: int = 0


EVERYTHING = Case(
    batch=2, queries=190, keys=190, heads=4, kv_heads=2, head_dim=80, window=70, soft_cap=3.0,
    scale=0.2, sinks=True, sinkless=1, carry=True, value_dim=48, layout="pads", documents=3,
)  # fmt: skip

CASES = {
    "causal": Case(),
    "one query": Case(queries=1, keys=150, causal=False),
    "few queries, fewer keys": Case(queries=7, keys=5, head_dim=64),
    "no block divides": Case(batch=2, queries=131, keys=187, head_dim=64),
    "bidirectional": Case(queries=70, keys=190, causal=False),
    "GQA 4:1": Case(batch=2, queries=130, keys=130, heads=8, kv_heads=2),
    "GQA 3:1": Case(heads=6, kv_heads=2),
    "MQA": Case(queries=130, keys=130, heads=4, kv_heads=1),
    "head dim 80": Case(head_dim=80),
    "values wider": Case(head_dim=48, value_dim=64, heads=4, queries=130, keys=130),
    "values narrower": Case(head_dim=192, value_dim=128, queries=130, keys=130, dtype="bfloat16"),
    "carry": Case(carry=True, queries=130, keys=130, layout="pads"),
    "carry only": Case(carry=True, queries=70, keys=70, layout="future"),
    "head dim 256": Case(queries=140, keys=140, head_dim=256),
    "window, head dim 128": Case(queries=190, keys=190, window=20, head_dim=128),
    "window, bidirectional": Case(queries=190, keys=190, window=9, causal=False),
    "soft cap": Case(soft_cap=1.5),
    "sinks": Case(sinks=True, sinkless=1, layout="pads"),
    "zigzag": Case(batch=2, queries=128, keys=192, layout="zigzag"),
    "shuffled": Case(batch=2, queries=150, keys=150, layout="shuffled", window=60),
    "documents": Case(batch=2, queries=180, keys=180, documents=3),
    "documents, bidirectional": Case(queries=150, keys=150, documents=4, causal=False),
    "pads and rows with nothing to see": Case(batch=2, queries=150, keys=170, layout="pads"),
    "pads, bidirectional": Case(batch=2, queries=90, keys=100, layout="pads", causal=False),
    "nothing to see": Case(queries=70, keys=70, layout="future", sinks=True, sinkless=1),
    "everything": EVERYTHING,
    "bfloat16": Case(queries=150, keys=150, dtype="bfloat16", head_dim=64),
    "bfloat16, everything": dataclasses.replace(EVERYTHING, dtype="bfloat16"),
}


def check(implementation: str, case: Case) -> None:
    """Assert that `implementation` solves `case`, and repeats itself bit by bit."""
    got, again = run(implementation, case)
    for name, value in expected(case).items():
        where = f"{implementation}, {name}"
        assert got[name].shape == value.shape, where
        assert got[name].tobytes() == again[name].tobytes(), f"{where}: two runs differ"
        given = got[name].astype(np.float64)
        if name == "lse":
            dead = np.isneginf(value)
            assert np.array_equal(dead, np.isneginf(given)), f"{where}: rows with nothing to see"
            assert not got["out"][dead].any(), f"{where}: out of rows with nothing to see"
            given, value = np.where(dead, 0, given), np.where(dead, 0, value)
        assert np.isfinite(given).all(), f"{where}: not finite"
        error = np.abs(given - value).max() / max(1.0, np.abs(value).max())
        dtype = "float32" if name == "lse" and case.dtype == "float32" else case.dtype
        assert error <= TOLERANCE[dtype], f"{where}: off by {error:.1e}"


def _arrays(case):
    """Make float64 inputs and result weights, rounded once here: no implementation errs there."""
    rng = np.random.default_rng(case.seed)
    query = (case.batch, case.queries, case.heads, case.head_dim)
    key = (case.batch, case.keys, case.kv_heads, case.head_dim)
    width = case.value_dim or case.head_dim
    out, value = (*query[:3], width), (*key[:3], width)
    shapes = {"q": query, "k": key, "v": value, "dout": out, "dlse": query[:3]}
    if case.carry:
        shapes |= {"carry_out": out, "carry_lse": query[:3]}
    if case.sinks:
        shapes["sinks"] = query[2:3]
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    if case.outliers:
        arrays["k"][..., 0] *= 30
        arrays["v"][..., 0] *= 30
    if case.sinks:
        arrays["sinks"][: case.sinkless] = -np.inf
    if case.carry:  # some rows have nothing to carry on
        arrays["carry_out"][:, ::7], arrays["carry_lse"][:, ::7] = 0, -np.inf
    return {name: x.astype(case.dtype).astype(np.float64) for name, x in arrays.items()}


def _ids(case):
    """Positions and segment ids, int32, by the names of `flash_attention`'s arguments."""
    rng = np.random.default_rng(1)
    length = max(case.queries, case.keys)
    line = np.tile(np.arange(length), (case.batch, 1))
    order = {
        "zigzag": np.concatenate([np.arange(length // 2, length), np.arange(length // 2)[::-1]]),
        "shuffled": rng.permutation(length),
    }.get(case.layout, np.arange(length))
    line = line[:, order]
    q, kv = line[:, : case.queries].copy(), line[:, : case.keys].copy()
    if case.layout == "pads":
        kv += 17
        for row, pads in enumerate((q, kv)):
            for b in range(case.batch):
                pads[b, 5 + b : 9 + 2 * b + row] = PAD_POSITION
                pads[b, pads.shape[1] - 40 - 30 * b :] = PAD_POSITION
    if case.layout == "future":
        kv += length
    ids = {"q_positions": q, "kv_positions": kv}
    if case.documents > 1:
        segment = np.sort(rng.integers(0, case.documents, (case.batch, length)), axis=1)[:, order]
        ids |= {"q_segment_ids": segment[:, : case.queries]}
        ids |= {"kv_segment_ids": segment[:, : case.keys]}
    return {name: x.astype(np.int32) for name, x in ids.items()}


def _seen(case):
    """Compute the mask once more, in plain NumPy: bool [B, T, S]."""
    ids = {name: x.astype(np.int64) for name, x in _ids(case).items()}
    q, kv = ids["q_positions"][:, :, None], ids["kv_positions"][:, None, :]
    seen = (q < PAD_POSITION) & (kv < PAD_POSITION)
    if case.causal:
        seen &= q >= kv
    if case.window is not None:
        seen &= np.abs(q - kv) < case.window
    if case.documents > 1:
        seen &= ids["q_segment_ids"][:, :, None] == ids["kv_segment_ids"][:, None, :]
    return seen


def _loss(out, lse, arrays):
    alive = ~jnp.isneginf(lse)
    loss = jnp.sum(out.astype(arrays["dlse"].dtype) * arrays["dout"])
    return loss + jnp.sum(jnp.where(alive, lse, 0) * arrays["dlse"])


def _with_gradients(attend, arrays):
    weights = {name: arrays[name] for name in ("dout", "dlse")}
    inputs = {name: x for name, x in arrays.items() if name not in weights}

    def loss(inputs):
        out, lse = attend(**inputs)
        return _loss(out, lse, weights), {"out": out, "lse": lse}

    gradients, results = jax.grad(loss, has_aux=True)(inputs)
    return results | {f"d{name}": x for name, x in gradients.items()}


@functools.cache
def expected(case: Case) -> dict[str, np.ndarray]:
    """`out`, `lse` and the gradients in float64, computed on the CPU."""
    seen = _seen(case)[:, None]
    group = case.heads // case.kv_heads
    scale = case.head_dim**-0.5 if case.scale is None else case.scale

    def attend(q, k, v, sinks=None, carry_out=None, carry_lse=None):
        k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
        s = jnp.einsum("btnh,bsnh->bnts", q, k) * scale
        if case.soft_cap is not None:
            s = case.soft_cap * jnp.tanh(s / case.soft_cap)
        weights = jnp.where(seen, jnp.exp(jnp.where(seen, s, 0.0)), 0.0)  # float64 needs no shift
        total = weights.sum(-1)
        before = jnp.zeros(())
        if carry_lse is not None:
            before = jnp.exp(carry_lse).swapaxes(1, 2)
            total += before
        if sinks is not None:
            total += jnp.exp(sinks)[None, :, None]
        alive = total > 0
        safe = jnp.where(alive, total, 1.0)
        out = jnp.einsum("bnts,bsnh->btnh", weights / safe[..., None], v)
        if carry_out is not None:
            out += (before / safe).swapaxes(1, 2)[..., None] * carry_out
        return out, jnp.where(alive, jnp.log(safe), -jnp.inf).swapaxes(1, 2)

    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        found = jax.jit(functools.partial(_with_gradients, attend))(
            {name: jnp.asarray(x, jnp.float64) for name, x in _arrays(case).items()}
        )
        return {name: np.asarray(x) for name, x in found.items()}


def program(implementation: str, case: Case):
    """`(fn, given)`: `fn(given)` is what `expected` gives, from arrays in the case's dtype."""
    options: dict[str, Any] = dict(
        causal=case.causal, window=case.window, soft_cap=case.soft_cap, scale=case.scale
    )
    ids: dict[str, Any] = {name: jnp.asarray(x) for name, x in _ids(case).items()}

    def attend(q, k, v, sinks=None, carry_out=None, carry_lse=None):
        carry = None if carry_out is None else (carry_out, carry_lse)
        if sinks is not None:
            sinks = sinks.astype(jnp.float32)
        return flash_attention(
            q, k, v, sinks=sinks, carry=carry, implementation=implementation, **ids, **options
        )

    given = {
        name: jnp.asarray(x, jnp.float32 if name in FLOAT32 else case.dtype)
        for name, x in _arrays(case).items()
    }
    return functools.partial(_with_gradients, attend), given


def run(implementation: str, case: Case) -> list[dict[str, np.ndarray]]:
    """Run the case twice."""
    fn, given = program(implementation, case)
    # an interpreted kernel is a long program that runs twice
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    step = jax.jit(fn, compiler_options=quick)
    return [{name: np.asarray(x) for name, x in step(given).items()} for _ in range(2)]
