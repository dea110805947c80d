# SPDX-License-Identifier: Apache-2.0
"""The kind of multi-head latent attention: one latent and one key part a token, for all heads.

Rows `[L, B, S, 1, latent + key part]` are sharded over slots and the same over `model`; keys and
values are made of them. A long turn sends latents around as `latent_attention` does; a short one
leaves them where they lie (one all-gather a layer: `shards * B * T * N * (latent + 1)` float32).

With an index (DeepSeek-V3.2) a layer keeps an index key beside each latent, and new tokens attend
to the slots that it selects. The selection is global, and of equal scores it takes the earlier
token, however slots lie. Communication a device and layer then: one all-gather of the slots in use,
576 + 128 channels of V3.2 and a position each; in a short turn and in decoding of all slots there
are. Memory: the same.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxcp.attention.blocks import in_order
from jaxcp.attention.cache import Room
from jaxcp.attention.full import attend_shard, merged
from jaxcp.attention.selected import attend_selected
from jaxcp.attention.slots import (
    AXIS,
    SHARDED,
    TOKENS,
    WHOLE,
    axis_in_scope,
)
from jaxcp.context_parallel.api import weight_spec
from jaxcp.context_parallel.ring import Ring
from jaxcp.context_parallel.shards import on_shards
from pallas_kernels import flash_attention
from pallas_kernels.flash_attention import Mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Latent:
    """Rows `[L, B, S, 1, C]`; `index` keys `[L, B, S, 1, D]`, None where a layer has no index."""

    rows: jax.Array
    index: jax.Array | None = None

    keeps_slots = True
    in_pages = ("rows", "index")
    rolls_back = True

    @classmethod
    def empty(cls, room: Room, *, layers: int, size: int, index_size: int = 0) -> "Latent":
        def zeros(size):
            return room.for_slots(layers, 1, size, spec=(None, None))

        return cls(zeros(size), zeros(index_size) if index_size else None)

    def latent(self, tokens, layer, q, latent, weights, *, expand, scale):
        """`(out, what is kept then)`; `(latent, key part)` as `latent_attention` takes them."""
        spec, heads = (TOKENS, SHARDED) if tokens.sharded else (P("data"), WHOLE)
        if tokens.sharded:
            local = functools.partial(
                _prefilled, expand=expand, scale=scale, used=tokens.used,
                strategy=Ring() if tokens.strategy is None else tokens.strategy,
            )  # fmt: skip
        else:
            local = functools.partial(_extended, scale=scale)
        whole = tuple(weight_spec(x, heads) for x in weights)
        stack = P(*tokens.place.stack, None, None)
        run = on_shards(
            local,
            (heads, spec, stack, P(), spec, TOKENS, tokens.place.specs, whole),
            (heads, stack),
        )
        new = jnp.concatenate(latent, axis=-1)[:, :, None]
        out, rows = run(
            q, new, self.rows, jnp.int32(layer), tokens.positions, tokens.slots, tokens.place,
            weights,
        )  # fmt: skip
        return out, dataclasses.replace(self, rows=rows)

    def selected(self, tokens, layer, q, keys, selection, *, scale, value_dim):
        """`(out [B, T, N, value_dim], what is kept then)`: see `WholeSequence.selected`.

        `keys [B, T, H]` are the new tokens'; index keys and queries are in `selection`.
        """
        spec = TOKENS if tokens.sharded else P("data", None)
        heads, wide = P(*spec, "model", None), P(*spec, None, None)
        local = functools.partial(
            _selected, used=tokens.used if tokens.sharded else None,
            top_k=selection.top_k, scale=scale, value_dim=value_dim,
        )  # fmt: skip
        stacks = (P(*tokens.place.stack, None, None),) * 2
        place = tokens.place.specs
        run = on_shards(
            local,
            (heads, (wide, P(*spec, None)), (wide, wide), stacks, P(), spec, TOKENS, place),
            (heads, stacks),
        )
        new = keys[:, :, None], selection.keys[:, :, None]
        queries = selection.queries, selection.weights
        out, kept = run(
            q, queries, new, (self.rows, self.index), jnp.int32(layer), tokens.positions,
            tokens.slots, tokens.place,
        )  # fmt: skip
        return out, Latent(*kept)


def _prefilled(
    q, new, stack, layer, q_pos, kv_pos, place, weights, *, expand, scale, used, strategy
):  # fmt: skip
    stack = place.write(stack, layer, new)
    rows = place.read(stack, layer, used)[:, :, 0].astype(q.dtype)
    latent = jnp.split(rows, [weights[0].shape[0]], axis=-1)
    kv_pos = kv_pos[:, :used]
    if axis_in_scope() is None:
        k, v = expand(latent, *weights)
        positions = {"q_positions": q_pos, "kv_positions": kv_pos}
        return flash_attention(q, k, v, **positions, scale=scale)[0], stack
    options = {"axis_name": AXIS, "mask": Mask(), "implementation": None, "soft_cap": None}
    arrays = q, latent, None, q_pos, kv_pos, None, None
    out, _ = strategy.attend(*arrays, expand=expand, weights=weights, scale=scale, **options)
    return out, stack


def _extended(q, new, stack, layer, q_pos, kv_pos, place, weights, *, scale):
    """Heads meet the latent itself, projections absorbed."""
    stack, (k_up, v_up) = place.write(stack, layer, new), weights
    nope = k_up.shape[-1]
    absorbed = jnp.einsum("btnh,lnh->btnl", q[..., :nope], k_up)
    q = jnp.concatenate([absorbed, q[..., nope:]], axis=-1)
    options = {"window": None, "soft_cap": None, "scale": scale}
    if stack.shape[-1] > 256:  # wider than the kernels take
        options["implementation"] = "xla"
    rows = place.read(stack, layer)
    out, lse = attend_shard(q, rows, rows[..., : k_up.shape[0]], q_pos, kv_pos, **options)
    out, _ = merged(out, lse)
    return jnp.einsum("btnl,lnv->btnv", out.astype(q.dtype), v_up), stack


def _selected(q, picks, new, stacks, layer, q_pos, kv_pos, place, *, used, **options):
    stacks = tuple(place.write(x, layer, rows) for x, rows in zip(stacks, new, strict=True))
    keys, index_keys = (place.read(x, layer, used)[:, :, 0] for x in stacks)
    axis, positions = axis_in_scope(), kv_pos[:, :used]
    limit = positions.shape[1] * (1 if axis is None else lax.axis_size(axis))
    # by position: of equal scores the earlier token is taken, wherever its slot is
    (keys, index_keys), positions = in_order((keys, index_keys), positions, limit, axis)
    queries, weights = picks
    out, _ = attend_selected(
        q, keys.astype(q.dtype), queries, weights, index_keys, q_pos, positions, **options
    )
    return out.astype(q.dtype), stacks
