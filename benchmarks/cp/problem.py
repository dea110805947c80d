# SPDX-License-Identifier: Apache-2.0
"""The attention that every contender computes, and its result in float64 from the definition."""

import ml_dtypes
import numpy as np

RANKS, HEADS, HEAD_DIM = 4, 4, 64
NAMES = ("out", "dq", "dk", "dv")


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
