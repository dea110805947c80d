# SPDX-License-Identifier: Apache-2.0
"""One suite for every implementation of decode attention.

`check(implementation, case)` compares `out` and `lse` with attention written out in float64 NumPy,
on the cache as it is stored, and with the error that the reference makes in the same dtypes. It
shares no code with the implementations or their mask. A new backend runs `CASES` and is done.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention import decode_attention, quantize_cache
from pallas_kernels.flash_attention import PAD_POSITION

QUANTIZED = ("int8", "float8_e4m3fn")
# Root of the mean square error against the reference's own, with four roundings of float32 on top:
# all of them sum in float32, in an order and with an exp of their own.
FACTOR = 1.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One problem. `dtype` is q's, `cache` that of keys and values (None: q's).

    `layout` says which token lies in which slot: "natural"; "shuffled"; "dealt", a token in every
    third slot and none in the others, in two turns; "pads", where some slots are empty, some
    queries pads, and the first query is before every key; "future", where all keys are; "far", up
    to the greatest position there is.
    """

    batch: int = 1
    queries: int = 1
    slots: int = 300
    heads: int = 8
    kv_heads: int = 1
    head_dim: int = 64
    value_dim: int | None = None
    dtype: str = "float32"
    cache: str | None = None
    scale_dtype: str = "float32"
    window: int | None = None
    soft_cap: float | None = None
    scale: float | None = None
    sinks: bool = False
    sinkless: int = 0  # heads, of those with sinks, whose sink is -inf
    layout: str = "natural"
    outliers: bool = False
    page: int | None = None
    """Slots of a page: the cache lies in a pool, pages in any order, NaN or the like in others."""
    layers: int | None = None
    """Layers of a stack, of which the last is the cache."""
    seed: int = 0


EVERYTHING = Case(
    batch=2, queries=5, slots=777, heads=6, kv_heads=2, head_dim=80, value_dim=48, window=200,
    soft_cap=3.0, scale=0.2, sinks=True, sinkless=2, layout="pads", cache="int8",
    scale_dtype="bfloat16",
)  # fmt: skip

# many rows: a few keys make up each, so that the roundings of one row are a lottery
OUTLIERS = Case(
    batch=2, queries=4, heads=16, kv_heads=2, slots=256, dtype="bfloat16", outliers=True
)  # fmt: skip

# so many KV heads that a TPU takes them a group at a time
GROUPS = Case(
    batch=2, queries=3, slots=420, heads=16, kv_heads=8, dtype="bfloat16", window=150, sinks=True
)  # fmt: skip

CACHE = {"k", "v", "k_scale", "v_scale"}

CASES = {
    "one query, 8:1": Case(heads=16, kv_heads=2, slots=512, head_dim=128),
    "sixteen queries": Case(queries=16, heads=8, kv_heads=2),
    "fewer slots than a block": Case(slots=5, queries=3),
    "no block divides": Case(batch=2, slots=611, queries=2),
    "eight KV heads": Case(heads=16, kv_heads=8, slots=300),
    "eight KV heads, bfloat16": dataclasses.replace(GROUPS, cache="bfloat16"),
    "eight KV heads, int8": dataclasses.replace(GROUPS, cache="int8", queries=16, head_dim=256),
    "eight KV heads, float8": dataclasses.replace(GROUPS, cache="float8_e4m3fn", layout="pads"),
    "head dim 256": Case(head_dim=256, heads=2),
    "the last positions": Case(batch=2, queries=3, window=100, layout="far"),
    "window": Case(slots=900, queries=4, window=50),
    "shuffled": Case(batch=2, layout="shuffled", queries=3, window=100),
    "dealt to slots": Case(batch=2, layout="dealt", queries=7),
    "nothing to see": Case(layout="future", queries=2, sinks=True, sinkless=3),
    "bfloat16": Case(dtype="bfloat16", heads=16, kv_heads=2, slots=640, queries=4),
    "float32 queries, bfloat16 cache": Case(cache="bfloat16"),
    "int8": Case(cache="int8", dtype="bfloat16", heads=16, kv_heads=2, slots=500),
    "int8, outliers": dataclasses.replace(OUTLIERS, cache="int8"),
    "float8, outliers": dataclasses.replace(OUTLIERS, cache="float8_e4m3fn"),
    "everything": EVERYTHING,
    "everything, bfloat16": dataclasses.replace(
        EVERYTHING, dtype="bfloat16", cache="float8_e4m3fn"
    ),
    "pages": Case(batch=2, queries=2, slots=800, head_dim=128, page=128),
    "pages of a stack, int8": dataclasses.replace(
        GROUPS, cache="int8", slots=520, head_dim=128, layout="pads", page=128, layers=3
    ),
    "short pages, a window": Case(
        batch=3, kv_heads=2, slots=200, head_dim=32, page=16, window=40, layout="shuffled", layers=2
    ),
    "odd pages": Case(slots=70, kv_heads=2, cache="float8_e4m3fn", page=5),
}


