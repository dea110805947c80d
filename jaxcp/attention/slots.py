# SPDX-License-Identifier: Apache-2.0
"""The slots of a cache: how they lie on devices, and where shards put new rows.

What layers keep is stacked: arrays have a leading axis of layers, `[L, B, S, ...]`, and new rows
are written into a layer of it in place.
"""

import numbers

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from pallas_kernels import PAD_POSITION

AXIS = "seq"
TOKENS, ROWS, SAME = P("data", AXIS), P("data"), P(None)
SHARDED, WHOLE = P("data", AXIS, "model", None), P("data", None, "model", None)

MAX_EXTEND = 64
"""Tokens of a short turn at most; slots that a shard has for pads beyond its share."""


def check_size(batch_size: int, max_len: int) -> None:
    """Raise ValueError where no cache of the mesh in scope has this size."""
    sizes = batch_size, max_len
    if not all(isinstance(n, numbers.Integral) and n >= 1 for n in sizes):
        raise ValueError(
            f"a cache needs batch_size >= 1 and max_len >= 1; got {batch_size} and {max_len}"
        )
    check_rows(batch_size)


def check_rows(batch_size: int) -> None:
    """Raise ValueError where the mesh in scope does not divide the rows."""
    shards = jax.sharding.get_abstract_mesh().shape.get("data", 1)
    if batch_size % shards:
        raise ValueError(
            f"rows must be a multiple of the mesh's data={shards}; got {batch_size} (a session "
            "has one). Give more rows, or make the mesh with data=1 and its devices along seq"
        )


def write_rows(stack, layer, new, lengths):
    """`stack [L, B, S, ...]` with rows `new [B, T, ...]` in its `layer`, behind those of `lengths
    [B]` tokens that this shard holds.

    Real rows come first. What would lie behind the last slot is not written: pads alone.
    """
    new, end = new.astype(stack.dtype), _fill(lengths)
    if stack.shape[1] > 1:
        return _scattered(stack, layer, new, end)
    width = new.shape[1]
    start = jnp.minimum(end[0], stack.shape[2] - width)
    old = lax.dynamic_slice(stack, _corner(layer, start, new), (1, *new.shape))[0, 0]
    kept = end[0] - start  # rows of `old` that stay, and as many of `new` that find no slot
    moved = lax.dynamic_slice_in_dim(jnp.concatenate([old, new[0]]), width - kept, width)
    stays = (jnp.arange(width) < kept).reshape(-1, *[1] * (new.ndim - 2))
    rows = jnp.where(stays, old, moved)
    return lax.dynamic_update_slice(stack, rows[None, None], _corner(layer, start, new))


def write_first(stack, layer, new, lengths):
    """`write_rows` where the layer is empty."""
    return lax.dynamic_update_slice(stack, new.astype(stack.dtype)[None], _corner(layer, 0, new))


def deal_rows(stack, layer, new, lengths, pad=0):
    """`stack [L, B, S, ...]` with those of the rows `new [B, T, ...]` that fall to this shard in
    its `layer`, behind what it holds.

    Every shard writes as many rows; those too many are pads, which the next tokens overwrite.
    """
    shards = _shards()
    rows = [(0, 0)] * new.ndim
    rows[1] = (0, -new.shape[1] % shards)
    new = jnp.pad(new.astype(stack.dtype), rows, constant_values=pad)
    dealt = new.reshape(new.shape[0], -1, shards, *new.shape[2:])
    if stack.shape[1] > 1:
        turn = ((_rank() - lengths) % shards).reshape(-1, *[1] * (dealt.ndim - 1))
        own = jnp.take_along_axis(dealt, turn, axis=2)[:, :, 0]
        return _scattered(stack, layer, own, _fill(lengths))
    turn = (_rank() - lengths[0]) % shards
    own = lax.dynamic_index_in_dim(dealt, turn, 2, keepdims=False)
    return lax.dynamic_update_slice(stack, own[None], _corner(layer, _fill(lengths[0]), own))


