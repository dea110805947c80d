# SPDX-License-Identifier: Apache-2.0
"""Attention of new tokens over slots of a cache that an index selects (DeepSeek-V3.2).

A layer holds a latent with its key part and, beside it, an index key a token, sharded over slots.
The selection is global, and of equal scores it takes the earlier token, however slots lie.

Communication a device and layer: one all-gather of the slots in use, 576 + 128 channels of V3.2 and
a position each; in a short turn and in decoding of all slots there are. Memory: the same.
"""

import functools

from jax import lax
from jax.sharding import PartitionSpec as P

from jaxcp.attention.blocks import in_order
from jaxcp.attention.selected import attend_selected
from jaxcp.attention.slots import ROWS, TOKENS, axis_in_scope
from jaxcp.context_parallel.shards import on_shards


def attend_selected_slots(step, q, keys, selection, write, *, layer, scale, value_dim, used=None):
    """The latent that `q [B, T, N, H]` reads out, `[B, T, N, value_dim]`; `step` keeps the rows.

    Args:
      step: `Prefill` or `Extend`, with a layer's rows in `k` and index keys in `v`.
      keys: `[B, T, H]` of the new tokens; index keys and queries are in `selection`.
      write: `write(cache, new, lengths)` puts rows of new tokens into a shard's slots.
      used: (static) bounds the slots in use of a shard; None: all may be.
    """
    sharded = used is not None
    tokens = TOKENS if sharded else P("data", None)
    heads = P(*tokens, "model", None)
    wide = P(*tokens, None, None)
    local = functools.partial(
        _local, write=write, used=used, top_k=selection.top_k, scale=scale, value_dim=value_dim
    )
    picks = wide, P(*tokens, None)
    specs = heads, picks, (wide, wide), (TOKENS, TOKENS), tokens, TOKENS, ROWS
    run = on_shards(local, specs, (heads, (TOKENS, TOKENS)))
    new = keys[:, :, None], selection.keys[:, :, None]
    held = step.k[layer], step.v[layer]
    queries = selection.queries, selection.weights
    ids = step.positions, step.kv_positions, step.cache.lengths
    out, (step.k[layer], step.v[layer]) = run(q, queries, new, held, *ids)
    return out


def _local(q, picks, new, held, q_pos, kv_pos, lengths, *, write, used, **options):
    held = tuple(write(x, rows, lengths) for x, rows in zip(held, new, strict=True))
    keys, index_keys = (x[:, :used, 0] for x in held)
    axis, positions = axis_in_scope(), kv_pos[:, :used]
    limit = positions.shape[1] * (1 if axis is None else lax.axis_size(axis))
    # by position: of equal scores the earlier token is taken, wherever its slot is
    (keys, index_keys), positions = in_order((keys, index_keys), positions, limit, axis)
    queries, weights = picks
    out, _ = attend_selected(
        q, keys.astype(q.dtype), queries, weights, index_keys, q_pos, positions, **options
    )
    return out.astype(q.dtype), held
