# SPDX-License-Identifier: Apache-2.0
"""The cache of a model whose layers see a window of tokens and compressed blocks of the rest.

What a layer keeps is small, and the same on every device: the last `window - 1` rows, one entry
(and index key) for every complete block, and of the blocks that are not complete the parts that
will merge with what comes. A part is `(value, lse)` per channel, so that a pending block of 128
tokens is no larger than one entry.

`CompressedStep` attends for new tokens, many that are sharded (a prefill of any length, from
wherever the last one ended) or few that are the same everywhere (decoding; nothing travels).
Communication of a prefill, a device and layer: new keys by the strategy, parts as in `compressed`,
one all-gather of the new entries and one all-reduce of `window - 1` rows.
Memory: `(entry + index key) / ratio` channels a token, not divided by the number of devices: of
DeepSeek-V4-Flash 6.7 GiB at 1M tokens in bfloat16.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxcp.attention.blocks import compress_shard, no_pending, runs_of, shards_of
from jaxcp.attention.selected import Selection, attend_selected, shared_head
from jaxcp.attention.slots import check_size
from jaxcp.context_parallel.ring import Ring
from jaxcp.context_parallel.shards import on_shards
from jaxcp.context_parallel.strategy import Strategy
from pallas_kernels import PAD_POSITION, flash_attention
from pallas_kernels.flash_attention import Mask, apply_sinks
from pallas_kernels.online_softmax import merge

AXIS = "seq"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "entries", "pending", "lengths"],
    meta_fields=["window", "max_len"],
)
@dataclasses.dataclass(frozen=True)
class CompressedCache:
    """`rows` of a layer: `[B, window - 1, H]`, position p at `p % (window - 1)`.

    `entries` and `pending` of a layer: by name (`kv`, `index`), `[B, blocks, D]` with block w at w,
    and the parts of incomplete blocks; empty for a layer that has the window alone.
    """

    rows: tuple[jax.Array, ...]
    entries: tuple[dict[str, jax.Array], ...]
    pending: tuple[dict[str, Any], ...]
    lengths: jax.Array  # int32 [B]: tokens so far; the next token's position
    window: int
    max_len: int

    def bytes_per_device(self) -> int:
        """Bytes of rows, entries and pending parts that one device holds."""
        held = jax.tree.leaves((self.rows, self.entries, self.pending))
        return sum(x.addressable_shards[0].data.nbytes for x in held)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What a layer keeps beside its window. `sizes`: channels of an entry, by name."""

    ratio: int = 0
    overlap: bool = False
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)


