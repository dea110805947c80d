# SPDX-License-Identifier: Apache-2.0
"""The kind of a layer that sees a window of tokens and compressed blocks of the rest.

It is small, and the same on every device: the last `window - 1` rows, one entry (and index key) for
every complete block, and of the blocks that are not complete the parts that will merge with what
comes. A part is `(value, lse)` per channel, so that a pending block of 128 tokens is no larger than
one entry.

Communication of a prefill, a device and layer: new keys by the strategy, parts as in `blocks`, one
all-gather of the new entries and one all-reduce of `window - 1` rows. In decoding: nothing.
Memory: `(entry + index key) / ratio` channels a token, not divided by the number of devices: of
DeepSeek-V4-Flash 6.7 GiB at 1M tokens in bfloat16.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxcp.attention.blocks import compress_shard, no_pending, runs_of, shards_of
from jaxcp.attention.cache import Room
from jaxcp.attention.rolling import renew, row_positions
from jaxcp.attention.selected import Selection, attend_selected, shared_head
from jaxcp.attention.slots import AXIS, layer_of, on_mesh, with_layer
from jaxcp.context_parallel.ring import Ring
from jaxcp.context_parallel.shards import on_shards
from pallas_kernels import PAD_POSITION, flash_attention
from pallas_kernels.flash_attention import Mask, apply_sinks
from pallas_kernels.online_softmax import merge

STACK = P(None, "data")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "entries", "pending"],
    meta_fields=["window"],
)
@dataclasses.dataclass(frozen=True)
class Compressed:
    """`rows [L, B, window - 1, H]`, position p at `p % (window - 1)`.

    `entries` and `pending`: by name (`kv`, `index`), `[L, B, blocks, D]` with block w at w, and the
    parts of incomplete blocks; empty where a layer has the window alone.
    """

    rows: jax.Array
    entries: dict[str, jax.Array]
    pending: dict[str, Any]
    window: int

    keeps_slots = False

    @classmethod
    def empty(
        cls, room: Room, *, layers: int, window: int, head_dim: int, ratio: int, overlap: bool,
        sizes: Mapping[str, int],
    ) -> "Compressed":  # fmt: skip
        """`sizes`: channels of an entry, by name, of which there is one for `ratio` tokens."""
        batch = room.batch_size
        blocks = max(1, room.max_len // ratio) if ratio else 0
        pending = {name: no_pending(batch, size, overlap) for name, size in sizes.items()}
        kept = cls(
            rows=jnp.zeros((layers, batch, max(1, window - 1), head_dim), room.dtype),
            entries={
                name: jnp.zeros((layers, batch, blocks, size), room.dtype)
                for name, size in sizes.items()
            },
            pending=jax.tree.map(lambda x: jnp.stack([x] * layers), pending),
            window=window,
        )
        return jax.tree.map(lambda x: on_mesh(x, _whole(STACK, x)), kept)

    def compress(self, tokens, layer, values, gates, *, ratio, overlap, name):
        """Do as `WholeSequence.compress` does, with the blocks that these tokens complete."""
        axis = _axis(tokens)
        shards = 1 if axis is None else shards_of(AXIS)
        runs = runs_of(_strategy(tokens).layout, shards, tokens.positions.shape[1] // shards)
        local = functools.partial(
            compress_shard, ratio=ratio, overlap=overlap, runs=runs, axis_name=AXIS, shards=shards
        )
        spec, rows = P("data", axis), P("data")
        stack = self.pending[name]
        run = on_shards(local, (spec, spec, spec, rows, rows), (spec, spec, rows))
        entries, blocks, pending = run(
            values, gates, tokens.positions, layer_of(stack, layer), tokens.after
        )
        pending = self.pending | {name: with_layer(stack, layer, pending)}
        return (entries, blocks), dataclasses.replace(self, pending=pending)

    def shared(self, tokens, layer, q, kv, *, window, scale, sinks):
        """The window alone."""
        return self._attend(tokens, layer, q, kv, None, {}, 0, window, scale, sinks, None)

    def compressed(self, tokens, layer, q, kv, entries, blocks, *, ratio, window, scale, sinks,
                   selection: Selection | None = None):  # fmt: skip
        """The window, and entries of blocks that end before the query."""
        new = {"kv": entries}
        if selection is not None:
            new["index"] = selection.keys
        return self._attend(
            tokens, layer, q, kv, blocks, new, ratio, window, scale, sinks, selection
        )

    def _attend(self, tokens, layer, q, kv, blocks, new, ratio, window, scale, sinks, selection):
        if window != self.window:
            raise ValueError(f"the layer keeps a window of {self.window}; it attends with {window}")
        axis = _axis(tokens)
        spec, rows = P("data", axis), P("data")
        heads = P("data", axis, "model")
        picks = None if selection is None else (selection.queries, selection.weights)
        local = functools.partial(
            _attend, ratio=ratio, window=window, scale=scale, strategy=_strategy(tokens),
            axis=axis, top_k=None if selection is None else selection.top_k,
        )  # fmt: skip
        arrays = q, kv, tokens.positions, blocks, new, picks, self.rows, self.entries
        specs = heads, spec, spec, spec, spec, spec, STACK, STACK
        run = on_shards(local, (*specs, P(), rows, rows), (heads, heads, STACK, STACK))
        out, lse, kept_rows, entries = run(*arrays, jnp.int32(layer), tokens.before, tokens.after)
        kept = dataclasses.replace(self, rows=kept_rows, entries=entries)
        return apply_sinks(out, lse, sinks)[0], kept


def _axis(tokens) -> str | None:
    """The mesh axis that shards the new tokens."""
    return AXIS if tokens.sharded and not jax.sharding.get_abstract_mesh().empty else None


def _strategy(tokens):
    return Ring() if tokens.strategy is None else tokens.strategy


def _attend(q, kv, positions, blocks, new, picks, rows, entries, layer, start, end, *,
            ratio, window, scale, strategy, axis, top_k):  # fmt: skip
    """`(out, lse, rows, entries)` of local queries; `rows` and `entries` are those of a stack."""
    done = _new_tokens(q, kv, positions, window, scale, strategy, axis)
    kept = layer_of(rows, layer)
    before = row_positions(start, kept.shape[1])
    k, v = shared_head(kept.astype(q.dtype))
    out, lse = flash_attention(
        q, k, v, q_positions=positions, kv_positions=before, window=window, scale=scale,
        carry=done, out_dtype=jnp.float32,
    )  # fmt: skip
    kept = renew(kept, kv, positions, start, end, axis_name=axis)
    rows = with_layer(rows, layer, kept)
    if new:
        if axis is not None:
            new, blocks = lax.all_gather((new, blocks), axis, axis=1, tiled=True)
        line = jnp.arange(blocks.shape[0])[:, None]
        entries = {
            name: x.at[layer, line, blocks].set(new[name].astype(x.dtype), mode="drop")
            for name, x in entries.items()
        }
        of_layer = layer_of(entries, layer)
        keys = of_layer["kv"].astype(q.dtype)
        number = jnp.arange(keys.shape[1])
        ends = jnp.where(number < (end // ratio)[:, None], (number + 1) * ratio - 1, PAD_POSITION)
        if picks is None:
            k, v = shared_head(keys)
            out, lse = flash_attention(
                q, k, v, q_positions=positions, kv_positions=ends, scale=scale, carry=(out, lse),
                out_dtype=jnp.float32,
            )  # fmt: skip
        else:
            index = of_layer["index"].astype(jnp.float32)
            selected = attend_selected(
                q, keys, picks[0], picks[1], index, positions, ends, top_k=top_k, scale=scale,
                value_dim=q.shape[-1],
            )  # fmt: skip
            out, lse = merge((out, lse), selected)
    return out.astype(q.dtype), lse, rows, entries


def _new_tokens(q, kv, positions, window, scale, strategy, axis):
    """`(out, lse)` of the window among the new tokens."""
    if axis is None:
        k, v = shared_head(kv)
        return flash_attention(
            q, k, v, q_positions=positions, kv_positions=positions, window=window, scale=scale,
            out_dtype=jnp.float32,
        )  # fmt: skip
    options = {"soft_cap": None, "scale": scale, "implementation": None}
    out, lse = strategy.attend(
        q, kv, None, positions, positions, None, None, axis_name=axis, mask=Mask(window=window),
        expand=shared_head, **options,
    )  # fmt: skip
    return out.astype(jnp.float32), lse


def _whole(spec: P, x) -> P:
    return P(*spec, *[None] * (x.ndim - len(spec)))
