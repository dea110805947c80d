# SPDX-License-Identifier: Apache-2.0
"""The cache, and the two ways to attend over it.

A layer that sees everything keeps a key and a value for each slot, and slots are sharded. A slot
belongs to no position: it holds whatever token was written there, and its position says which. So
new tokens go wherever there is room, shards fill evenly over any number of turns, and an empty
slot (position `PAD_POSITION`) masks itself. Rows of a batch fill their slots each for itself, as
their lengths say. A layer with a window keeps the newest tokens alone, on
every device (`window_cache`).

`Prefill`: many new tokens, sharded like the cache; keys travel by the strategy.
`Extend`: few new tokens, the same on every device; each attends to its own shard and one
collective merges `(out, lse)`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxcp.attention import window as window_cache
from jaxcp.attention.selected_cache import attend_selected_slots
from jaxcp.attention.slots import (
    AXIS,
    ROWS,
    SAME,
    SHARDED,
    TOKENS,
    WHOLE,
    axis_in_scope,
    check_size,
    deal_rows,
    on_mesh,
    shards_in_scope,
    slots_in_use,
    write_first,
    write_rows,
)
from jaxcp.context_parallel.api import weight_spec
from jaxcp.context_parallel.ring import Ring
from jaxcp.context_parallel.ring_pass_q import RingPassQ
from jaxcp.context_parallel.shards import on_shards
from jaxcp.context_parallel.strategy import Strategy
from pallas_kernels import PAD_POSITION, decode_attention, flash_attention
from pallas_kernels.decode_attention import MAX_QUERIES
from pallas_kernels.flash_attention import Mask, apply_sinks, attention_forward
from pallas_kernels.online_softmax import merge_stacked

MAX_EXTEND = 64
"""Tokens that `Extend` takes at most; slots that a shard has for pads beyond its share."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "positions", "lengths", "recent"],
    meta_fields=["windows", "shards", "max_len"],
)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer. S = shards * slots per shard."""

    k: tuple[jax.Array, ...]  # a layer: [B, S, K, H], sharded; with a window [B, R, K, H], not
    v: tuple[jax.Array, ...]
    positions: jax.Array  # int32 [B, S]
    lengths: jax.Array  # int32 [B]: tokens in the cache; the next token's position
    recent: jax.Array  # int32 [B, W - 1]: the latest token ids, newest first, for n-gram embeddings
    windows: tuple[int | None, ...]  # a layer: it keeps no more than this needs
    shards: int
    max_len: int

    @property
    def slots(self) -> int:
        """Slots a shard."""
        return self.positions.shape[1] // self.shards

    @property
    def fill(self) -> np.ndarray:
        """Slots in use of each shard, `[shards]`, by the longest row."""
        return slots_in_use(np.asarray(self.lengths).max(), np.arange(self.shards), self.shards)

    def bytes_per_device(self) -> int:
        """Bytes of keys and values that one device holds."""
        return sum(x.addressable_shards[0].data.nbytes for x in (*self.k, *self.v))


def empty_cache(
    *,
    layers: int,
    batch_size: int,
    max_len: int,
    num_kv_heads: int,
    head_dim: int,
    dtype,
    recent: int = 0,
    windows: tuple[int | None, ...] | None = None,
) -> KVCache:
    """A cache for `max_len` tokens a row, on the mesh in scope.

    `windows`: of each layer, None for one that sees everything.
    """
    windows = (None,) * layers if windows is None else windows
    if len(windows) != layers:
        raise ValueError(f"windows must name {layers} layers; got {windows}")
    check_size(batch_size, max_len)
    shards = shards_in_scope()
    total = shards * (-(-max_len // shards) + MAX_EXTEND)

    def layer(window):
        rows = total if window is None else window - 1 + MAX_EXTEND
        zeros = jnp.zeros((batch_size, rows, num_kv_heads, head_dim), dtype)
        return on_mesh(zeros, SHARDED if window is None else WHOLE)

    @jax.jit
    def make():
        positions = jnp.full((batch_size, total), PAD_POSITION, jnp.int32)
        return KVCache(
            k=tuple(map(layer, windows)),
            v=tuple(map(layer, windows)),
            positions=on_mesh(positions, TOKENS),
            lengths=on_mesh(jnp.zeros(batch_size, jnp.int32), ROWS),
            recent=on_mesh(jnp.full((batch_size, recent), -1, jnp.int32), P("data", None)),
            windows=windows,
            shards=shards,
            max_len=max_len,
        )

    return make()


class Prefill:
    """Attention of new tokens `[B, T]` (sharded over `seq`) over the cache, which it fills.

    Every shard writes its `T / shards` new rows behind what it holds of each row.

    Args:
      added: int32 `[B]`, new tokens of each row.
      strategy: for layers that see everything; None passes queries around where that sends less
        than rotating keys (`RingPassQ.fewer_bytes`), else it is `Ring()`.
      used: (static) bounds the slots that a shard holds afterwards, and only those travel; None:
        the cache was empty.
      halos: by window, what shards send each other of the new tokens: see `window_cache.attend`.
    """

    keeps_rows = True

    def __init__(self, cache: KVCache, positions, added, *, strategy: Strategy | None, used, halos):
        if strategy is not None and not strategy.fills_caches:
            raise NotImplementedError("prefill over a cache has no reproducible form; use Ring()")
        self.cache, self.positions, self.strategy = cache, positions, strategy
        self.added, self.halos, self.empty = added, halos, used is None
        self.used = positions.shape[1] // cache.shards if used is None else used
        self.write = write_first if self.empty else write_rows
        self.k, self.v = list(cache.k), list(cache.v)
        write = on_shards(self.write, (TOKENS, TOKENS, ROWS), TOKENS)
        self.kv_positions = write(cache.positions, positions, cache.lengths)

    def __call__(self, q, k, v, *, layer, window, sinks=None, scale=None, soft_cap=None):
        options, more = _options(q, window, scale, soft_cap), [(self.positions, TOKENS)]
        if _keeps_window(self.cache, layer, window):
            local, held = functools.partial(self._windowed, **options), WHOLE
            more += [(self.cache.lengths, ROWS), (self.added, ROWS), (self.halos[window], SAME)]
        else:
            local, held = functools.partial(self._full, **options), SHARDED
            more += [(self.kv_positions, TOKENS), (self.cache.lengths, ROWS)]
        return _run(self, layer, local, SHARDED, held, (q, k, v), more, sinks)

    def latent(self, q, latent, weights, *, expand, layer, scale):
        """Of a `latent_cache`: `(latent, key part)` of the tokens, as `latent_attention`'s."""
        local = functools.partial(self._latent, expand=expand, scale=scale)
        whole = tuple(weight_spec(x, SHARDED) for x in weights)
        run = on_shards(local, (SHARDED, *[TOKENS] * 4, ROWS, whole), (SHARDED, TOKENS))
        new, held = jnp.concatenate(latent, axis=-1)[:, :, None], self.k[layer]
        ids = self.positions, self.kv_positions, self.cache.lengths
        out, self.k[layer] = run(q, new, held, *ids, weights)
        return out

    def selected(self, q, keys, selection, *, layer, **options):
        """Of a `latent_cache` with an index: see `WholeSequence.selected`."""
        return attend_selected_slots(
            self, q, keys, selection, self.write, layer=layer, used=self.used, **options
        )

    def _latent(self, q, new, held, q_pos, kv_pos, lengths, weights, *, expand, scale):
        held = self.write(held, new, lengths)
        seen = jnp.split(held[:, : self.used, 0].astype(q.dtype), [weights[0].shape[0]], axis=-1)
        kv_pos = kv_pos[:, : self.used]
        if axis_in_scope() is None:
            k, v = expand(seen, *weights)
            positions = {"q_positions": q_pos, "kv_positions": kv_pos}
            return flash_attention(q, k, v, **positions, scale=scale)[0], held
        strategy = Ring() if self.strategy is None else self.strategy
        options = {"axis_name": AXIS, "mask": Mask(), "implementation": None, "soft_cap": None}
        arrays = q, seen, None, q_pos, kv_pos, None, None
        out, _ = strategy.attend(*arrays, expand=expand, weights=weights, scale=scale, **options)
        return out, held

    def _full(self, q, k, v, cache_k, cache_v, q_pos, kv_pos, lengths, sinks, *, window, **options):
        cache_k, cache_v = self.write(cache_k, k, lengths), self.write(cache_v, v, lengths)
        seen_k, seen_v = (x[:, : self.used].astype(q.dtype) for x in (cache_k, cache_v))
        kv_pos = kv_pos[:, : self.used]
        if axis_in_scope() is None:
            positions = {"q_positions": q_pos, "kv_positions": kv_pos}
            out, lse = flash_attention(q, seen_k, seen_v, **positions, window=window, **options)
        else:
            strategy = self.strategy
            if strategy is None:
                strategy = RingPassQ() if RingPassQ.fewer_bytes(q, seen_k, seen_v) else Ring()
            options |= {"axis_name": AXIS, "mask": Mask(window=window), "implementation": None}
            out, lse = strategy.attend(q, seen_k, seen_v, q_pos, kv_pos, None, None, **options)
        return _with_sinks(out, lse, sinks), cache_k, cache_v

    def _windowed(self, q, k, v, held_k, held_v, pos, start, added, halo, sinks, **options):
        held = None
        if not self.empty:
            before = window_cache.positions_held(start, held_k.shape[1])
            held = held_k.astype(q.dtype), held_v.astype(q.dtype), before
        options["axis_name"] = axis_in_scope()
        out, lse = window_cache.attend(q, k, v, pos, held, halo, **options)
        tokens = pos, start, start + added
        held_k, held_v = (
            window_cache.renew(x, new, *tokens, axis_name=axis_in_scope())
            for x, new in ((held_k, k), (held_v, v))
        )
        return _with_sinks(out, lse, sinks), held_k, held_v

    def filled(self, recent) -> KVCache:
        """The cache after all layers."""
        return _after(self, self.added, recent)


