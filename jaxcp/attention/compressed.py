# SPDX-License-Identifier: Apache-2.0
"""The kind of a layer that sees a window of tokens and compressed blocks of the rest.

It is small: the last `window - 1` rows, one entry (and index key) for every complete block, and of
the blocks that are not complete the parts that will merge with what comes. A part is `(value, lse)`
per channel, so that a pending block of 128 tokens is no larger than one entry. Rows and parts are a
state. Entries lie in the pages of a pool, which shards divide; in a cache every device has them
all. Where the latest tokens may turn out to be none, there are rows to spare, and what of these
tokens would merge is kept beside the parts until more come.

Communication of a prefill, a device and layer: new keys by the strategy, parts as in `blocks`, one
all-reduce of `window - 1` rows, one all-gather of the new entries, and in a pool one of all that
the sequence has. In decoding: nothing in a cache; in a pool one all-gather of partial results, as
in `full`, and where an index selects one of `top_k` scores and positions a query.
Memory: `(entry + index key) / ratio` channels a token. Of DeepSeek-V4-Flash at 1M tokens in
bfloat16 that is 6.7 GiB, divided by the number of devices in a pool, on each of them in a cache.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxcp.attention.blocks import Parts, block_ends, compress_shard, no_pending, runs_of, shards_of
from jaxcp.attention.cache import Room
from jaxcp.attention.full import merged
from jaxcp.attention.rolling import renew, row_positions
from jaxcp.attention.selected import Selection, attend_selected, shared_head
from jaxcp.attention.slots import AXIS, axis_in_scope
from jaxcp.context_parallel.ring import Ring
from jaxcp.context_parallel.shards import on_shards
from pallas_kernels import PAD_POSITION, flash_attention
from pallas_kernels.flash_attention import Mask, apply_sinks
from pallas_kernels.online_softmax import merge

STACK = P(None, "data")


class Recent(NamedTuple):
    """Tokens that are not merged into the pending parts, for they may turn out to be none."""

    values: jax.Array
    """`[B, n, C]`, as `compress` takes them."""
    gates: jax.Array
    positions: jax.Array
    """int32 `[B, n]`; `PAD_POSITION` where there is none."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "entries", "pending", "recent"],
    meta_fields=["window"],
)
@dataclasses.dataclass(frozen=True)
class Compressed:
    """`rows [L, B, R, H]`, position p at `p % R`: R is `window - 1`, and what may be taken back.

    `entries` and `pending`: by name (`kv`, `index`), `[L, B, blocks, D]` with block w at w or
    `[L, P, blocks of a page, D]` (see `places`), and the parts of incomplete blocks; empty where a
    layer has the window alone. `recent`: tokens to take back, by name; empty where none are.
    """

    rows: jax.Array
    entries: dict[str, jax.Array]
    pending: dict[str, Parts]
    recent: dict[str, Recent]
    window: int

    keeps_slots = False
    in_pages = ("entries",)

    @property
    def rolls_back(self) -> bool:
        """Tell whether latest tokens may be taken back: what has merged stays merged."""
        return self.recent.keys() == self.pending.keys() and self.rows.shape[2] >= self.window

    @classmethod
    def empty(
        cls, room: Room, *, layers: int, window: int, head_dim: int, ratio: int, overlap: bool,
        sizes: Mapping[str, int],
    ) -> "Compressed":  # fmt: skip
        """`sizes`: channels of an entry, by name, of which there is one for `ratio` tokens."""

        def state(x):
            spec = (None,) * (x.ndim - 1)
            return room.for_state(layers, *x.shape[1:], spec=spec, dtype=x.dtype)

        parts = {name: no_pending(1, size, overlap) for name, size in sizes.items()}
        back = room.rolled_back
        recent = {name: _no_recent(1, back, size * (1 + overlap)) for name, size in sizes.items()}
        return cls(
            rows=room.for_state(layers, max(1, window - 1 + back), head_dim, spec=(None, None)),
            entries={
                name: room.for_blocks(layers, size, ratio=ratio) for name, size in sizes.items()
            },
            pending=jax.tree.map(state, parts),
            recent=jax.tree.map(state, recent) if back else {},
            window=window,
        )

    def compress(self, tokens, layer, values, gates, *, ratio, overlap, name):
        """Do as `WholeSequence.compress` does, with the blocks that these tokens complete."""
        axis = _axis(tokens)
        shards = 1 if axis is None else shards_of(AXIS)
        runs, width = 1, tokens.positions.shape[1] // shards
        if shards > 1:  # in any order each token may be a run by itself
            runs = width if tokens.layout is None else runs_of(tokens.layout, shards, width)
        local = functools.partial(
            _compress, ratio=ratio, overlap=overlap, runs=runs, axis_name=AXIS, shards=shards
        )
        spec, rows = P("data", axis), P("data")
        place = tokens.place.specs
        run = on_shards(
            local, (spec, spec, spec, STACK, P(), rows, rows, place), (spec, spec, STACK)
        )
        kept = self.pending[name], self.recent.get(name)
        entries, blocks, (pending, recent) = run(
            values, gates, tokens.positions, kept, jnp.int32(layer), tokens.before, tokens.after,
            tokens.place,
        )  # fmt: skip
        pending = self.pending | {name: pending}
        recent = self.recent if recent is None else self.recent | {name: recent}
        return (entries, blocks), dataclasses.replace(self, pending=pending, recent=recent)

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
        entries = P(*tokens.place.block_stack)
        specs = heads, spec, spec, spec, spec, spec, STACK, entries
        run = on_shards(
            local,
            (*specs, P(), rows, rows, tokens.place.specs),
            (heads, heads, STACK, entries),
        )
        out, lse, *kept = run(*arrays, jnp.int32(layer), tokens.before, tokens.after, tokens.place)
        kept = dataclasses.replace(self, rows=kept[0], entries=kept[1])
        return apply_sinks(out, lse, sinks)[0], kept


