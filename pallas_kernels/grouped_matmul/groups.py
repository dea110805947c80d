# SPDX-License-Identifier: Apache-2.0
"""Assigns rows to tiles. Plain `jax.numpy` on arrays of one number a group or tile.

Rows past the last group form one group more, which has no weights and whose results are 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def of_rows(group_sizes, rows):
    """The group of every row; `E` for rows past the last group."""
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    return jnp.searchsorted(ends, jnp.arange(rows, dtype=jnp.int32), side="right")


def with_rest(group_sizes, rows):
    """Sizes of `E + 1` groups: the last one has the rest of the rows."""
    sizes = group_sizes.astype(jnp.int32)
    return jnp.concatenate([sizes, (rows - sizes.sum())[None]])


class Tiles(NamedTuple):
    """Tiles of at most `tile` rows that belong to one group each, group after group."""

    group: jax.Array  # E: rows past the last group, and tiles that are not needed
    start: jax.Array
    end: jax.Array


def tiles(group_sizes, rows, tile):
    """Make as many tiles as any sizes can need; those left over are empty."""
    sizes = with_rest(group_sizes, rows)
    groups = sizes.shape[0]
    ends, tile_ends = jnp.cumsum(sizes), jnp.cumsum(-(-sizes // tile))
    index = jnp.arange(rows // tile + groups, dtype=jnp.int32)
    group = jnp.searchsorted(tile_ends, index, side="right", method="compare_all")
    real = group < groups
    group = jnp.minimum(group, groups - 1)
    first = tile_ends[group] - -(-sizes[group] // tile)
    start = ends[group] - sizes[group] + (index - first) * tile
    return Tiles(group.astype(jnp.int32), jnp.where(real, start, rows), ends[group])


class Visits(NamedTuple):
    """Pairs of a group and an aligned tile that holds rows of it, group after group."""

    group: jax.Array
    tile: jax.Array
    offsets: jax.Array  # the start of each group; one more, the end of the last
    total: jax.Array  # entries past it repeat the last pair


def visits(group_sizes, rows, tile, *, every_group):
    """List the visits of tiles, group after group.

    `every_group`: an empty group gets a visit and the rows past the last group none; else the other
    way round.
    """
    sizes = with_rest(group_sizes, rows)
    groups = sizes.shape[0]
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    first = starts // tile
    each = jnp.where(sizes > 0, (ends - 1) // tile - first + 1, 0)
    if every_group:
        each = jnp.maximum(each, 1).at[-1].set(0)
    visit_ends = jnp.cumsum(each)
    index = jnp.arange(-(-rows // tile) + groups, dtype=jnp.int32)
    index = jnp.minimum(index, visit_ends[-1] - 1)
    group = jnp.searchsorted(visit_ends, index, side="right", method="compare_all")
    group = jnp.minimum(group, groups - 1)
    at = first[group] + index - (visit_ends - each)[group]
    at = jnp.minimum(at, -(-rows // tile) - 1)  # an empty group at the very end
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    return Visits(group.astype(jnp.int32), at.astype(jnp.int32), offsets, visit_ends[-1])