class Extend:
    """Attention of a few new tokens `[B, T]` over the cache, which they join.

    The tokens are the same on every shard; their keys are dealt out one by one, to the shard whose
    turn it is in each row. One all-gather a layer carries the partial results:
    `shards * B * T * N * (H + 1)` float32. A layer that keeps its window alone sends nothing.
    """

    keeps_rows = True

    def __init__(self, cache: KVCache, positions):
        if positions.shape[1] > MAX_EXTEND:  # more would push out of a window what it still needs
            raise ValueError(f"at most {MAX_EXTEND} tokens; got {positions.shape[1]}: use Prefill")
        self.cache, self.positions = cache, positions
        self.k, self.v = list(cache.k), list(cache.v)
        local = functools.partial(deal_rows, pad=PAD_POSITION)
        write = on_shards(local, (TOKENS, ROWS, ROWS), TOKENS)
        self.kv_positions = write(cache.positions, positions, cache.lengths)

    def __call__(self, q, k, v, *, layer, window, sinks=None, scale=None, soft_cap=None):
        options, more = _options(q, window, scale, soft_cap), [(self.positions, ROWS)]
        if _keeps_window(self.cache, layer, window):
            local, held = functools.partial(_extend_window, **options), WHOLE
            more += [(self.cache.lengths, ROWS)]
        else:
            local, held = functools.partial(_extend_full, **options), SHARDED
            more += [(self.kv_positions, TOKENS), (self.cache.lengths, ROWS)]
        return _run(self, layer, local, WHOLE, held, (q, k, v), more, sinks)

    def latent(self, q, latent, weights, *, expand, layer, scale):
        """Of a `latent_cache`: heads meet the latent itself, projections absorbed."""
        local, rows = functools.partial(_extend_latent, scale=scale), P("data")
        specs = WHOLE, rows, TOKENS, rows, TOKENS, ROWS
        whole = tuple(weight_spec(x, WHOLE) for x in weights)
        run = on_shards(local, (*specs, whole), (WHOLE, TOKENS))
        new = jnp.concatenate(latent, axis=-1)[:, :, None]
        state = self.k[layer], self.positions, self.kv_positions, self.cache.lengths
        out, self.k[layer] = run(q, new, *state, weights)
        return out

    def selected(self, q, keys, selection, *, layer, **options):
        """Of a `latent_cache` with an index: see `WholeSequence.selected`."""
        return attend_selected_slots(self, q, keys, selection, deal_rows, layer=layer, **options)

    def extended(self, added, recent) -> KVCache:
        """The cache after all layers, with `added [B]` tokens a row."""
        return _after(self, added, recent)