def check(implementation: str, case: Case) -> dict[str, float]:
    """Assert that `implementation` solves `case` and repeats itself bit by bit.

    Returns the root mean square error of "out" and "lse", and of "reference out" and "lse".
    """
    got, again = run(implementation, case)
    reference, _ = run("reference", case)
    errors = {}
    for name, value in expected(case).items():
        where = f"{implementation}, {name}"
        assert got[name].shape == value.shape, where
        assert got[name].tobytes() == again[name].tobytes(), f"{where}: two runs differ"
        if name == "lse":
            dead = np.isneginf(value)
            assert np.array_equal(dead, np.isneginf(got[name])), f"{where}: rows that see nothing"
            assert not got["out"][dead].any(), f"{where}: out of rows with nothing to see"
            value = np.where(dead, 0, value)
        for key, found in ((name, got), (f"reference {name}", reference)):
            errors[key] = rms(np.where(np.isneginf(found[name]), 0, found[name]) - value)
        rounding = 4 * float(jnp.finfo(jnp.float32).eps) * rms(value)
        bound = FACTOR * errors[f"reference {name}"] + rounding
        assert errors[name] <= bound, f"{where}: off by {errors[name]:.1e}, bound {bound:.1e}"
    return errors


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


@functools.cache
def arrays(case: Case) -> dict[str, np.ndarray]:
    """Make the inputs, rounded and quantized here once: no implementation has that error."""
    rng = np.random.default_rng(case.seed)
    keys = (case.batch, case.slots, case.kv_heads)
    width = case.value_dim or case.head_dim
    q = rng.standard_normal((case.batch, case.queries, case.heads, case.head_dim))
    found = {"q": q.astype(case.dtype)}
    for name, size in (("k", case.head_dim), ("v", width)):
        x = rng.standard_normal((*keys, size))
        if case.outliers:  # one entry of a token's head is thirty times the rest
            x[..., 0] *= 30
        if case.cache in QUANTIZED:
            rounded = jax.jit(quantize_cache, static_argnums=1)
            values, scales = rounded(jnp.asarray(x, jnp.float32), case.cache)
            found[name] = np.asarray(values)
            found[f"{name}_scale"] = np.asarray(scales).astype(case.scale_dtype)
        else:
            found[name] = x.astype(case.cache or case.dtype)
    if case.sinks:
        found["sinks"] = rng.standard_normal(case.heads).astype(np.float32)
        found["sinks"][: case.sinkless] = -np.inf
    return found | positions(case)


