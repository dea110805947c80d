# SPDX-License-Identifier: Apache-2.0
"""The cache of a sliding-window layer: the newest keys and values, the same on every device.

They lie in rolling rows (`rolling.py`), R of them: the window and room for a short turn, so that
such a turn may be written before it attends and still finds all that it sees.

Communication a device in prefill: the new tokens' own window (as `halo` does, or all of them by one
all-gather where that is hardly more), and one sum of R rows of K and V, each of which one shard
contributes. In a short turn and in decoding: nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxcp.attention.cache import Room
from jaxcp.attention.full import attend_shard, with_sinks
from jaxcp.attention.rolling import append, renew, row_positions
from jaxcp.attention.slots import (
    MAX_EXTEND,
    ROWS,
    SAME,
    SHARDED,
    TOKENS,
    WHOLE,
    axis_in_scope,
)
from jaxcp.context_parallel.exchange import gathered
from jaxcp.context_parallel.halo import fetch
from jaxcp.context_parallel.shards import on_shards
from pallas_kernels import PAD_POSITION, flash_attention

SPEC = (None, "model", None)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=["window"])
@dataclasses.dataclass(frozen=True)
class Window:
    """Keys and values, each `[L, B, R, K, H]`, of the newest tokens, the same on every shard."""

    k: jax.Array
    v: jax.Array
    window: int

    keeps_slots = True  # it keeps none: a model of windows alone is cut like one with a full layer
    in_pages = ()  # but in a state
    rolls_back = True  # R has rows to spare: what they lost no window reaches any more
    exchanges_window = True

    @classmethod
    def empty(
        cls, room: Room, *, layers: int, num_kv_heads: int, head_dim: int, window: int,
        value_dim: int | None = None,
    ) -> "Window":  # fmt: skip
        """`value_dim`: channels of a value, where not `head_dim`."""
        shape = layers, window - 1 + MAX_EXTEND, num_kv_heads
        sizes = head_dim, head_dim if value_dim is None else value_dim
        k, v = (room.for_state(*shape, size, spec=SPEC) for size in sizes)
        return cls(k, v, window)

    def attend(self, tokens, layer, q, k, v, *, window, sinks=None, scale=None, soft_cap=None):
        """`(out [B, T, N, H], what is kept then)`: see `OverCache`."""
        if window != self.window:
            raise ValueError(f"the layer keeps a window of {self.window}; it attends with {window}")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        options = {"window": window, "scale": scale, "soft_cap": soft_cap}
        new, positions, halo = WHOLE, ROWS, None
        local = functools.partial(_extended, **options)
        if tokens.sharded:
            new, positions, halo = SHARDED, TOKENS, tokens.halos[window]
            local = functools.partial(_prefilled, first=tokens.first, **options)
        place, stack = tokens.place, P(None, "data", *SPEC)
        run = on_shards(
            local,
            (new, new, new, stack, stack, P(), positions, place.specs, ROWS, ROWS, SAME,
             P("model")),
            (new, stack, stack),
        )  # fmt: skip
        out, k, v = run(
            q, k, v, self.k, self.v, jnp.int32(layer), tokens.positions, place, tokens.before,
            tokens.after, halo, () if sinks is None else (sinks,),
        )  # fmt: skip
        return out, Window(k, v, window)


def _prefilled(
    q, k, v, stack_k, stack_v, layer, positions, place, before, after, halo, sinks,
    *, first, **options,
):  # fmt: skip
    kept = place.state((stack_k, stack_v), layer)
    earlier = None
    if not first:
        rows = row_positions(before, kept[0].shape[1])
        earlier = *(x.astype(q.dtype) for x in kept), rows
    axis_name = axis_in_scope()
    out, lse = attend(q, k, v, positions, earlier, halo, axis_name=axis_name, **options)
    kept = tuple(
        renew(x, new, positions, before, after, axis_name=axis_name)
        for x, new in zip(kept, (k, v), strict=True)
    )
    return with_sinks(out, lse, sinks), *place.with_state((stack_k, stack_v), layer, kept)


def _extended(
    q, k, v, stack_k, stack_v, layer, positions, place, before, after, halo, sinks, **options
):  # fmt: skip
    del halo  # every shard has all of the new tokens
    kept = place.state((stack_k, stack_v), layer)
    kept = tuple(append(x, new, positions) for x, new in zip(kept, (k, v), strict=True))
    after = before + (positions != PAD_POSITION).sum(1, dtype=jnp.int32)
    kv_pos = row_positions(after, kept[0].shape[1])
    out, lse = attend_shard(q, kept[0], kept[1], positions, kv_pos, **options)
    out = with_sinks(out, lse, sinks).astype(q.dtype)
    return out, *place.with_state((stack_k, stack_v), layer, kept)


def attend(q, k, v, positions, earlier, halo, *, window, axis_name, **options):
    """`(out, lse)` of new tokens, which lie in any order, over themselves and what is kept.

    Args:
      earlier: `(k, v, positions)` of the tokens before; None where there are none.
      halo: `{distance: rows}`, what each shard sends of its new tokens, as `halo.rows_to_send` has
        it; None gathers all of them.
    """
    keys = k, v, positions
    if halo is None:
        keys = jax.tree.map(lambda x: gathered(x, axis_name), keys)
        halo = {}
    others = [fetch(keys, rows, distance, axis_name) for distance, rows in halo.items()]
    others += [] if earlier is None else [earlier]
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