def _axis(tokens) -> str | None:
    """The mesh axis that shards the new tokens."""
    return AXIS if tokens.sharded and not jax.sharding.get_abstract_mesh().empty else None


def _strategy(tokens):
    return Ring() if tokens.strategy is None else tokens.strategy


def _compress(
    values, gates, positions, stack, layer, start, end, place, *, overlap, **options
):  # fmt: skip
    """`(entries, blocks)` of local tokens, and the stack of parts and recent tokens after them."""
    parts, recent = stack
    rows = values.shape[0]
    nothing = no_pending(rows, parts.values.shape[-1], overlap), None
    if recent is not None:
        nothing = nothing[0], _no_recent(rows, *recent.values.shape[2:])
    before, recent = jax.tree.map(
        lambda x, y: jnp.where((start > 0).reshape(-1, *[1] * (x.ndim - 1)), x, y),
        place.state(stack, layer),
        nothing,
    )
    if recent is not None:
        before = _settled(before, recent, start, overlap=overlap, ratio=options["ratio"])
    entries, blocks, after = compress_shard(
        values, gates, positions, before, end, overlap=overlap, **options
    )
    if recent is not None and values.shape[1] <= recent.positions.shape[1]:
        after, recent = before, _recent(values, gates, positions, recent)
    elif recent is not None:
        recent = nothing[1]
    return entries, blocks, place.with_state(stack, layer, (after, recent))


def _no_recent(rows, count, channels):
    zeros = jnp.zeros((rows, count, channels), jnp.float32)
    return Recent(zeros, zeros, jnp.full((rows, count), PAD_POSITION, jnp.int32))


def _recent(values, gates, positions, like):
    """Give the recent tokens, in as many places as `like` has."""
    pads = like.positions.shape[1] - positions.shape[1]
    values, gates = (jnp.pad(x, ((0, 0), (0, pads), (0, 0))) for x in (values, gates))
    positions = jnp.pad(positions, ((0, 0), (0, pads)), constant_values=PAD_POSITION)
    return Recent(values, gates, positions)


def _settled(parts, recent, start, **options):
    """Merge those recent tokens into the parts that are before the position `start [B]`."""
    positions = jnp.where(recent.positions < start[:, None], recent.positions, PAD_POSITION)
    *_, parts = compress_shard(
        recent.values, recent.gates, positions, parts, start, runs=1, shards=1, axis_name=AXIS,
        **options,
    )  # fmt: skip
    return parts


def _attend(q, kv, positions, blocks, new, picks, rows, entries, layer, start, end, place, *,
            ratio, window, scale, strategy, axis, top_k):  # fmt: skip
    """`(out, lse, rows, entries)` of local queries; `rows` and `entries` are those of a stack."""
    done = _new_tokens(q, kv, positions, window, scale, strategy, axis)
    kept = place.state(rows, layer)
    before = row_positions(start, kept.shape[1])
    k, v = shared_head(kept.astype(q.dtype))
    out, lse = flash_attention(
        q, k, v, q_positions=positions, kv_positions=before, window=window, scale=scale,
        carry=done, out_dtype=jnp.float32,
    )  # fmt: skip
    kept = renew(kept, kv, positions, start, end, axis_name=axis)
    rows = place.with_state(rows, layer, kept)
    if new:
        entries = place.write_blocks(entries, layer, new, blocks, ratio)
        seen = _entries(
            q, entries, layer, picks, positions, end, place, ratio=ratio, top_k=top_k, scale=scale
        )
        out, lse = merge((out, lse), merged(*seen) if place.divides_blocks else seen)
    return out.astype(q.dtype), lse, rows, entries


def _entries(q, entries, layer, picks, positions, end, place, *, ratio, top_k, scale):
    """`(out float32, lse)` of local queries over all entries, or over the `top_k` that are best.

    Where shards divide them, those of this shard.
    """
    if picks is None:
        keys, blocks = place.read_blocks(entries["kv"], layer, end, ratio)
        k, v = shared_head(keys.astype(q.dtype))
        return flash_attention(
            q, k, v, q_positions=positions, kv_positions=block_ends(blocks, ratio), scale=scale,
            out_dtype=jnp.float32,
        )  # fmt: skip
    if place.divides_blocks:  # few queries: who reads what they select copies no sequence
        index, blocks = place.read_blocks(entries["index"], layer, end, ratio)

        def keys(chosen):
            return place.entries_at(entries["kv"], layer, chosen).astype(q.dtype)
    else:
        there, blocks = place.read_blocks(entries, layer, end, ratio)
        keys, index = there["kv"].astype(q.dtype), there["index"]
    queries, weights = picks
    return attend_selected(
        q, keys, queries, weights, index, positions, block_ends(blocks, ratio), top_k=top_k,
        scale=scale, value_dim=q.shape[-1],
        axis_name=axis_in_scope() if place.divides_blocks else None,
    )  # fmt: skip


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