def positions(case: Case) -> dict[str, np.ndarray]:
    """`q_positions` and `kv_positions`: the queries are the newest tokens."""
    rng = np.random.default_rng(1)
    kv = np.tile(np.arange(case.slots), (case.batch, 1))
    length = case.slots
    if case.layout == "shuffled":
        kv = rng.permuted(kv, axis=1)
    if case.layout == "dealt":
        line, half = np.arange(case.slots), case.slots // 2
        turn = np.where(line < half, line // 3, half // 3 + 1 + (line - half) // 3)
        kv = np.tile(np.where(line % 3 == 0, turn, PAD_POSITION), (case.batch, 1))
        length = turn.max() + 1
    q = length - case.queries + np.arange(case.queries)
    q = np.tile(q, (case.batch, 1))
    if case.layout == "far":
        kv, q = kv + PAD_POSITION - length, q + PAD_POSITION - length
    if case.layout == "pads":
        kv += 17
        for b in range(case.batch):
            kv[b, 5 + b : 9 + 2 * b] = PAD_POSITION
            kv[b, case.slots - 60 - 30 * b :] = PAD_POSITION
            q[b, -1 - b :] = PAD_POSITION
        q[:, 0] = 3
    if case.layout == "future":
        kv += length
    return {"q_positions": q.astype(np.int32), "kv_positions": kv.astype(np.int32)}


@functools.cache
def expected(case: Case) -> dict[str, np.ndarray]:
    """`out` and `lse` in float64, of the entries as the cache stores them."""
    given = {name: x.astype(np.float64) for name, x in arrays(case).items()}
    q, k, v = given["q"], given["k"], given["v"]
    if "k_scale" in given:
        k, v = (x * given[f"{n}_scale"].swapaxes(1, 2)[..., None] for n, x in (("k", k), ("v", v)))
    group = case.heads // case.kv_heads
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    s = np.einsum("btnh,bsnh->btns", q, k) * scale
    if case.soft_cap is not None:
        s = case.soft_cap * np.tanh(s / case.soft_cap)
    q_pos, kv_pos = given["q_positions"][:, :, None], given["kv_positions"][:, None, :]
    seen = (q_pos < PAD_POSITION) & (kv_pos <= q_pos)
    if case.window is not None:
        seen &= q_pos - kv_pos < case.window
    s = np.where(seen[:, :, None], s, -np.inf)
    if case.sinks:
        sinks = np.broadcast_to(given["sinks"][:, None], (*s.shape[:3], 1))
        s, v = np.concatenate([s, sinks], -1), np.pad(v, [(0, 0), (0, 1), (0, 0), (0, 0)])
    high = s.max(-1, keepdims=True)
    p = np.exp(s - np.where(np.isneginf(high), 0, high))
    total = p.sum(-1)
    alive = total > 0
    safe = np.where(alive, total, 1)
    out = np.einsum("btns,bsnh->btnh", p / safe[..., None], v)
    lse = np.where(alive, np.log(safe) + np.where(alive, high[..., 0], 0), -np.inf)
    return {"out": out, "lse": lse}


def program(implementation: str, case: Case):
    """`(fn, given)`: `fn(given)` is what `expected` gives.

    `out` is in float32, so that no last rounding hides what was lost before.
    """
    options: dict[str, Any] = dict(window=case.window, soft_cap=case.soft_cap, scale=case.scale)
    options |= dict(out_dtype=jnp.float32, implementation=implementation)

    def attend(given):
        out, lse = decode_attention(**given, **options)
        return {"out": out, "lse": lse}

    given = arrays(case)
    given = given if case.page is None else paged(given, case.page)
    if case.layers is not None:
        cache = {name: x for name, x in given.items() if name in CACHE}
        stacks = {name: np.stack([x[::-1]] * (case.layers - 1) + [x]) for name, x in cache.items()}
        given = given | stacks | {"layer": np.asarray(case.layers - 1, np.int32)}
    return attend, {name: jnp.asarray(x) for name, x in given.items()}


def paged(given: dict[str, np.ndarray], page: int) -> dict[str, np.ndarray]:
    """Deal the slots to pages of a pool, in any order; pages that nobody has are not zero."""
    batch, slots = given["kv_positions"].shape
    count = -(-slots // page)
    rng = np.random.default_rng(2)
    pages = rng.permutation(batch * count + 3)[: batch * count].reshape(batch, count)
    behind = (0, count * page - slots)
    positions = np.pad(given["kv_positions"], [(0, 0), behind], constant_values=PAD_POSITION)
    dealt = given | {"pages": pages.astype(np.int32), "kv_positions": positions}
    for name in CACHE & given.keys():
        x, axis = given[name], 2 if name.endswith("scale") else 1
        x = np.pad(x, [behind if i == axis else (0, 0) for i in range(x.ndim)])
        x = np.moveaxis(x.reshape(*x.shape[:axis], count, page, *x.shape[axis + 1 :]), axis, 1)
        integers = np.issubdtype(x.dtype, np.integer)
        pool = np.full((batch * count + 3, *x.shape[2:]), 99 if integers else np.nan, x.dtype)
        pool[pages] = x
        dealt[name] = pool
    return dealt


@functools.cache
def run(implementation: str, case: Case) -> list[dict[str, np.ndarray]]:
    """Run the case twice."""
    fn, given = program(implementation, case)
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    step = jax.jit(fn, compiler_options=quick)
    return [{name: np.asarray(x) for name, x in step(given).items()} for _ in range(2)]
