# SPDX-License-Identifier: Apache-2.0
"""Attention as a paper writes it: the whole score matrix in memory.

A first-class implementation: what every other backend is tested against, in float64 where the
caller enables it, and the fastest one for short sequences on CPU.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.online_softmax import merge


def _scores(q, k, soft_cap, scale):
    """Score q `[B, T, N, H]` against k `[B, S, K, H]`, N = K * G: `[B, K, G, T, S]`."""
    b, t, n, h = q.shape
    q = q.reshape(b, t, k.shape[2], n // k.shape[2], h)
    acc = np.promote_types(q.dtype, np.float32)
    s = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=acc) * scale
    return s if soft_cap is None else soft_cap * jnp.tanh(s / soft_cap)


def forward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, *, mask, soft_cap, scale, carry, out_dtype):
    b, t, n, _ = q.shape
    s = _scores(q, k, soft_cap, scale)
    visible = mask.visible(q_pos, kv_pos, q_seg, kv_seg)[:, None, None]
    s = jnp.where(visible, s, -jnp.inf)
    lse = jax.nn.logsumexp(s, axis=-1)
    # a row with nothing to see has lse = -inf: shift by 0 there, so that exp(-inf) = 0 and not NaN
    p = jnp.exp(s - jnp.where(jnp.isneginf(lse), 0.0, lse)[..., None])
    out = jnp.einsum("bkgts,bskh->btkgh", p.astype(v.dtype), v, preferred_element_type=s.dtype)
    part = out.reshape(b, t, n, v.shape[-1]), _rows(lse, b, t, n)
    out, lse = part if carry is None else merge(carry, part)
    return out.astype(out_dtype), lse


def _rows(x, b, t, n):
    return x.reshape(b, n, t).swapaxes(1, 2)


def backward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, lse, dout, delta, *, mask, soft_cap, scale):
    b, t, n, h = q.shape
    kv_heads = k.shape[2]
    group = (b, t, kv_heads, n // kv_heads)
    acc = np.promote_types(q.dtype, np.float32)
    s = _scores(q, k, soft_cap, scale)
    visible = mask.visible(q_pos, kv_pos, q_seg, kv_seg)[:, None, None]

    def per_row(x):  # [B, T, N] -> [B, K, G, T, 1]
        return x.reshape(group).transpose(0, 2, 3, 1)[..., None]

    shift = per_row(jnp.where(jnp.isneginf(lse), 0.0, lse))
    p = jnp.where(visible, jnp.exp(jnp.where(visible, s, -jnp.inf) - shift), 0.0)
    do = dout.reshape(*group, v.shape[-1])
    dv = jnp.einsum("bkgts,btkgh->bskh", p.astype(do.dtype), do, preferred_element_type=acc)
    dp = jnp.einsum("btkgh,bskh->bkgts", do, v, preferred_element_type=acc)
    ds = p * (dp - per_row(delta)) * scale
    if soft_cap is not None:
        ds = ds * (1 - (s / soft_cap) ** 2)
    ds = ds.astype(q.dtype)
    dq = jnp.einsum("bkgts,bskh->btkgh", ds, k, preferred_element_type=acc).reshape(q.shape)
    dk = jnp.einsum("bkgts,btkgh->bskh", ds, q.reshape(*group, h), preferred_element_type=acc)
    return dq, dk, dv
