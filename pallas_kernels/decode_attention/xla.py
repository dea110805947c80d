# SPDX-License-Identifier: Apache-2.0
"""Decode attention in plain XLA, a block of slots at a time: the default on CPU.

Memory beside the cache is one block's scores. Blocks that no query of any sequence sees are
skipped; the cache is sliced where it lies, with all its axes: of an array that was just written
and is then read in another shape, XLA on a CPU makes two.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.decode_attention import rows
from pallas_kernels.dispatch import target_platform
from pallas_kernels.flash_attention.mask import PAD_POSITION

BLOCK = 1024


class Cache(NamedTuple):
    """Keys, values and their scales as they come, and which layer and pages of them are read."""

    layer: Any
    pages: Any
    k: Any
    v: Any
    k_scale: Any
    v_scale: Any


def forward(q, cache, layer, pages, q_pos, kv_pos, *, mask, soft_cap, scale):
    t = q.shape[1]
    cache = Cache(layer, pages, *cache)
    kv_heads, slots = cache.k.shape[-2], kv_pos.shape[1]
    acc = np.promote_types(q.dtype, np.float32)
    # a CPU multiplies float32 faster, and the products of bfloat16 numbers are float32 numbers
    compute = acc if target_platform() == "cpu" else q.dtype
    block = _block(cache)
    queries = rows.together(q, kv_heads).astype(compute)
    row_pos = rows.positions(q_pos, queries.shape[2] // t)
    order, count = _needed(mask, q_pos, kv_pos, block)

    def step(index, carry):
        high, total, out = carry
        begin = order[index] * block
        start = jnp.minimum(begin, slots - block)  # the last block ends where the cache does

        at = functools.partial(_slots, cache, start=start, block=block)
        s = _dot("bkrh,bskh->bkrs", queries, at(cache.k).astype(q.dtype).astype(compute)) * scale
        if cache.k_scale is not None:
            s *= _per_key(at(cache.k_scale, axis=2), acc)
        if soft_cap is not None:
            s = soft_cap * jnp.tanh(s / soft_cap)
        fresh = start + jnp.arange(block, dtype=jnp.int32) >= begin
        pos = jnp.where(fresh, lax.dynamic_slice_in_dim(kv_pos, start, block, 1), PAD_POSITION)
        s = jnp.where(mask.visible(row_pos, pos)[:, None], s, -jnp.inf)
        new_high = jnp.maximum(high, s.max(-1))
        shift = jnp.where(jnp.isneginf(new_high), 0.0, new_high)
        p = jnp.exp(s - shift[..., None])
        keep = jnp.exp(high - shift)
        total = total * keep + p.sum(-1)
        if cache.v_scale is not None:
            p *= _per_key(at(cache.v_scale, axis=2), acc)
        values = at(cache.v).astype(q.dtype).astype(compute)
        out = out * keep[..., None] + _dot("bkrs,bskh->bkrh", p.astype(compute), values)
        return new_high, total, out

    shape = queries.shape[:3]
    start = jnp.full(shape, -jnp.inf, acc), jnp.zeros(shape, acc)
    high, total, out = lax.fori_loop(
        0, count, step, (*start, jnp.zeros((*shape, cache.v.shape[-1]), acc))
    )
    nothing = total == 0
    out = out / jnp.where(nothing, 1.0, total)[..., None]
    lse = jnp.where(nothing, -jnp.inf, high + jnp.log(total))
    return rows.apart(out, t), rows.apart(lse, t)


def _block(cache):
    """Slots of a block: of paged sequences, whole pages."""
    page = cache.k.shape[-3]
    if cache.pages is None:
        return min(BLOCK, page)
    return page * min(max(1, BLOCK // page), cache.pages.shape[1])


def _slots(cache, x, *, start, block, axis=1):
    """Slots `[start, start + block)` of every sequence; `axis` of x, the cache's, is theirs."""
    layer = () if cache.layer is None else (cache.layer,)
    if cache.pages is None:
        own = x.shape[len(layer) :]
        at, sizes = [0] * len(own), list(own)
        at[axis], sizes[axis] = start, block
        sliced = lax.dynamic_slice(x, (*layer, *at), (*(1 for _ in layer), *sizes))
        return sliced.reshape(sizes)
    page = x.shape[len(layer) + axis]
    pages = lax.dynamic_slice_in_dim(cache.pages, start // page, block // page, 1)
    parts = jnp.moveaxis(x[(*layer, pages)], 1, axis)  # the pages beside their slots
    return parts.reshape(*parts.shape[:axis], block, *parts.shape[axis + 2 :])


def _needed(mask, q_pos, kv_pos, block):
    """List the blocks that any sequence needs, in order, and their number."""
    order, counts = rows.block_list(mask, q_pos, kv_pos, block)
    column = jnp.arange(order.shape[1], dtype=jnp.int32)
    listed = column < counts[:, 1:]
    needed = jnp.put_along_axis(jnp.zeros_like(listed), order, listed, axis=1, inplace=False).any(0)
    place = jnp.where(needed, jnp.cumsum(needed) - 1, order.shape[1])  # out of bounds: dropped
    return jnp.zeros_like(column).at[place].set(column, mode="drop"), needed.sum()


def _per_key(x, dtype):
    """Broadcast over queries: `[B, K, block] -> [B, K, 1, block]`."""
    return x.astype(dtype)[:, :, None]


def _dot(equation, x, y):
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    acc = np.promote_types(x.dtype, np.float32)
    return jnp.einsum(equation, x, y, precision=exact, preferred_element_type=acc)
