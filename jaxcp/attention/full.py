# SPDX-License-Identifier: Apache-2.0
"""The kind of a layer that sees everything: a key and a value of each head for each slot.

A short turn and decoding: one all-gather a layer carries the partial results of shards:
`shards * B * T * N * (H + 1)` float32. A long turn sends what the strategy sends.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxcp.attention.cache import Room
from jaxcp.attention.eight_bits import EightBits, in_place, read, spec_of, write
from jaxcp.attention.slots import (
    AXIS,
    ROWS,
    SHARDED,
    TOKENS,
    WHOLE,
    axis_in_scope,
)
from jaxcp.context_parallel.ring import Ring
from jaxcp.context_parallel.ring_pass_q import RingPassQ
from jaxcp.context_parallel.shards import on_shards
from pallas_kernels import decode_attention, flash_attention
from pallas_kernels.decode_attention import MAX_QUERIES
from pallas_kernels.flash_attention import Mask, apply_sinks, attention_forward
from pallas_kernels.online_softmax import merge_stacked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Full:
    """Keys and values, each `[L, B, S, K, H]`, sharded over slots and heads; of a pool also in 8
    bits."""

    k: jax.Array | EightBits
    v: jax.Array | EightBits

    keeps_slots = True
    in_pages = ("k", "v")
    rolls_back = True

    @classmethod
    def empty(
        cls, room: Room, *, layers: int, num_kv_heads: int, head_dim: int,
        value_dim: int | None = None,
    ) -> "Full":  # fmt: skip
        """`value_dim`: channels of a value, where not `head_dim`."""
        sizes = head_dim, head_dim if value_dim is None else value_dim
        return cls(*(room.for_heads(layers, num_kv_heads, size) for size in sizes))

    def attend(self, tokens, layer, q, k, v, *, window, sinks=None, scale=None, soft_cap=None):
        """`(out [B, T, N, H], what is kept then)`: see `OverCache`."""
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        options = {"window": window, "scale": scale, "soft_cap": soft_cap}
        new, positions = (SHARDED, TOKENS) if tokens.sharded else (WHOLE, ROWS)
        local = functools.partial(_extended, **options)
        if tokens.sharded:
            local = functools.partial(
                _prefilled, used=tokens.used, strategy=tokens.strategy, **options
            )
        stack = spec_of(self.k, tokens.place)
        run = on_shards(
            local,
            (new, new, new, stack, stack, P(), positions, TOKENS, tokens.place.specs, P("model")),
            (new, stack, stack),
        )
        out, *kept = run(
            q, k, v, self.k, self.v, jnp.int32(layer), tokens.positions, tokens.slots,
            tokens.place, () if sinks is None else (sinks,),
        )  # fmt: skip
        return out, Full(*kept)


def _prefilled(
    q, k, v, kept_k, kept_v, layer, q_pos, kv_pos, place, sinks,
    *, used, strategy, window, **options,
):  # fmt: skip
    kept_k, kept_v = write(place, kept_k, layer, k), write(place, kept_v, layer, v)
    k, v = (read(place, x, layer, q.dtype, used) for x in (kept_k, kept_v))
    kv_pos = kv_pos[:, :used]
    if axis_in_scope() is None:
        positions = {"q_positions": q_pos, "kv_positions": kv_pos}
        out, lse = flash_attention(q, k, v, **positions, window=window, **options)
    else:
        if strategy is None:
            strategy = RingPassQ() if RingPassQ.fewer_bytes(q, k, v) else Ring()
        options |= {"axis_name": AXIS, "mask": Mask(window=window), "implementation": None}
        out, lse = strategy.attend(q, k, v, q_pos, kv_pos, None, None, **options)
    return with_sinks(out, lse, sinks), kept_k, kept_v


def _extended(
    q, k, v, kept_k, kept_v, layer, q_pos, kv_pos, place, sinks, **options
):  # fmt: skip
    kept_k, kept_v = write(place, kept_k, layer, k), write(place, kept_v, layer, v)
    if q.shape[1] > MAX_QUERIES:
        k, v = (read(place, x, layer, q.dtype) for x in (kept_k, kept_v))
    else:
        k, v, scales = in_place(kept_k, kept_v)
        options |= {"layer": layer, "pages": place.pages, **scales}
    out, lse = attend_shard(q, k, v, q_pos, kv_pos, **options)
    out, lse = merged(out, lse)
    return with_sinks(out, lse, sinks).astype(q.dtype), kept_k, kept_v


def attend_shard(q, k, v, q_pos, kv_pos, *, window, **options):
    """`(out, lse)` of this shard, out in float32: no backward pass comes, so few rows may split.

    Few queries may have options of `decode_attention` that say where keys and values lie.
    """
    options["out_dtype"] = jnp.float32
    if q.shape[1] <= MAX_QUERIES:
        positions = {"q_positions": q_pos, "kv_positions": kv_pos}
        return decode_attention(q, k, v, **positions, window=window, **options)
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    arrays = q, k, v, q_pos, kv_pos, None, None
    return attention_forward(*arrays, mask=Mask(window=window), **options)


def merged(out, lse):
    """`(out, lse)` of all shards, by one all-gather; as they are without a mesh."""
    if axis_in_scope() is None:
        return out, lse
    packed = lax.all_gather(jnp.concatenate([out, lse[..., None]], axis=-1), AXIS)
    return merge_stacked(packed[..., :-1], packed[..., -1])


def with_sinks(out, lse, sinks):
    """`out` of finished rows with the sinks, none or one array: once, after the last merge."""
    return apply_sinks(out, lse, *sinks)[0] if sinks else out
