# SPDX-License-Identifier: Apache-2.0
"""Blockwise attention in plain XLA: O(T) memory, blocks with nothing to see are skipped.

The default on CPU. Rows of the `G` query heads that share a KV head are stacked, so a block is
one `[G * block_q, H] x [H, block_k]` product per KV head.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.flash_attention.mask import NO_POSITION, PAD_POSITION, bounds

BLOCK, LEAST_BLOCK = 512, 128
SKIP, FULL, PARTIAL = 0, 1, 2


def forward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, *, mask, soft_cap, scale, carry, out_dtype):
    b, t, n, _ = q.shape
    block = _block(mask, max(t, k.shape[1]))
    queries = _query_blocks(q, q_pos, q_seg, k.shape[2], block)
    if carry is not None:
        for name, x in (("out", carry[0]), ("lse", carry[1][..., None])):
            queries[name] = _query_blocks(x, q_pos, None, k.shape[2], block)["q"]
    keys = _key_blocks(k, v, kv_pos, kv_seg, block)
    kinds = _block_kinds(queries, keys, mask)
    acc_dtype = np.promote_types(q.dtype, np.float32)

    def one_query_block(args):
        query, kinds = args

        def step(j, carry):
            key = jax.tree.map(lambda x: x[j], keys)
            branches = [
                lambda query, key, carry: carry,
                lambda query, key, carry: _attend_block(query, key, carry, None, soft_cap, scale),
                lambda query, key, carry: _attend_block(query, key, carry, mask, soft_cap, scale),
            ]
            return lax.switch(kinds[j], branches, query, key, carry)

        rows = query["q"].shape[:-1]
        start = _start(query, rows, v.shape[-1], acc_dtype)
        first, last = _span(kinds)
        high, total, acc = lax.fori_loop(first, last, step, start)
        nothing = total == 0
        out = acc / jnp.where(nothing, 1.0, total)[..., None]
        return out.astype(out_dtype), jnp.where(nothing, -jnp.inf, high + jnp.log(total))

    out, lse = lax.map(one_query_block, (queries, kinds))
    return _rows(out, b, t, n), _rows(lse[..., None], b, t, n)[..., 0]


def backward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, lse, dout, delta, *, mask, soft_cap, scale):
    b, t, n, _ = q.shape
    kv_heads, block = k.shape[2], _block(mask, max(t, k.shape[1]))
    queries = _query_blocks(q, q_pos, q_seg, kv_heads, block)
    shift = jnp.where(jnp.isneginf(lse), 0.0, lse)
    for name, x in (("dout", dout), ("lse", shift[..., None]), ("delta", delta[..., None])):
        queries[name] = _query_blocks(x, q_pos, None, kv_heads, block)["q"]
    keys = _key_blocks(k, v, kv_pos, kv_seg, block)
    kinds = _block_kinds(queries, keys, mask)
    acc_dtype = np.promote_types(q.dtype, np.float32)

    def one_key_block(dq, args):
        key, kinds = args
        zeros = jnp.zeros(key["k"].shape, acc_dtype), jnp.zeros(key["v"].shape, acc_dtype)

        def step(i, carry):
            dq, dk, dv = carry
            query = jax.tree.map(lambda x: x[i], queries)
            branches = [
                lambda query: (jnp.zeros(query["q"].shape, acc_dtype), *zeros),
                lambda query: _block_gradients(query, key, None, soft_cap, scale),
                lambda query: _block_gradients(query, key, mask, soft_cap, scale),
            ]
            # dq stays outside the switch: a conditional would copy it
            more_dq, more_dk, more_dv = lax.switch(kinds[i], branches, query)
            return dq.at[i].add(more_dq), dk + more_dk, dv + more_dv

        first, last = _span(kinds)
        dq, dk, dv = lax.fori_loop(first, last, step, (dq, *zeros))
        return dq, (dk, dv)

    dq = jnp.zeros(queries["q"].shape, acc_dtype)
    dq, (dk, dv) = lax.scan(one_key_block, dq, (keys, kinds.T))
    return _rows(dq, b, t, n), _columns(dk, k), _columns(dv, v)


def _start(query, rows, width, dtype):
    """The `(high, total, acc)` before the first key: empty, or the carry."""
    if "lse" not in query:
        empty = jnp.full(rows, -jnp.inf, dtype), jnp.zeros(rows, dtype)
        return *empty, jnp.zeros((*rows, width), dtype)
    high = query["lse"][..., 0].astype(dtype)
    total = jnp.where(jnp.isneginf(high), 0.0, 1.0).astype(dtype)
    return high, total, query["out"].astype(dtype) * total[..., None]


def _attend_block(query, key, carry, mask, soft_cap, scale):
    high, total, acc = carry
    s, _ = _scores(query, key, mask, soft_cap, scale)
    new_high = jnp.maximum(high, s.max(-1))
    shift = jnp.where(jnp.isneginf(new_high), 0.0, new_high)
    p = jnp.exp(s - shift[..., None])
    keep = jnp.exp(high - shift)
    acc = acc * keep[..., None] + _dot("bkrs,bksh->bkrh", p.astype(key["v"].dtype), key["v"])
    return new_high, total * keep + p.sum(-1), acc


def _block_gradients(query, key, mask, soft_cap, scale):
    s, tanh = _scores(query, key, mask, soft_cap, scale)
    p = jnp.exp(s - query["lse"])
    do = query["dout"]
    dv = _dot("bkrs,bkrh->bksh", p.astype(do.dtype), do)
    dp = _dot("bkrh,bksh->bkrs", do, key["v"])
    ds = p * (dp - query["delta"]) * scale
    if soft_cap is not None:
        ds = ds * (1 - tanh**2)
    ds = ds.astype(do.dtype)
    return _dot("bkrs,bksh->bkrh", ds, key["k"]), _dot("bkrs,bkrh->bksh", ds, query["q"]), dv


def _scores(query, key, mask, soft_cap, scale):
    s = _dot("bkrh,bksh->bkrs", query["q"], key["k"]) * scale
    tanh = None
    if soft_cap is not None:
        tanh = jnp.tanh(s / soft_cap)
        s = soft_cap * tanh
    if mask is not None:
        seen = mask.visible(query["pos"], key["pos"], query.get("seg"), key.get("seg"))
        b, kv_heads, rows, keys = s.shape
        s = s.reshape(b, kv_heads, -1, *seen.shape[1:])
        s = jnp.where(seen[:, None, None], s, -jnp.inf).reshape(b, kv_heads, rows, keys)
    return s, tanh


def _dot(equation, x, y):
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    acc = np.promote_types(x.dtype, np.float32)
    return jnp.einsum(equation, x, y, precision=exact, preferred_element_type=acc)


def _block_kinds(queries, keys, mask):
    """SKIP, FULL or PARTIAL for each (query block, key block): `[query blocks, key blocks]`."""
    q, kv = queries["pos"], keys["pos"]
    q_low, q_high = (x[:, None] for x in bounds(q, pad=NO_POSITION))
    kv_low, kv_high = (x[None] for x in bounds(kv, pad=PAD_POSITION))
    some = mask.may_see(q_low, q_high, kv_low, kv_high)
    q_low, q_high = _extremes(q, 1)
    kv_low, kv_high = _extremes(kv, 0)
    every = mask.sees_all(q_low, q_high, kv_low, kv_high)
    if "seg" in queries:
        (q_low, q_high), (kv_low, kv_high) = _extremes(queries["seg"], 1), _extremes(keys["seg"], 0)
        some &= (q_low <= kv_high) & (kv_low <= q_high)
        every &= (q_low == kv_high) & (kv_low == q_high)
    return jnp.where(every.all(-1), FULL, jnp.where(some.any(-1), PARTIAL, SKIP))


def _span(kinds):
    """The first block that is not skipped, and one past the last."""
    needed = kinds != SKIP
    end = kinds.shape[0] - jnp.argmax(needed[::-1])
    return jnp.argmax(needed), jnp.where(needed.any(), end, 0)


def _extremes(x, axis):
    """`(min, max)` over a block of `[blocks, B, block]`, to broadcast against the other side's."""
    return jnp.expand_dims(x.min(-1), axis), jnp.expand_dims(x.max(-1), axis)


