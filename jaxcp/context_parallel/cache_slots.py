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


def write_rows(cache, new, fill):
    """This shard's rows `new` behind what it holds."""
    return lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), fill[_rank()], axis=1)


def deal_rows(cache, new, fill, turn, pad=0):
    """Of rows `new [B, T, ...]`, those that fall to this shard, behind what it holds.

    Every shard writes as many rows; those too many are pads, which the next tokens overwrite.
    """
    shards = fill.shape[0]
    rows = [(0, 0)] * new.ndim
    rows[1] = (0, -new.shape[1] % shards)
    new = jnp.pad(new, rows, constant_values=pad).reshape(new.shape[0], -1, shards, *new.shape[2:])
    mine = lax.dynamic_index_in_dim(new, turn[_rank()], axis=2, keepdims=False)
    return write_rows(cache, mine, fill)


def shards_in_scope() -> int:
    return jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)


def axis_in_scope() -> str | None:
    """The axis of the shards; None without a mesh."""
    return None if jax.sharding.get_abstract_mesh().empty else AXIS


def _rank():
    return 0 if axis_in_scope() is None else lax.axis_index(AXIS)


def on_mesh(x, spec):
    return x if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(x, spec)


def on_shards(local, in_specs, out_specs):
    """`local` on every device's shards; as it is where there is no mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return local

    def call(*args):
        moved = [jax.sharding.reshard(x, spec) for x, spec in zip(args, in_specs, strict=True)]
        return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*moved)

    return call
