# SPDX-License-Identifier: Apache-2.0
"""Blocks that a causal ring of eight in zigzag layout visits, beside those that hold a pair."""

import jax.numpy as jnp
import numpy as np

SHARDS, TOKENS = 8, 4096  # a shard's


def count(block_q: int, block_kv: int) -> dict:
    """Count blocks over all pairs of shards: visited, needed, masked, partial and wrong ones."""
    from jaxcp.layout import Zigzag
    from pallas_kernels.flash_attention import NO_POSITION, PAD_POSITION, Mask, blocks

    order = Zigzag().order(SHARDS * TOKENS, SHARDS).reshape(SHARDS, 1, TOKENS).astype(np.int32)

    def bounds(positions, block, pad):
        ids = blocks.token_ids(jnp.asarray(positions), None, TOKENS, pad)
        return blocks.block_bounds(ids, block, pad)

    queries = [(q[0], bounds(q, block_q, NO_POSITION)) for q in order]
    keys = [(kv[0], bounds(kv, block_kv, PAD_POSITION)) for kv in order]
    totals = dict.fromkeys(("visited", "needed", "masked", "partial", "wrong"), 0)
    for q, q_bounds in queries:
        for kv, kv_bounds in keys:
            listed, counts = blocks.block_lists(Mask(), q_bounds, kv_bounds, False, along="kv")
            full, partial = _sets(np.asarray(listed[0]), np.asarray(counts[0]))
            visible = (kv[None] <= q[:, None]).reshape(-1, block_q, TOKENS // block_kv, block_kv)
            some, every = visible.any((1, 3)), visible.all((1, 3))
            totals["visited"] += int(full.sum() + partial.sum())
            totals["masked"] += int(partial.sum())
            totals["needed"] += int(some.sum())
            totals["partial"] += int((some & ~every).sum())
            totals["wrong"] += int((some & ~every != partial).sum() + (every != full).sum())
    return totals


def _sets(order, counts):
    """Booleans `[query blocks, key blocks]`: visited without a mask, and under one."""
    full, partial = np.zeros((2, *order.shape), bool)
    for row, (columns, (first, last)) in enumerate(zip(order, counts, strict=True)):
        full[row, columns[:first]] = True
        partial[row, columns[first:last]] = True
    return full, partial
