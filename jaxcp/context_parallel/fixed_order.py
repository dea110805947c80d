# SPDX-License-Identifier: Apache-2.0
"""The same bits from 1, 2, 4 and 8 shards: fixed blocks, combined in a fixed order.

The sequence is cut into 16 pieces whatever the number of shards. Every pair of pieces is computed
by one program of one shape, partial results stay in float32, and each sum runs over pieces in
natural order: over keys for `out` and dQ, over queries for dK and dV.

What it costs: K and V are gathered, and in the backward pass q, dout, lse and delta as well, to
the memory of `AllGather`; dQ and dK/dV each compute the scores again; grouped heads are repeated
on the device (not on the wire). Pairs with nothing to see are skipped, which changes no bit.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import PAD_POSITION
from pallas_kernels.flash_attention import (
    NO_POSITION,
    attention_backward,
    attention_forward,
    row_delta,
)
from pallas_kernels.flash_attention.mask import bounds
from pallas_kernels.online_softmax import merge

PIECES = 16


def attend_in_fixed_order(
    q, k, v, q_pos, kv_pos, q_seg, kv_seg, *, layout, axis_name, mask, **options
):
    """`(out, lse)` of local queries over all shards' keys. Inside shard_map.

    Raises:
      ValueError: shards or tokens that 16 pieces of consecutive tokens do not fit.
    """
    where = axis_name, _pieces(layout, lax.axis_size(axis_name), q.shape[1], kv_pos.shape[1])
    if q_seg is None:
        q_seg, kv_seg = jnp.zeros_like(q_pos), jnp.zeros_like(kv_pos)
    static = tuple({"mask": mask, **options}.items())
    return _attend(where, static, q, k, v, q_pos, kv_pos, q_seg, kv_seg)


def _pieces(layout, shards, tokens, keys):
    """`[shards][pieces of a shard]`: number of each piece, in natural order."""
    total = shards * tokens
    whole = tokens == keys and PIECES % shards == 0 and total % PIECES == 0
    rows = np.zeros((0, 0), int)
    if whole and total == layout.padded_length(total, shards):
        rows = layout.order(total, shards).reshape(PIECES, -1)
    if not rows.size or (rows[:, -1] - rows[:, 0] != rows.shape[1] - 1).any():
        raise ValueError(
            f"reproducible attention needs 1, 2, 4, 8 or 16 shards, a multiple of {PIECES} tokens "
            f"and Zigzag() (to 8 shards) or Contiguous(); got {shards} shards of {tokens} tokens, "
            f"{layout}"
        )
    numbers = rows[:, 0] // rows.shape[1]
    return tuple(map(tuple, numbers.reshape(shards, -1).tolist()))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(where, options, q, k, v, *ids):
    q_pos, kv_pos, q_seg, kv_seg = ids
    keys = _all(where, (*_repeated(q, k, v), kv_pos, kv_seg))

    def row(mine):
        q, pos, seg = mine
        acc = np.promote_types(q.dtype, np.float32)
        start = jnp.zeros((*q.shape[:3], v.shape[3]), acc), jnp.full(q.shape[:3], -jnp.inf, acc)

        def more(done, other):
            k, v, kv_pos, kv_seg = other

            def part():
                arrays = q, k, v, pos, kv_pos, seg, kv_seg
                return merge(done, attention_forward(*arrays, out_dtype=acc, **dict(options)))

            return lax.cond(_visible(options, pos, kv_pos), part, lambda: done), None

        out, lse = lax.scan(more, start, keys)[0]
        return out.astype(q.dtype), lse

    return _joined(lax.map(row, _own(where, (q, q_pos, q_seg))))


def _forward(where, options, *arrays):
    out, lse = _attend(where, options, *arrays)
    return (out, lse), (*arrays, out, lse)


def _backward(where, options, saved, grads):
    q, k, v, q_pos, kv_pos, q_seg, kv_seg, out, lse = saved
    dout, dlse = grads
    # in pieces too: another shape would be another order of additions
    delta = _joined(lax.map(lambda x: row_delta(*x), _own(where, (out, dout, dlse))))
    queries = q, q_pos, q_seg, lse, dout, delta
    keys = (*_repeated(q, k, v), kv_pos, kv_seg)

    def pair(query, key):
        q, q_pos, q_seg, lse, dout, delta = query
        k, v, kv_pos, kv_seg = key
        arrays = q, k, v, q_pos, kv_pos, q_seg, kv_seg, lse, dout, delta
        return attention_backward(*arrays, **dict(options))

    def summed(wanted, mine, others, swap):
        """Over `others` in order: the entries `wanted` of the pair's `(dq, dk, dv)`."""

        def one(own):
            def more(total, other):
                both = (other, own) if swap else (own, other)

                def part():
                    found = pair(*both)
                    return jax.tree.map(jnp.add, total, tuple(found[i] for i in wanted))

                seen = _visible(options, both[0][1], both[1][2])
                return lax.cond(seen, part, lambda: total), None

            shapes = jax.eval_shape(pair, *((first, own) if swap else (own, first)))
            start = tuple(jnp.zeros(shapes[i].shape, shapes[i].dtype) for i in wanted)
            return lax.scan(more, start, others)[0]

        first = jax.tree.map(lambda x: x[0], others)
        return _joined(lax.map(one, mine))

    (dq,) = summed((0,), _own(where, queries), _all(where, keys), swap=False)
    dk, dv = summed((1, 2), _own(where, keys), _all(where, queries), swap=True)
    dk, dv = (
        x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[3]).sum(3).astype(like.dtype)
        for x, like in ((dk, k), (dv, v))
    )
    return dq.astype(q.dtype), dk, dv, None, None, None, None


_attend.defvjp(_forward, _backward)


def _repeated(q, k, v):
    """One KV head for each query head, so that gradients add up outside of the kernel."""
    group = q.shape[2] // k.shape[2]
    return jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)


def _own(where, tree):
    """Local `[B, t, ...]` as `[pieces, B, P, ...]`."""
    _, numbers = where
    count = len(numbers[0])
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0], count, -1, *x.shape[2:]), 1, 0), tree
    )


def _joined(tree):
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]), tree)


def _all(where, tree):
    """Every piece of the sequence, `[16, B, P, ...]`, in natural order."""
    axis_name, numbers = where
    order = np.argsort(np.reshape(numbers, -1))
    return jax.tree.map(
        lambda x: jnp.take(lax.all_gather(x, axis_name, tiled=True), order, axis=0),
        _own(where, tree),
    )


def _visible(options, q_pos, kv_pos):
    """Whether any query may see any key, of a piece each."""
    q_pos = jnp.where(q_pos == PAD_POSITION, NO_POSITION, q_pos)
    q, kv = bounds(q_pos, pad=NO_POSITION), bounds(kv_pos, pad=PAD_POSITION)
    return dict(options)["mask"].may_see(*q, *kv).any()
