# SPDX-License-Identifier: Apache-2.0
"""Attention of a few queries over a cache as a paper writes it: every score in memory.

A quantized entry is `value * scale`, one scale a token and head: it multiplies the score of a key
and the weight of a value, so that the products are of the stored values, which bfloat16 holds.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention import rows


def forward(q, cache, layer, pages, q_pos, kv_pos, *, mask, soft_cap, scale):
    """`(out, lse)` in float32 (float64 for float64)."""
    b, t, n, h = q.shape
    *_, k, v, k_scale, v_scale = rows.whole(cache, layer, pages)
    kv_heads = k.shape[2]
    acc = np.promote_types(q.dtype, np.float32)
    q = q.reshape(b, t, kv_heads, n // kv_heads, h)
    s = jnp.einsum("btkgh,bskh->bkgts", q, k.astype(q.dtype), preferred_element_type=acc) * scale
    if k_scale is not None:
        s *= _per_key(k_scale, acc)
    if soft_cap is not None:
        s = soft_cap * jnp.tanh(s / soft_cap)
    s = jnp.where(mask.visible(q_pos, kv_pos)[:, None, None], s, -jnp.inf)
    lse = jax.nn.logsumexp(s, axis=-1)
    # a row with nothing to see has lse = -inf: shift by 0 there, so that exp(-inf) = 0 and not NaN
    p = jnp.exp(s - jnp.where(jnp.isneginf(lse), 0.0, lse)[..., None])
    if v_scale is not None:
        p *= _per_key(v_scale, acc)
    p, v = p.astype(q.dtype), v.astype(q.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", p, v, preferred_element_type=acc)
    return out.reshape(b, t, n, v.shape[-1]), lse.reshape(b, n, t).swapaxes(1, 2)


def _per_key(x, dtype):
    """Broadcast over queries: `[B, K, S] -> [B, K, 1, 1, S]`."""
    return x.astype(dtype)[:, :, None, None]
