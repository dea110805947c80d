# SPDX-License-Identifier: Apache-2.0
"""The cache of a sliding-window layer: the newest keys and values, the same on every device.

Row `p % R` of R holds the token at position p, until the token at p + R takes its place; which
position a row holds follows from how many tokens there were. R is the window and room for a short
turn, so that such a turn may be written before it attends and still finds all that it sees.

Communication a device in prefill: the new tokens' own window (as `halo` does, or all of them by one
all-gather where that is hardly more), and one sum of R rows of K and V, each of which one shard
contributes. In a short turn and in decoding: nothing.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxcp.context_parallel.exchange import gathered
from jaxcp.context_parallel.halo import fetch
from pallas_kernels import PAD_POSITION, flash_attention


def positions_held(lengths, rows: int):
    """`[B, rows]`: the position in each row after `lengths [B]` tokens."""
    last = lengths[:, None] - 1
    held = last - (last - jnp.arange(rows, dtype=jnp.int32)) % rows
    return jnp.where(held < 0, PAD_POSITION, held)


def append(held, new, positions):
    """Rows `new [B, T, ...]`, which every shard has, take their places among `held [B, R, ...]`."""
    return _put(held, new, positions, positions != PAD_POSITION)


def renew(held, new, positions, start, end, *, axis_name):
    """`held [B, R, ...]` after tokens `start..end - 1 [B]`, which lie in any order over shards."""
    rows = held.shape[1]
    newest = (positions != PAD_POSITION) & (positions >= end[:, None] - rows)
    mine = _put(jnp.zeros_like(held), new, positions, newest)
    if axis_name is not None:
        mine = lax.psum(mine, axis_name)  # exact: every row has one owner
    fresh = positions_held(end, rows) >= start[:, None]
    fresh &= positions_held(end, rows) != PAD_POSITION
    return jnp.where(fresh[..., None, None], mine, held)


def attend(q, k, v, positions, held, halo, *, window, axis_name, **options):
    """`(out, lse)` of new tokens, which lie in any order, over themselves and what is held.

    Args:
      held: `(k, v, positions)` of the tokens before; None where there are none.
      halo: `{distance: rows}`, what each shard sends of its new tokens, as `halo.rows_to_send` has
        it; None gathers all of them.
    """
    keys = k, v, positions
    if halo is None:
        keys = jax.tree.map(lambda x: gathered(x, axis_name), keys)
        halo = {}
    others = [fetch(keys, rows, distance, axis_name) for distance, rows in halo.items()]
    others += [] if held is None else [held]
    options |= {"q_positions": positions, "window": window}
    if not others:
        return _attend(q, keys, **options)
    # own keys first: the halo is on its way meanwhile
    own = _attend(q, keys, out_dtype=jnp.promote_types(q.dtype, jnp.float32), **options)
    others = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *others)
    return _attend(q, others, carry=own, **options)


def _attend(q, keys, **options):
    k, v, positions = keys
    return flash_attention(q, k, v, kv_positions=positions, **options)


def _put(held, new, positions, which):
    rows = held.shape[1]
    where = jnp.where(which, positions % rows, rows)  # the row after the last is dropped
    batch = jnp.arange(held.shape[0])[:, None]
    return held.at[batch, where].set(new.astype(held.dtype), mode="drop")
