# SPDX-License-Identifier: Apache-2.0
"""Lays out the queries of a KV head as rows of one matrix, and lists the blocks they need."""

from typing import Any, NamedTuple

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


class Lines(NamedTuple):
    """A cache as a kernel reads it: lines `[lines, S, K, H]`, and which are a sequence's.

    Without pages line `first + b` has all slots of sequence `b`. With pages line `first +
    pages[b, j]` has its slots `[j * S, (j + 1) * S)`.
    """

    first: Any
    pages: Any
    k: Any
    v: Any
    k_scale: Any
    v_scale: Any

    @property
    def slots(self) -> int:
        """Slots of a sequence."""
        return self.k.shape[1] * (1 if self.pages is None else self.pages.shape[1])


def whole(cache, layer, pages):
    """Copy the layer's keys, values and scales `[B, S, ...]` that the sequences have.

    Args:
      cache: k, v and their scales, each with the axis of layers and that of pages where there are
        any.
    """
    if layer is not None:
        cache = [
            x if x is None else lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in cache
        ]
    if pages is None:
        return Lines(0, None, *cache)
    k, v, *scales = cache
    batch = len(pages)
    k, v = (x[pages].reshape(batch, -1, *x.shape[2:]) for x in (k, v))
    scales = [
        x if x is None else x[pages].swapaxes(1, 2).reshape(batch, x.shape[1], -1) for x in scales
    ]
    return Lines(0, None, k, v, *scales)


def lines(cache, layer, pages, in_place=lambda x: True):
    """Give the cache as lines, which moves nothing where keys and values can be read `in_place`.

    Else it is the copy of `whole`.
    """
    if layer is None and pages is None:
        return Lines(0, None, *cache)
    if not all(map(in_place, cache[:2])):
        return whole(cache, layer, pages)
    if layer is None:
        return Lines(0, pages, *cache)
    first = layer * cache[0].shape[1]
    return Lines(first, pages, *(x if x is None else x.reshape(-1, *x.shape[2:]) for x in cache))


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
