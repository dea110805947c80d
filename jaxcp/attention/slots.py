# SPDX-License-Identifier: Apache-2.0
"""How the arrays of a cache lie on devices, and where its shards put new rows."""

import numbers

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

AXIS = "seq"
TOKENS, ROWS, SAME = P("data", AXIS), P("data"), P(None)
SHARDED, WHOLE = P("data", AXIS, "model", None), P("data", None, "model", None)


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


def write_rows(cache, new, lengths):
    """This shard's rows `new [B, T, ...]` behind those of `lengths [B]` tokens that it holds.

    Real rows come first. What would lie behind the last slot is not written: pads alone.
    """
    width = new.shape[1]

    def one(cache, new, length):
        end = _fill(length)
        start = jnp.minimum(end, cache.shape[0] - width)
        old = lax.dynamic_slice_in_dim(cache, start, width)
        kept = end - start  # rows of `old` that stay, and as many of `new` that find no slot
        moved = lax.dynamic_slice_in_dim(jnp.concatenate([old, new]), width - kept, width)
        stays = (jnp.arange(width) < kept).reshape(-1, *[1] * (new.ndim - 1))
        return lax.dynamic_update_slice_in_dim(cache, jnp.where(stays, old, moved), start, axis=0)

    return _row_by_row(one, cache, new.astype(cache.dtype), lengths)


def write_first(cache, new, lengths):
    """`write_rows` into an empty cache."""
    return lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), 0, axis=1)


def deal_rows(cache, new, lengths, pad=0):
    """Of rows `new [B, T, ...]`, those that fall to this shard, behind what it holds.

    Every shard writes as many rows; those too many are pads, which the next tokens overwrite.
    """
    shards = _shards()
    rows = [(0, 0)] * new.ndim
    rows[1] = (0, -new.shape[1] % shards)
    new = jnp.pad(new.astype(cache.dtype), rows, constant_values=pad)

    def one(cache, new, length):
        dealt = new.reshape(-1, shards, *new.shape[1:])
        mine = lax.dynamic_index_in_dim(dealt, (_rank() - length) % shards, 1, keepdims=False)
        return lax.dynamic_update_slice_in_dim(cache, mine, _fill(length), axis=0)

    return _row_by_row(one, cache, new, lengths)


def slots_in_use(lengths, shard, shards: int):
    """Slots that `shard` uses of rows of `lengths` tokens.

    Token i of a row lies on shard `i % shards`, or another one if as many fall to each: so no shard
    holds more than one token more than another, and where the next ones go follows from lengths.
    """
    return (lengths + shards - 1 - shard) // shards


def _fill(length):
    return slots_in_use(length, _rank(), _shards())


def _row_by_row(one, *arrays):
    """`one` for each row. A single row is no batch: XLA would scatter what is a slice."""
    if arrays[0].shape[0] > 1:
        return jax.vmap(one)(*arrays)
    return one(*(x[0] for x in arrays))[None]


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