def write_pages(stack, layer, new, positions, pages):
    """`stack [L, P, page, ...]` with rows `new [B, T, ...]` in its `layer`: those that fall to this
    shard, in the pages of the shard that are a row's.

    The token at position p lies in slot `p % page` of its row's page `p // page`, which is on the
    shard `p // page % shards` and the next in its list.
    """
    page = stack.shape[2]
    there = positions != PAD_POSITION
    return _put_in_pages(stack, layer, new, positions // page, positions % page, there, pages)


def write_scales(stack, layer, new, positions, pages):
    """`write_pages` where slots come last, `stack [L, P, K, page]` and `new [B, T, K]`, of tokens
    that follow each other, in any order.

    Whole pages are written: where slots alone were, XLA on TPU would turn the stack and back.
    """
    page, line = stack.shape[3], jnp.arange(len(new))[:, None]
    most = positions.shape[1] // page + 2  # pages, the first and the last in part
    place = positions.min(1, keepdims=True) // page + jnp.arange(most)
    nth = jnp.where(positions == PAD_POSITION, most, positions // page - place[:, :1])
    at = line, nth, positions % page
    fresh = jnp.zeros((*place.shape, page), bool).at[at].set(True, mode="drop")
    shape = *place.shape, page, new.shape[2]
    rows = jnp.zeros(shape, stack.dtype).at[at].set(new.astype(stack.dtype), mode="drop")
    # no page without new tokens: it may be another row's, which writes it meanwhile
    number = _page_numbers(stack, place, fresh.any(-1), pages)
    before = stack.at[layer, number].get(mode="clip")
    after = jnp.where(fresh[:, :, None], rows.swapaxes(2, 3), before)
    return stack.at[layer, number].set(after, mode="drop")


def write_blocks(stack, layer, new, blocks, pages, page: int, ratio: int):
    """`stack [L, P, slots, D]` with the entries `new [B, E, D]` of `blocks [B, E]` in its `layer`:
    those that fall to this shard, in the pages of the shard that are a row's.

    The entry of a block lies in the page, of `page` tokens, of the block's last token, behind those
    of the blocks that end there before it; see `blocks_in_pages`. `PAD_POSITION` is no block.
    """
    there = blocks != PAD_POSITION
    place = jnp.where(there, (blocks * ratio + ratio - 1) // page, 0)
    slot = blocks - _first_block(place, page, ratio)
    return _put_in_pages(stack, layer, new, place, slot, there, pages)


def _put_in_pages(stack, layer, new, place, slot, there, pages):
    """`stack [L, P, slots, ...]` with rows `new [B, T, ...]` in its `layer`, where `there [B, T]`
    and this shard has the page: in `slot` of the row's page number `place`."""
    number = _page_numbers(stack, place, there, pages)
    return stack.at[layer, number, slot].set(new.astype(stack.dtype), mode="drop")


def _page_numbers(stack, place, there, pages):
    """The pages of `stack [L, P, ...]` that are a row's number `place [B, n]`, on this shard where
    `there`; else beyond the last, where nothing is written."""
    own = there & (place % _shards() == _rank())
    listed = jnp.minimum(place // _shards(), pages.shape[1] - 1)
    return jnp.where(own, jnp.take_along_axis(pages, listed, axis=1), stack.shape[1])


def positions_in_pages(lengths, count: int, page: int):
    """`[B, count * page]`: the position in each slot of rows that have `lengths [B]` tokens and
    `count` pages on this shard."""
    place = jnp.arange(count, dtype=jnp.int32) * _shards() + _rank()
    positions = (place[:, None] * page + jnp.arange(page, dtype=jnp.int32)).reshape(-1)
    return jnp.where(positions < lengths[:, None], positions, PAD_POSITION)


def blocks_in_pages(lengths, count: int, page: int, ratio: int):
    """`[B, count * slots]`: the block in each slot of rows that have `lengths [B]` tokens, `ratio`
    of them a block, and `count` pages on this shard; `PAD_POSITION`: none, or not complete.

    A page has `block_slots` slots. Of three pages of 32 tokens and blocks of 12, on one shard:

        page     0           1           2
        blocks   0   1   -   2   3   4   5   6   7
        end at   11  23      35  47  59  71  83  95
    """
    place = jnp.arange(count, dtype=jnp.int32)[:, None] * _shards() + _rank()
    first, behind = (_first_block(x, page, ratio) for x in (place, place + 1))
    blocks = first + jnp.arange(block_slots(page, ratio), dtype=jnp.int32)
    blocks = jnp.where(blocks < behind, blocks, PAD_POSITION).reshape(-1)
    return jnp.where(blocks < lengths[:, None] // ratio, blocks, PAD_POSITION)


def block_slots(page: int, ratio: int) -> int:
    """Count the blocks of `ratio` tokens that end in a page at most."""
    return -(-page // ratio)


def _first_block(place, page, ratio):
    """The first block that ends in page number `place` or later."""
    return place * page // ratio


def _scattered(stack, layer, new, start):
    """Rows `new [B, T, ...]` at `start [B]`; a single row is no scatter, but a slice."""
    line = jnp.arange(new.shape[0])[:, None]
    slots = start[:, None] + jnp.arange(new.shape[1], dtype=jnp.int32)
    return stack.at[layer, line, slots].set(new, mode="drop", unique_indices=True)


def layer_of(stack, layer):
    """The arrays `[B, ...]` of one layer, of `stack [L, B, ...]` (a tree)."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, layer, 0, keepdims=False), stack)


def with_layer(stack, layer, new):
    """`stack` with the arrays `new [B, ...]` in its `layer` (trees)."""
    return jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, layer, 0), stack, new)


def _corner(layer, start, new):
    """The indices in `[L, B, S, ...]` where rows `new [B, T, ...]` begin."""
    corner = [layer, 0, start, *[0] * (new.ndim - 2)]
    return [jnp.asarray(i, jnp.int32) for i in corner]


def slots_in_use(lengths, shard, shards: int):
    """Slots that `shard` uses of rows of `lengths` tokens.

    Token i of a row lies on shard `i % shards`, or another one if as many fall to each: so no shard
    holds more than one token more than another, and where the next ones go follows from lengths.
    """
    return (lengths + shards - 1 - shard) // shards


def _fill(length):
    return slots_in_use(length, _rank(), _shards())


def shards_in_scope() -> int:
    return jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)


def axis_in_scope() -> str | None:
    """The axis of the shards; None without a mesh."""
    return None if jax.sharding.get_abstract_mesh().empty else AXIS


def _shards() -> int:
    return 1 if axis_in_scope() is None else lax.axis_size(AXIS)


def _rank():
    return 0 if axis_in_scope() is None else lax.axis_index(AXIS)


def on_mesh(x, spec):
    return x if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(x, spec)
