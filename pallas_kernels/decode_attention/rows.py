# SPDX-License-Identifier: Apache-2.0
"""Lays out the queries of a KV head as rows of one matrix, and lists the blocks they need."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention import blocks as tiles
from pallas_kernels.flash_attention.mask import NO_POSITION, PAD_POSITION


def together(q, kv_heads):
    """Group the queries that read one KV head: `[B, T, N, H] -> [B, K, T * G, H]`, by token."""
    b, t, n, h = q.shape
    q = q.reshape(b, t, kv_heads, n // kv_heads, h).swapaxes(1, 2)
    return q.reshape(b, kv_heads, -1, h)


def apart(x, queries):
    """Undo `together`, on `[B, K, T * G, ...]`."""
    b, kv_heads, rows = x.shape[:3]
    x = x.reshape(b, kv_heads, queries, rows // queries, *x.shape[3:]).swapaxes(1, 2)
    return x.reshape(b, queries, -1, *x.shape[4:])


def positions(q_pos, group):
    """Repeat positions for the rows of `together`: `[B, T] -> [B, T * G]`."""
    return jnp.repeat(q_pos, group, axis=1)


def of_layer(layer, *cache):
    """The layer of each stack `[L, B, ...]`, a copy; the arrays as they are where it is None."""
    if layer is None:
        return cache
    return [x if x is None else lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in cache]


def of_layers(layer, batch, cache, in_place=lambda x: True):
    """`(first, cache)`: each stack as `[L * B, ...]`, where sequence `b` is row `first + b`.

    It moves nothing, unless keys or values cannot be read `in_place`: then it is `of_layer`'s copy.
    Without a layer `first` is 0 and the arrays are as they are.
    """
    if layer is None or not all(map(in_place, cache[:2])):
        return 0, of_layer(layer, *cache)
    return layer * batch, [x if x is None else x.reshape(-1, *x.shape[2:]) for x in cache]


def block_list(mask, q_pos, kv_pos, block):
    """List blocks of slots `[j * block, (j + 1) * block)`: `order [B, blocks]`, `counts [B, 2]`.

    Every query sees all of the blocks `[0, counts[0])`; `[counts[0], counts[1])` need the mask; the
    rest must be skipped. A last block that is not full needs the mask.
    """
    size = -(-kv_pos.shape[1] // block) * block
    q = tiles.token_ids(q_pos, None, q_pos.shape[1], NO_POSITION)
    kv = tiles.token_ids(kv_pos, None, size, PAD_POSITION)
    q_bounds = tiles.block_bounds(q, q_pos.shape[1], NO_POSITION)
    kv_bounds = tiles.block_bounds(kv, block, PAD_POSITION)
    order, counts = tiles.block_lists(mask, q_bounds, kv_bounds, False, along="kv")
    return order[:, 0], counts[:, 0]
