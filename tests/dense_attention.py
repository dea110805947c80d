# SPDX-License-Identifier: Apache-2.0
"""Attention and its gradients in float64 NumPy, from the definition. Imports nothing of ours."""

import numpy as np

PAD = 2**31 - 1


def dense(
    q, k, v, positions, *, segment_ids=None, causal=True, window=None, sinks=None, soft_cap=None,
    scale=None, dout=None,
):  # fmt: skip
    """`out`; with `dout` its gradients too: `(out, dq, dk, dv, dsinks)`."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k_each, v_each = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    score = scale * np.einsum("btnh,bsnh->bnts", q, k_each)
    slope = 1.0
    if soft_cap is not None:
        score = soft_cap * np.tanh(score / soft_cap)
        slope = 1 - (score / soft_cap) ** 2
    seen = _seen(np.asarray(positions, np.int64), segment_ids, causal, window)[:, None]
    sink = np.full(q.shape[2], -np.inf) if sinks is None else np.asarray(sinks, np.float64)
    weight = np.where(seen, np.exp(score), 0)
    total = weight.sum(-1, keepdims=True) + np.exp(sink)[:, None, None]
    p = weight / np.where(total == 0, 1, total)
    out = np.einsum("bnts,bsnh->btnh", p, v_each)
    if dout is None:
        return out
    dout = np.asarray(dout, np.float64)
    dp = np.einsum("btnh,bsnh->bnts", dout, v_each)
    mean = (p * dp).sum(-1, keepdims=True)
    dscore = p * (dp - mean) * slope * scale
    p_sink = np.exp(sink)[:, None, None] / np.where(total == 0, 1, total)
    dsinks = -(p_sink * mean).sum((0, 2, 3))

    def per_kv_head(x):
        return x.reshape(*x.shape[:2], k.shape[2], group, -1).sum(3)

    dq = np.einsum("bnts,bsnh->btnh", dscore, k_each)
    dk = per_kv_head(np.einsum("bnts,btnh->bsnh", dscore, q))
    dv = per_kv_head(np.einsum("bnts,btnh->bsnh", p, dout))
    return out, dq, dk, dv, dsinks


def _seen(positions, segment_ids, causal, window):
    real = positions != PAD
    distance = positions[:, :, None] - positions[:, None, :]
    seen = real[:, :, None] & real[:, None, :]
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= np.abs(distance) < window
    if segment_ids is not None:
        seen &= segment_ids[:, :, None] == segment_ids[:, None, :]
    return seen