def empty_compressed_cache(
    layers: list[LayerShape], *, batch_size: int, max_len: int, window: int, head_dim: int, dtype
) -> CompressedCache:
    """A cache for `max_len` tokens a row, on the mesh in scope."""
    check_size(batch_size, max_len)

    def entries(shape: LayerShape):
        blocks = max(1, max_len // shape.ratio) if shape.ratio else 0
        return {k: jnp.zeros((batch_size, blocks, d), dtype) for k, d in shape.sizes.items()}

    def pending(shape: LayerShape):
        return {k: no_pending(batch_size, d, shape.overlap) for k, d in shape.sizes.items()}

    @jax.jit
    def make():
        rows = batch_size, max(1, window - 1), head_dim
        cache = CompressedCache(
            rows=tuple(jnp.zeros(rows, dtype) for _ in layers),
            entries=tuple(map(entries, layers)),
            pending=tuple(map(pending, layers)),
            lengths=jnp.zeros(batch_size, jnp.int32),
            window=window,
            max_len=max_len,
        )
        return cache if _no_mesh() else jax.tree.map(_by_row, cache)

    return make()


class CompressedStep:
    """`attend` of new tokens over a `CompressedCache`, which they join.

    Args:
      positions: int32 `[B, T]`, from `cache.lengths` on; `PAD_POSITION` for pads.
      added: int32 `[B]`, tokens of each row that are none.
      sharded: the tokens lie over `seq`, in `strategy.layout` (default zigzag); else every
        device has them all.
    """

    keeps_rows = True

    def __init__(self, cache: CompressedCache, positions, added, *, sharded: bool,
                 strategy: Strategy | None = None):  # fmt: skip
        self.cache, self.positions, self.added = cache, positions, added
        self.strategy = Ring() if strategy is None else strategy
        if not self.strategy.fills_caches:
            raise NotImplementedError("prefill over a cache has no reproducible form; use Ring()")
        self.axis = AXIS if sharded and not _no_mesh() else None
        self.rows = list(cache.rows)
        self.entries = [dict(x) for x in cache.entries]
        self.pending = [dict(x) for x in cache.pending]

    def compress(self, values, gates, *, ratio, overlap, layer, name):
        """As `WholeSequence.compress`, of the blocks that these tokens complete."""
        shards = 1 if self.axis is None else shards_of(AXIS)
        runs = runs_of(self.strategy.layout, shards, self.positions.shape[1] // shards)
        local = functools.partial(
            compress_shard, ratio=ratio, overlap=overlap, runs=runs, axis_name=AXIS, shards=shards
        )
        tokens, rows = P("data", self.axis), P("data")
        run = on_shards(local, (tokens, tokens, tokens, rows, rows), (tokens, tokens, rows))
        end = self.cache.lengths + self.added
        entries, blocks, self.pending[layer][name] = run(
            values, gates, self.positions, self.pending[layer][name], end
        )
        return entries, blocks

    def shared(self, q, kv, *, layer, window, scale, sinks):
        """The window alone."""
        return self._attend(q, kv, None, {}, 0, layer, window, scale, sinks, None)

    def compressed(self, q, kv, entries, blocks, *, ratio, window, scale, sinks, layer,
                   selection: Selection | None = None):  # fmt: skip
        new = {"kv": entries}
        if selection is not None:
            new["index"] = selection.keys
        return self._attend(q, kv, blocks, new, ratio, layer, window, scale, sinks, selection)

    def _attend(self, q, kv, blocks, new, ratio, layer, window, scale, sinks, selection):
        self._check(window)
        tokens, rows = P("data", self.axis), P("data")
        heads = P("data", self.axis, "model")
        picks = None if selection is None else (selection.queries, selection.weights)
        local = functools.partial(
            _attend, ratio=ratio, window=window, scale=scale, strategy=self.strategy,
            axis=self.axis, top_k=None if selection is None else selection.top_k,
        )  # fmt: skip
        run = on_shards(
            local,
            (heads, tokens, tokens, tokens, tokens, tokens, rows, rows, rows, rows),
            (heads, heads, rows, rows),
        )
        out, lse, self.rows[layer], self.entries[layer] = run(
            q, kv, self.positions, blocks, new, picks, self.rows[layer], self.entries[layer],
            self.cache.lengths, self.cache.lengths + self.added,
        )  # fmt: skip
        return apply_sinks(out, lse, sinks)[0]

    def _check(self, window):
        if window != self.cache.window:
            raise ValueError(f"the cache keeps a window of {self.cache.window}; got {window}")

    def after(self) -> CompressedCache:
        """The cache after all layers."""
        return dataclasses.replace(
            self.cache,
            rows=tuple(self.rows),
            entries=tuple(self.entries),
            pending=tuple(self.pending),
            lengths=self.cache.lengths + self.added,
        )


def _attend(q, kv, positions, blocks, new, picks, rows, entries, start, end, *,
            ratio, window, scale, strategy, axis, top_k):  # fmt: skip
    """`(out, lse, rows, entries)` of local queries."""
    done = _new_tokens(q, kv, positions, window, scale, strategy, axis)
    before = _positions_of(rows, start)
    k, v = shared_head(rows.astype(q.dtype))
    out, lse = flash_attention(
        q, k, v, q_positions=positions, kv_positions=before, window=window, scale=scale,
        carry=done, out_dtype=jnp.float32,
    )  # fmt: skip
    rows = _renewed(rows, kv, positions, end, axis)
    if new:
        if axis is not None:
            new, blocks = lax.all_gather((new, blocks), axis, axis=1, tiled=True)
        line = jnp.arange(blocks.shape[0])[:, None]
        entries = {
            name: x.at[line, blocks].set(new[name].astype(x.dtype), mode="drop")
            for name, x in entries.items()
        }
        keys = entries["kv"].astype(q.dtype)
        number = jnp.arange(keys.shape[1])
        ends = jnp.where(number < (end // ratio)[:, None], (number + 1) * ratio - 1, PAD_POSITION)
        if picks is None:
            k, v = shared_head(keys)
            out, lse = flash_attention(
                q, k, v, q_positions=positions, kv_positions=ends, scale=scale, carry=(out, lse),
                out_dtype=jnp.float32,
            )  # fmt: skip
        else:
            index = entries["index"].astype(jnp.float32)
            found = attend_selected(
                q, keys, picks[0], picks[1], index, positions, ends, top_k=top_k, scale=scale,
                value_dim=q.shape[-1],
            )  # fmt: skip
            out, lse = merge((out, lse), found)
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


def _positions_of(rows, end):
    """The position that each of the rows `[B, R, H]` holds, `[B, R]`, with `end [B]` tokens."""
    size = rows.shape[1]
    newest = end[:, None] - 1
    found = newest - (newest - jnp.arange(size)) % size
    return jnp.where(found < 0, PAD_POSITION, found)


def _renewed(rows, kv, positions, end, axis):
    """The rows with the new tokens' that are among the last."""
    batch, size = rows.shape[:2]
    last = (positions != PAD_POSITION) & (positions >= end[:, None] - size)
    slot = jnp.where(last, positions % size, size)  # out of range: dropped
    line = jnp.arange(batch)[:, None]
    new = jnp.zeros_like(rows).at[line, slot].set(kv.astype(rows.dtype), mode="drop")
    taken = jnp.zeros((batch, size), jnp.int32).at[line, slot].set(1, mode="drop")
    if axis is not None:  # each is on one shard
        new, taken = lax.psum((new, taken), axis)
    return jnp.where((taken > 0)[..., None], new, rows)


def _no_mesh() -> bool:
    return jax.sharding.get_abstract_mesh().empty


def _by_row(x):
    return jax.sharding.reshard(x, P("data", *[None] * (x.ndim - 1)))
