# SPDX-License-Identifier: Apache-2.0
"""Takes pages and states of all layers out of a pool as few arrays each, and puts them back.

A block is one page, or one state, over all layers: for each dtype that the pool has, in the order
of their names, an array `[data * seq, n]` whose row is a shard's. A page lies on one shard, so its
row alone counts. A state is the same on every shard of `seq`, and each gives a part of it.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxcp.attention.pool import Pool
from jaxcp.attention.slots import AXIS
from jaxcp.context_parallel.shards import on_shards

BLOCK = P(("data", AXIS), "model")
"""Mesh axes of each array of a block."""
PAGES, STATES = P(("data", AXIS)), P("data")
"""Mesh axes of the numbers of pages, and of states."""


def taken_out(pool: Pool, pages: Any, states: Any) -> tuple[list, list]:
    """The blocks of pages and those of states.

    Args:
      pages: int32 `[data * seq, n]`, numbers within each shard; -1 for a row that nobody wants.
      states: int32 `[data, m]`, of each group of devices along `data`; -1 as well.
    """

    def local(arrays, pages, states):
        of_pages, of_states = _divided(arrays, pool.paged)
        blocks = [_block(of_pages, number, rest=1) for number in pages[0]]
        parts = [_block(of_states, number, rest=pool.shards) for number in states[0]]
        return (
            [[x[None] for x in block] for block in blocks],
            [[_own(x, pool.shards)[None] for x in block] for block in parts],
        )

    run = on_shards(local, (pool.specs, PAGES, STATES), BLOCK)
    return run(jax.tree.leaves(pool.layers), pages, states)


def put_back(pool: Pool, pages: Any, states: Any, of_pages: Any, of_states: Any) -> Pool:
    """The pool with these blocks in these pages and states; see `taken_out`."""

    def local(arrays, pages, states, of_pages, of_states):
        paged, rest = _divided(arrays, pool.paged)
        for number, block in zip(pages[0], of_pages, strict=True):
            paged = _with_block(paged, number, [x[0] for x in block])
        for number, block in zip(states[0], of_states, strict=True):
            rest = _with_block(rest, number, [_whole(x[0], pool.shards) for x in block])
        return [(paged if in_pages else rest).pop(0) for in_pages in pool.paged]

    specs = pool.specs
    run = on_shards(local, (specs, PAGES, STATES, BLOCK, BLOCK), specs)
    flat, tree = jax.tree.flatten(pool.layers)
    layers = jax.tree.unflatten(tree, run(flat, pages, states, of_pages, of_states))
    return dataclasses.replace(pool, layers=layers)


def _divided(arrays, paged):
    """Divide arrays into those that lie in pages, and the others."""
    pairs = list(zip(arrays, paged, strict=True))
    return [x for x, in_pages in pairs if in_pages], [x for x, in_pages in pairs if not in_pages]


def _block(arrays, number, *, rest):
    """Take what stacks `[L, n, ...]` have under a number, by dtype, flat; padded to a multiple of
    `rest`."""
    block: dict[str, list] = {}
    for x in arrays:
        row = jax.lax.dynamic_index_in_dim(x, jnp.maximum(number, 0), 1, keepdims=False)
        block.setdefault(x.dtype.name, []).append(row.reshape(-1))
    flat = [jnp.concatenate(rows) for _, rows in sorted(block.items())]
    return [jnp.pad(x, (0, -len(x) % rest)) for x in flat]


def _with_block(arrays, number, block):
    """Stacks with a block under a number; as they are where that is -1."""
    names = sorted({x.dtype.name for x in arrays})
    left = dict(zip(names, block, strict=True))
    after = []
    for x in arrays:
        shape, rest = (x.shape[0], *x.shape[2:]), left[x.dtype.name]
        row, left[x.dtype.name] = jnp.split(rest, [math.prod(shape)])
        place = jnp.where(number < 0, x.shape[1], number)
        after.append(x.at[:, place].set(row.reshape(shape), mode="drop"))
    return after


def _own(x, shards):
    """This shard's part of what all shards of `seq` have."""
    if shards == 1:
        return x
    size = len(x) // shards
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(AXIS) * size, size)


def _whole(x, shards):
    return x if shards == 1 else jax.lax.all_gather(x, AXIS, tiled=True)
