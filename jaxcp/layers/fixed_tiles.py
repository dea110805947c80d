# SPDX-License-Identifier: Apache-2.0
"""Computes rows in tiles of one shape, so that a row's bits do not depend on the mesh.

The order of a matrix product's sums may depend on its shape, and the shape of a device's part
depends on the mesh. Here every product has 128 rows. The cost: tiles run one after the other, and
the last one is padded.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

ROWS = 128


def in_tiles(compute: Callable[..., Any], *arrays: Array) -> Any:
    """Run `compute` on `arrays [M, ...]` tile by tile; its row i must depend on their rows i."""
    rows = arrays[0].shape[0]
    count = -(-rows // ROWS)

    def cut(x):
        pads = [(0, count * ROWS - rows)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, pads).reshape(count, ROWS, *x.shape[1:])

    out = lax.map(lambda tile: compute(*tile), tuple(map(cut, arrays)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:rows], out)


def experts_in_tiles(
    compute: Callable[..., Float[Array, "R D"]],
    weights: Any,
    rows: Float[Array, "M D"],
    sizes: Int[Array, "E"],
) -> Float[Array, "M D"]:
    """Run `compute(weights, rows, expert, sizes)` for one expert and a tile of its rows at a time.

    `rows` are sorted by expert, `sizes` of each. Rows behind the last expert's give 0; a tile that
    no expert has is not computed.
    """
    count, experts = rows.shape[0], sizes.shape[0]
    tiles = count // ROWS + experts  # the most that can be needed: each expert pads one tile
    ends = jnp.cumsum(sizes)
    tile_ends = jnp.cumsum(-(-sizes // ROWS))
    expert = jnp.searchsorted(ends, jnp.arange(count), side="right")
    first = (tile_ends + sizes // -ROWS)[jnp.minimum(expert, experts - 1)]
    place = first * ROWS + jnp.arange(count) - (ends - sizes)[jnp.minimum(expert, experts - 1)]
    place = jnp.where(expert < experts, place, tiles * ROWS + jnp.arange(count))
    padded = jnp.zeros((tiles * ROWS, rows.shape[1]), rows.dtype)
    padded = padded.at[place].set(rows, unique_indices=True, mode="drop")
    owner = jnp.searchsorted(tile_ends, jnp.arange(tiles), side="right")

    def one(given):
        tile, owner = given
        local = jax.tree.map(lambda w: lax.dynamic_slice_in_dim(w, owner, 1), weights)
        zeros, size = jnp.zeros(ROWS, jnp.int32), jnp.full(1, ROWS, jnp.int32)
        return compute(local, tile, zeros, size)

    shape = jax.eval_shape(one, (padded[:ROWS], owner[0]))

    def one_or_none(given):
        return lax.cond(given[1] < experts, one, lambda _: jnp.zeros_like(shape), given)

    out = lax.map(one_or_none, (padded.reshape(tiles, ROWS, -1), owner))
    out = out.reshape(tiles * ROWS, -1)
    return out.at[place].get(unique_indices=True, mode="fill", fill_value=0)