def _split(x, block, value):
    """`[B, T, ...] -> [blocks, B, block, ...]`, padded with `value`."""
    pad = -x.shape[1] % block
    x = jnp.pad(x, [(0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)], constant_values=value)
    return x.reshape(x.shape[0], -1, block, *x.shape[2:]).swapaxes(0, 1)


def _block(mask, tokens):
    """Tokens of a block: few where a window is narrow or a shard short.

    Blocks outside of a window are skipped, and one that straddles two pieces of a zigzag shard is
    neither skipped nor free of the mask.
    """
    most = BLOCK if mask.window is None else min(BLOCK, mask.window)
    return max(LEAST_BLOCK, min(most, tokens // 4))


def _query_blocks(x, positions, segment_ids, kv_heads, block):
    block = min(block, x.shape[1])
    blocks = _split(x, block, 0)  # [blocks, B, block, N, H]
    count, b, _, n, h = blocks.shape
    blocks = blocks.reshape(count, b, block, kv_heads, n // kv_heads, h).transpose(0, 1, 3, 4, 2, 5)
    out = {
        "q": blocks.reshape(count, b, kv_heads, -1, h),
        "pos": _split(positions, block, NO_POSITION),
    }
    if segment_ids is not None:
        out["seg"] = _split(segment_ids, block, -1)
    return out


def _key_blocks(k, v, positions, segment_ids, block):
    block = min(block, k.shape[1])
    out = {name: _split(x, block, 0).swapaxes(2, 3) for name, x in (("k", k), ("v", v))}
    out["pos"] = _split(positions, block, PAD_POSITION)
    if segment_ids is not None:
        out["seg"] = _split(segment_ids, block, -2)
    return out


def _rows(x, b, t, n):
    """`[blocks, B, K, G * block, H] -> [B, T, N, H]`."""
    count, _, kv_heads, _, h = x.shape
    x = x.reshape(count, b, kv_heads, n // kv_heads, -1, h).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(b, -1, n, h)[:, :t]


def _columns(x, like):
    """`[blocks, B, K, block, H] -> [B, S, K, H]`."""
    count, b, kv_heads, block, h = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(b, count * block, kv_heads, h)[:, : like.shape[1]]
