# SPDX-License-Identifier: Apache-2.0
"""Sorts pairs of blocks, queries against keys: to skip, to see whole, or to see under a mask.

Plain `jax.numpy` that runs before a kernel, on arrays of one number a block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.mask import Mask, bounds


class Bounds(NamedTuple):
    """Least and greatest position of each block (real tokens, then all) and segment id."""

    real_min: jax.Array
    real_max: jax.Array
    min: jax.Array
    max: jax.Array
    segment_min: jax.Array
    segment_max: jax.Array


def pad_axis(x, size, axis, value=0):
    """Pad `axis` of `x` to `size`; `value="edge"` repeats the last entry."""
    if x.shape[axis] == size:
        return x
    widths = [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)]
    return (
        jnp.pad(x, widths, mode="edge")
        if value == "edge"
        else jnp.pad(x, widths, constant_values=value)
    )


def token_ids(positions, segment_ids, size, pad):
    """Stack positions, padded with `pad`, and segment ids if there are any: `[B, 1 or 2, size]`."""
    ids = [pad_axis(positions, size, 1, pad)]
    if segment_ids is not None:
        ids.append(pad_axis(segment_ids, size, 1, "edge"))
    return jnp.stack(ids, axis=1)


def block_bounds(ids, block, pad):
    """Make `Bounds` of `[B, blocks]` from `token_ids`; `pad`: the position that means no token."""
    split = ids.reshape(*ids.shape[:2], -1, block)
    positions, segments = split[:, 0], split[:, -1]
    real_min, real_max = bounds(positions, pad=pad)
    every = positions.min(-1), positions.max(-1)
    return Bounds(real_min, real_max, *every, segments.min(-1), segments.max(-1))


def visibility(mask: Mask, q: Bounds, kv: Bounds, segmented: bool):
    """Tell whether any query may see any key, and whether all see all: `(some, every)`."""
    some = mask.may_see(q.real_min, q.real_max, kv.real_min, kv.real_max)
    every = mask.sees_all(q.min, q.max, kv.min, kv.max)
    if segmented:
        some &= (q.segment_min <= kv.segment_max) & (kv.segment_min <= q.segment_max)
        every &= (q.segment_min == kv.segment_max) & (q.segment_max == kv.segment_min)
    return some, every


def visible(mask: Mask, q, kv):
    """Apply the mask to ids that broadcast: lists `[positions]` or `[positions, segment ids]`."""
    pairs = mask.sees_all(q[0], q[0], kv[0], kv[0])  # a pair is a block of one query and one key
    return pairs & (q[1] == kv[1]) if len(q) == 2 else pairs


MOST_PAIRS = 1 << 22  # pairs of blocks sorted at once; of more, some rows at a time


def block_lists(mask: Mask, q: Bounds, kv: Bounds, segmented: bool, *, along: str):
    """List the blocks that each block needs, those that need no mask first.

    Returns `order [B, rows, columns]` and `counts [B, rows, 2]`: entries `[0, counts[0])` of a row
    see everything, `[counts[0], counts[1])` need the mask, the rest must be skipped. A row is a
    query block and lists key blocks (`along="kv"`), or the other way round (`along="q"`). Beyond
    `MOST_PAIRS` `order` is int16 if its numbers fit: for 1M x 1M tokens it is large.
    """
    row_side, column_side = (q, kv) if along == "kv" else (kv, q)

    def lists(some_rows):
        sides = Bounds(*(x[:, :, None] for x in some_rows)), columns
        return _partition(*visibility(mask, *(sides if along == "kv" else sides[::-1]), segmented))

    columns = Bounds(*(x[:, None, :] for x in column_side))
    (batch, rows), width = row_side.min.shape, column_side.min.shape[1]
    at_once = max(1, MOST_PAIRS // (batch * width))
    if rows <= at_once:
        return lists(row_side)
    turns = -(-rows // at_once)

    def turn(some_rows):
        order, counts = lists(some_rows)
        return order.astype(jnp.int16 if width <= 1 << 15 else jnp.int32), counts

    split = [
        pad_axis(x, turns * at_once, 1, "edge").reshape(batch, turns, at_once).swapaxes(0, 1)
        for x in row_side
    ]
    found = jax.lax.map(turn, Bounds(*split))
    return tuple(x.swapaxes(0, 1).reshape(batch, -1, x.shape[-1])[:, :rows] for x in found)


def _partition(some, every):
    """Make the `block_lists` of booleans `[B, rows, columns]`."""
    partly = some & ~every
    before = jnp.stack([jnp.cumsum(x, axis=-1) for x in (every, partly, ~some)]) - 1
    full, visited = every.sum(-1, keepdims=True), some.sum(-1, keepdims=True)
    # a stable three-way partition; XLA's sort takes longer on a GPU than this
    place = jnp.where(every, before[0], jnp.where(partly, full + before[1], visited + before[2]))
    column = jax.lax.broadcasted_iota(jnp.int32, some.shape, 2)
    order = jnp.put_along_axis(jnp.zeros_like(column), place, column, axis=-1, inplace=False)
    return order, jnp.concatenate([full, visited], axis=-1).astype(jnp.int32)


def unsupported(name, q, v, *, dtypes=("float32", "bfloat16"), head_dim=256):
    """Raise NotImplementedError for a dtype or head dim that the backend has no path for."""
    widest = max(q.shape[-1], v.shape[-1])
    if q.dtype.name in dtypes and widest <= head_dim:
        return
    raise NotImplementedError(
        f"flash_attention {name}: {' or '.join(dtypes)} and head dims up to {head_dim}; got "
        f"{q.dtype} and head dims {q.shape[-1]} and {v.shape[-1]}; use implementation='xla' or "
        "'reference'"
    )
