# SPDX-License-Identifier: Apache-2.0
"""The attention that every contender computes, and its result in float64 from the definition."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable

import ml_dtypes
import numpy as np

RANKS, HEADS, HEAD_DIM = 4, 4, 64
NAMES = ("out", "dq", "dk", "dv")


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute it on RANKS ranks.

    `forward()` and `both()` run it; `result()` gives what NAMES says, in natural order (the
    gradients where there are any), and `alone()` the output of the same code on one device.
    """

    name: str
    forward: Callable[[], object]
    both: Callable[[], object] | None
    result: Callable[[], dict[str, np.ndarray]]
    alone: Callable[[], np.ndarray] | None
    dtype: str = "float32"
    note: str = ""

    @property
    def about(self) -> dict:
        passes = ["forward"] if self.both is None else ["forward", "both"]
        return {"name": self.name, "dtype": self.dtype, "passes": passes, "note": self.note}


def inputs(tokens: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    """q, k, v and the cotangent of the output, float32 `[1, tokens, HEADS, HEAD_DIM]`.

    With `dtype="bfloat16"` they are numbers that bfloat16 holds.
    """
    random = np.random.default_rng(0)
    shape = 1, tokens, HEADS, HEAD_DIM
    arrays = {x: random.standard_normal(shape, np.float32) for x in ("q", "k", "v", "dout")}
    if dtype == "float32":
        return arrays
    return {name: x.astype(ml_dtypes.bfloat16).astype(np.float32) for name, x in arrays.items()}


def exact(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """NAMES of causal attention, in float64."""
    q, k, v, dout = (arrays[x][0].astype(np.float64) for x in ("q", "k", "v", "dout"))
    tokens, heads, scale = *q.shape[:2], HEAD_DIM**-0.5
    results = {name: np.empty((1, *q.shape)) for name in NAMES}
    later = np.triu(np.ones((tokens, tokens), bool), 1)
    for h in range(heads):
        s = scale * q[:, h] @ k[:, h].T
        s[later] = -np.inf
        p = np.exp(s - s.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        dp = dout[:, h] @ v[:, h].T
        ds = p * (dp - (p * dp).sum(1, keepdims=True)) * scale
        parts = p @ v[:, h], ds @ k[:, h], ds.T @ q[:, h], p.T @ dout[:, h]
        for name, x in zip(NAMES, parts, strict=True):
            results[name][0, :, h] = x
    return results


def differing(one: np.ndarray, other: np.ndarray) -> float:
    """Share of elements whose bits are not the same."""
    bits = [np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}") for x in (one, other)]
    return float(np.mean(bits[0] != bits[1]))


def serve(contenders: Iterable[Contender], *, speaks=True, barrier: Callable = lambda: None):
    """Name the contenders, then do what each line of stdin asks: `forward`, `both` or `result`.

    Answers are lines of JSON, of the rank that `speaks`.
    """
    by_name = {x.name: x for x in contenders}

    def say(**answer):
        if speaks:
            print(json.dumps(answer), flush=True, file=sys.__stdout__)

    say(contenders=[x.about for x in by_name.values()])
    for line in sys.stdin:
        command, name, *where = line.rstrip("\n").split("\t")
        try:
            if command == "result":
                say(differing=_result(by_name[name], where[0] if speaks else None))
                continue
            barrier()
            start = time.perf_counter()
            getattr(by_name[name], command)()
            barrier()
            say(seconds=time.perf_counter() - start)
        except Exception as error:  # a contender that fails is a row that says why
            say(error=f"{type(error).__name__}: {str(error)[:200]}")


def _result(one: Contender, path: str | None) -> float | None:
    """Write the result into a file; the share of bits that differ from one device's output."""
    result = one.result()
    if path is None:
        return None
    np.savez(path, **{name: x.astype(np.float32) for name, x in result.items()})
    return differing(result["out"], one.alone()) if one.alone else None