def _extend_full(q, k, v, cache_k, cache_v, q_pos, kv_pos, lengths, sinks, **options):
    cache_k, cache_v = deal_rows(cache_k, k, lengths), deal_rows(cache_v, v, lengths)
    out, lse = _attend(q, cache_k, cache_v, q_pos, kv_pos, **options)
    if axis_in_scope() is not None:
        packed = lax.all_gather(jnp.concatenate([out, lse[..., None]], axis=-1), AXIS)
        out, lse = merge_stacked(packed[..., :-1], packed[..., -1])
    return _with_sinks(out, lse, sinks).astype(q.dtype), cache_k, cache_v


def _extend_latent(q, new, held, q_pos, kv_pos, lengths, weights, *, scale):
    held, (k_up, v_up) = deal_rows(held, new, lengths), weights
    nope = k_up.shape[-1]
    absorbed = jnp.einsum("btnh,lnh->btnl", q[..., :nope], k_up)
    q = jnp.concatenate([absorbed, q[..., nope:]], axis=-1)
    options = {"window": None, "soft_cap": None, "scale": scale}
    out, lse = _attend(q, held, held[..., : k_up.shape[0]], q_pos, kv_pos, **options)
    if axis_in_scope() is not None:
        packed = lax.all_gather(jnp.concatenate([out, lse[..., None]], axis=-1), AXIS)
        out, _ = merge_stacked(packed[..., :-1], packed[..., -1])
    return jnp.einsum("btnl,lnv->btnv", out.astype(q.dtype), v_up), held


