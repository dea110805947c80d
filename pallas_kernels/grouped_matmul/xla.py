# SPDX-License-Identifier: Apache-2.0
"""XLA's own ragged dot; on CPU, where it multiplies every row by every matrix, tiles instead."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import target_platform

TILES = 1, 2, 4, 8, 16, 32, 64, 128
GATHERED = 16  # rows that a tile's product could have in the time in which its matrix is gathered
MOST_GATHERED = 1 << 26  # elements of the weights that the tiles gather; above it, ragged dot


def forward(lhs, rhs, group_sizes):
    rows, groups = lhs.shape[0], rhs.shape[0]
    tile = min(TILES, key=lambda tile: _most(rows, groups, tile) * (tile + GATHERED))
    tiles = _most(rows, groups, tile)
    if target_platform() == "cpu" and tiles * rhs.shape[1] * rhs.shape[2] <= MOST_GATHERED:
        return _tiled(lhs, rhs, group_sizes, tiles, tile)
    acc = np.promote_types(lhs.dtype, np.float32)
    out = jax.lax.ragged_dot(lhs, rhs, group_sizes, preferred_element_type=acc).astype(lhs.dtype)
    # rows of no group: ragged_dot's result there differs between platforms
    return jnp.where((jnp.arange(lhs.shape[0]) < group_sizes.sum())[:, None], out, 0)


def _most(rows: int, groups: int, tile: int) -> int:
    """Tiles that groups of so many rows in all can need: one of a row each, and then full ones."""
    return max(1, min(rows, groups) + max(0, rows - groups) // tile)


def _tiled(lhs, rhs, group_sizes, tiles, tile):
    """Pad every group to whole tiles, and run one batched product over tiles."""
    rows, groups = lhs.shape[0], rhs.shape[0]
    ends = jnp.cumsum(group_sizes)
    group = jnp.searchsorted(ends, jnp.arange(rows), side="right")
    tile_ends = jnp.cumsum(-(-group_sizes // tile))
    first_tile = jnp.concatenate([jnp.zeros(1, tile_ends.dtype), tile_ends[:-1]])
    place = first_tile[group] * tile + jnp.arange(rows) - (ends - group_sizes)[group]
    place = jnp.where(group < groups, place, tiles * tile + jnp.arange(rows))  # rows of no group
    padded = jnp.zeros((tiles * tile, lhs.shape[1]), lhs.dtype)
    padded = padded.at[place].set(lhs, unique_indices=True, mode="drop")
    group_of_tile = jnp.minimum(
        jnp.searchsorted(tile_ends, jnp.arange(tiles), side="right"), groups - 1
    )
    out = _products(padded.reshape(tiles, tile, -1), rhs, group_of_tile)
    out = out.reshape(tiles * tile, -1)
    return out.at[place].get(unique_indices=True, mode="fill", fill_value=0)


@jax.custom_vjp
def _products(x, rhs, group):
    """Multiply each tile by its group's matrix. JAX alone adds their gradients in a low dtype."""
    return _einsum("ntd,ndf->ntf", x, rhs[group]).astype(x.dtype)


def _keep(x, rhs, group):
    return _products(x, rhs, group), (x, rhs, group)


def _gradients(kept, dout):
    x, rhs, group = kept
    dx = _einsum("ntf,ndf->ntd", dout, rhs[group]).astype(x.dtype)
    of_tiles = _einsum("ntd,ntf->ndf", x, dout)
    drhs = jnp.zeros(rhs.shape, of_tiles.dtype).at[group].add(of_tiles)
    return dx, drhs.astype(rhs.dtype), None


_products.defvjp(_keep, _gradients)


def _einsum(spec, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=np.promote_types(a.dtype, np.float32))
