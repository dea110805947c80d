# SPDX-License-Identifier: Apache-2.0
"""XLA's own ragged dot; on CPU, where it multiplies every row by every matrix, tiles instead."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import target_platform

TILE = 128
MOST_GATHERED = 1 << 26  # elements of the weights that the tiles gather; above it, ragged dot


def forward(lhs, rhs, group_sizes):
    tiles = lhs.shape[0] // TILE + rhs.shape[0]
    if target_platform() == "cpu" and tiles * rhs.shape[1] * rhs.shape[2] <= MOST_GATHERED:
        return _tiled(lhs, rhs, group_sizes, tiles)
    acc = np.promote_types(lhs.dtype, np.float32)
    out = jax.lax.ragged_dot(lhs, rhs, group_sizes, preferred_element_type=acc).astype(lhs.dtype)
    # rows of no group: ragged_dot's result there differs between platforms
    return jnp.where((jnp.arange(lhs.shape[0]) < group_sizes.sum())[:, None], out, 0)


def _tiled(lhs, rhs, group_sizes, tiles):
    """Pad every group to whole tiles, and run one batched product over tiles."""
    rows, groups = lhs.shape[0], rhs.shape[0]
    ends = jnp.cumsum(group_sizes)
    group = jnp.searchsorted(ends, jnp.arange(rows), side="right")
    tile_ends = jnp.cumsum(-(-group_sizes // TILE))
    first_tile = jnp.concatenate([jnp.zeros(1, tile_ends.dtype), tile_ends[:-1]])
    place = first_tile[group] * TILE + jnp.arange(rows) - (ends - group_sizes)[group]
    place = jnp.where(group < groups, place, tiles * TILE + jnp.arange(rows))  # rows of no group
    padded = jnp.zeros((tiles * TILE, lhs.shape[1]), lhs.dtype)
    padded = padded.at[place].set(lhs, unique_indices=True, mode="drop")
    group_of_tile = jnp.minimum(
        jnp.searchsorted(tile_ends, jnp.arange(tiles), side="right"), groups - 1
    )
    acc = np.promote_types(lhs.dtype, np.float32)
    out = jnp.einsum(
        "ntd,ndf->ntf",
        padded.reshape(tiles, TILE, -1),
        rhs[group_of_tile],
        preferred_element_type=acc,
    )
    out = out.reshape(tiles * TILE, -1).astype(lhs.dtype)
    return out.at[place].get(unique_indices=True, mode="fill", fill_value=0)