def _extend_window(q, k, v, held_k, held_v, pos, start, sinks, **options):
    held_k, held_v = (window_cache.append(x, new, pos) for x, new in ((held_k, k), (held_v, v)))
    end = start + (pos != PAD_POSITION).sum(1, dtype=jnp.int32)
    kv_pos = window_cache.positions_held(end, held_k.shape[1])
    out, lse = _attend(q, held_k, held_v, pos, kv_pos, **options)
    return _with_sinks(out, lse, sinks).astype(q.dtype), held_k, held_v


def _attend(q, k, v, q_pos, kv_pos, *, window, **options):
    """`(out, lse)` of this shard, out in float32: no backward pass comes, so few rows may split."""
    options["out_dtype"] = jnp.float32
    if q.shape[1] <= MAX_QUERIES:
        positions = {"q_positions": q_pos, "kv_positions": kv_pos}
        return decode_attention(q, k, v, **positions, window=window, **options)
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    arrays = q, k, v, q_pos, kv_pos, None, None
    return attention_forward(*arrays, mask=Mask(window=window), **options)


def _run(step, layer, local, new, held, qkv, more, sinks):
    """`local` on every device's shards, and what it makes of the layer's cache kept in `step`.

    `new` is the layout of q, k and v, `held` that of the cache; `more` are pairs of an array (or
    a tree) and its layout.
    """
    arrays, specs = zip(*more, strict=True)
    run = on_shards(local, (*[new] * 3, held, held, *specs, P("model")), (new, held, held))
    some = () if sinks is None else (sinks,)
    found = run(*qkv, step.k[layer], step.v[layer], *arrays, some)
    out, step.k[layer], step.v[layer] = found
    return out


def _options(q, window, scale, soft_cap):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return {"window": window, "scale": scale, "soft_cap": soft_cap}


def _keeps_window(cache: KVCache, layer: int, window: int | None) -> bool:
    """Whether the layer's cache is that of `window_cache`."""
    kept = cache.windows[layer]
    if kept is not None and kept != window:
        raise ValueError(
            f"layer {layer} attends with window={window}, but its cache was made for {kept}: "
            "the model's `windows()` must say what its layers do"
        )
    return kept is not None


def _with_sinks(out, lse, sinks):
    """`out` of finished rows with the sinks, none or one array: once, after the last merge."""
    return apply_sinks(out, lse, *sinks)[0] if sinks else out


def _after(step: Prefill | Extend, added, recent) -> KVCache:
    """The cache that `step` leaves, with `added [B]` tokens a row."""
    cache = step.cache
    return dataclasses.replace(
        cache,
        k=tuple(step.k),
        v=tuple(step.v),
        positions=step.kv_positions,
        lengths=cache.lengths + added,
        recent=recent,
    )
