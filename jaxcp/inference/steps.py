# SPDX-License-Identifier: Apache-2.0
"""Token ids in, arrays out: prefill, one decode step, whole-sequence logits.

The host decides where tokens go (layout, shards, padding); what runs on devices is two jitted
functions. Both donate the cache: use the one that comes back.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxcp.context_parallel import Ring, Strategy
from jaxcp.context_parallel.cache_slots import check_rows
from jaxcp.context_parallel.compressed_cache import CompressedCache
from jaxcp.context_parallel.halo import rows_to_send
from jaxcp.context_parallel.kv_cache import MAX_EXTEND, Extend, KVCache, Prefill
from jaxcp.context_parallel.overlap import compiler_options
from jaxcp.inference.checks import integers, token_ids
from jaxcp.inference.compressed_steps import prefill_compressed
from jaxcp.layers.ngram import windows
from pallas_kernels import PAD_POSITION
from pallas_kernels.dispatch import target_platform

EXTEND_SIZES = (1, 8, 32, MAX_EXTEND)
"""Widths to which short turns are padded; longer turns are prefilled by the strategy."""


def prefill(
    model: Any,
    cache: KVCache,
    tokens: Any,
    *,
    lengths: Any = None,
    attention: Strategy | None = None,
    donate=True,
) -> tuple[jax.Array, KVCache]:
    """Append tokens to the cache; `(logits [B, V] after each row's last real token, cache)`.

    Only these tokens are computed; what the cache holds is reused. A short turn on a filled cache
    runs replicated (`Extend`), a longer one sharded by the strategy.

    Args:
      tokens: int `[B, T]`, natural order, on the host.
      lengths: int `[B]`, real tokens of each row; default T.
      attention: the strategy of a long turn; None takes `Ring()`, or `RingPassQ()` where the cache
        is so long that it sends less. Layers with a window send their window, whatever this is.
      donate: False keeps the given cache alive, for forks.
    Raises:
      ValueError: no tokens, rows that do not fit the cache, ids out of range.
    """
    tokens = token_ids(model, tokens)
    lengths = _check_tokens(cache, tokens, lengths)
    if isinstance(cache, CompressedCache):
        return prefill_compressed(model, cache, tokens, lengths, attention, donate)
    start, fill = np.asarray(cache.lengths), np.asarray(cache.fill)
    tokens = tokens[:, : lengths.max()]
    offsets = np.arange(tokens.shape[1], dtype=np.int32)
    real = offsets < lengths[:, None]
    positions = np.where(real, start[:, None] + offsets, PAD_POSITION).astype(np.int32)
    width = cache.recent.shape[1] + 1
    tokens = windows(tokens, width, before=np.asarray(cache.recent))
    (recent,) = _put((_recent_after(tokens, lengths, width),), P("data", None))
    if fill.max() > 0 and tokens.shape[1] <= EXTEND_SIZES[-1]:
        width = next(size for size in EXTEND_SIZES if size >= tokens.shape[1])
        pad = [(0, 0), (0, width - tokens.shape[1])]
        arrays = _pad(tokens, pad), np.pad(positions, pad, constant_values=PAD_POSITION)
        _check_room(int(fill.max()) + -(-width // cache.shards), cache)
        return _jitted(_extend, donate)(
            model, cache, *_put(arrays, P("data", None)), lengths, recent
        )
    tokens, positions, counts, halos = _spread(attention, cache, tokens, positions, fill)
    width = tokens.shape[1] // cache.shards
    _check_room(int(fill.max()) + width, cache)
    last = (start + lengths - 1).astype(np.int32)
    return _jitted(_prefill, donate)(
        model,
        cache,
        *_put((tokens, positions), P("data", "seq")),
        last,
        lengths,
        counts,
        recent,
        halos,
        attention,
        _used(cache, int(fill.max()), width),
    )


def decode_step(
    model: Any, cache: KVCache, next_token: Any, *, donate: bool = True
) -> tuple[jax.Array, KVCache]:
    """One token a row `[B]` joins the cache; `(logits [B, V] for the one after it, cache)`.

    Raises:
      ValueError: the cache is full, ids out of range.
    """
    longest = int(np.asarray(cache.lengths).max())
    if longest >= cache.max_len:
        raise ValueError(
            f"the cache is full: {longest} of max_len={cache.max_len} tokens; make a longer one"
        )
    token = token_ids(model, next_token)
    if token.shape != cache.lengths.shape:
        raise ValueError(
            f"next_token must be [{cache.lengths.shape[0]}], one a row; got {token.shape}"
        )
    if isinstance(cache, CompressedCache):
        one = np.ones(token.shape, np.int32)
        return prefill_compressed(model, cache, token[:, None], one, None, donate)
    _check_room(int(np.asarray(cache.fill).max()) + 1, cache)
    return _jitted(_decode, donate)(model, cache, token)


def logits(model: Any, tokens: Any, *, attention: Strategy | None = None) -> jax.Array:
    """Float32 logits `[B, T, V]` of every token, in natural order, on the host."""
    tokens = token_ids(model, tokens)
    if tokens.ndim != 2 or not tokens.size:
        raise ValueError(f"tokens must be [B, T] with at least one token; got {tokens.shape}")
    check_rows(len(tokens))
    limit = getattr(model.config, "max_positions", tokens.shape[1])
    if tokens.shape[1] > limit:
        raise ValueError(f"the model has {limit} positions; got {tokens.shape[1]} tokens")
    strategy = Ring() if attention is None else attention
    shards = jax.sharding.get_abstract_mesh().shape.get("seq", 1)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    tokens = windows(tokens, getattr(model.config, "ngram_width", 1))
    batch = strategy.layout.permute({"tokens": tokens, "positions": positions}, shards)
    batch = _put((batch["tokens"], batch["positions"]), P("data", "seq"))
    whole = _jitted(_whole, False)
    return strategy.layout.inverse(whole(model, *batch, strategy), shards, tokens.shape[1])


def _whole(model, tokens, positions, strategy):
    return model(tokens, positions, attention=strategy, consecutive=True)


def _prefill(model, cache, tokens, positions, last, lengths, counts, recent, halos, strategy, used):
    attend = Prefill(cache, positions, lengths, strategy=strategy, used=used, halos=halos)
    hidden, _ = model.forward(tokens, positions, attend)
    return _at(model, hidden, positions, last), attend.filled(counts, recent)


def _extend(model, cache, tokens, positions, lengths, recent):
    attend = Extend(cache, positions)
    hidden, _ = model.forward(tokens, positions, attend)
    last = cache.lengths + lengths - 1
    return _at(model, hidden, positions, last), attend.extended(lengths, recent)


def _decode(model, cache, token):
    if not jax.sharding.get_abstract_mesh().empty:  # it comes from the host
        token = jax.sharding.reshard(token, P("data"))
    window = jnp.concatenate([token[:, None], cache.recent], axis=1)
    tokens, positions = window[:, None] if window.shape[1] > 1 else window, cache.lengths[:, None]
    return _extend(model, cache, tokens, positions, jnp.ones_like(token), window[:, :-1])


def _at(model, hidden, positions, last):
    """Logits `[B, V]` of the token whose position is `last [B]`, wherever it lies."""
    here = (positions == last[:, None]).astype(hidden.dtype)
    sharding = None if jax.sharding.get_abstract_mesh().empty else P("data", None)
    row = jnp.einsum("bt,btd->bd", here, hidden, out_sharding=sharding)
    return model.logits(row[:, None])[:, 0]


def _jitted(fn, donate: bool):
    return _jit(fn, donate, target_platform())


@functools.cache
def _jit(fn, donate: bool, platform: str):
    return jax.jit(
        fn,
        static_argnums={_prefill: (9, 10), _whole: (3,)}.get(fn, ()),
        donate_argnums=(1,) if donate else (),
        compiler_options=compiler_options(platform),
    )


def _spread(strategy, cache, tokens, positions, fill):
    """Tokens and positions in shard order, how many slots each shard gains, and the halos.

    The layout's places are more than there are tokens. Which of them stay empty is chosen so that
    afterwards no shard holds more than one slot more than another, whatever the turns; they are
    spread evenly, so the work stays balanced as in the layout.
    """
    layout = (Ring() if strategy is None else strategy).layout
    shards, length = cache.shards, tokens.shape[1]
    width = layout.padded_length(length, shards) // shards
    longer = layout.padded_length(shards * _bucket(width), shards) // shards
    width = longer if int(fill.max()) + longer <= cache.slots else width
    counts = _gains(fill, length)
    places = layout.places(shards * width, shards)
    kept = [row[np.arange(n) * width // max(n, 1)] for row, n in zip(places, counts, strict=True)]
    natural = np.argsort(np.argsort(np.concatenate(kept)))  # their ranks are the natural indices
    order = np.full((shards, width), length)  # `length` is a pad
    for row, mine in zip(order, np.split(natural, np.cumsum(counts)[:-1]), strict=True):
        row[: len(mine)] = np.sort(mine)
    flat, one = order.reshape(-1), [(0, 0), (0, 1)]
    positions = np.pad(positions, one, constant_values=PAD_POSITION)[:, flat]
    halos = {window: _halo(order, length, window) for window in {*cache.windows} - {None}}
    return _pad(tokens, one)[:, flat], positions, counts.astype(np.int32), halos


def _gains(fill, length):
    """Slots that each shard gains of `length`: then no two differ by more than one."""
    each, more = divmod(int(fill.sum()) + length, len(fill))
    level = np.full(len(fill), each)
    level[np.argsort(-fill, kind="stable")[:more]] += 1
    assert (level >= fill).all(), (fill, length)  # they did not differ by more before
    return level - fill


def _halo(order, length, window):
    """What shards send each other for a window (see `window_cache.attend`)."""
    rows = rows_to_send([(order, length)], window)
    sent = sum(table.shape[1] for table in rows.values())
    return None if 2 * sent > (len(order) - 1) * order.shape[1] > 0 else rows


def _used(cache, fill, width) -> int:
    """Slots of a shard that a prefill may look at."""
    return width if fill == 0 else min(_bucket(fill + width), cache.slots)


def _pad(x, pad):
    """`np.pad` with zeros; axes that `pad` does not name stay."""
    return np.pad(x, [*pad, *[(0, 0)] * (x.ndim - len(pad))])


def _recent_after(tokens, lengths, width):
    """The newest `width - 1` ids of each row after its last real token."""
    if width == 1:
        return np.zeros((len(lengths), 0), np.int32)
    return tokens[np.arange(len(lengths)), lengths - 1, : width - 1]


def _bucket(size: int) -> int:
    """The next of eight sizes between powers of two: few compilations, little padding."""
    step = max(1, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


def _put(arrays, spec):
    if jax.sharding.get_abstract_mesh().empty:
        return tuple(jnp.asarray(x, jnp.int32) for x in arrays)
    return tuple(jax.device_put(np.asarray(x, np.int32), spec) for x in arrays)


def _check_tokens(cache, tokens, lengths):
    batch = cache.lengths.shape[0]
    if tokens.ndim != 2 or tokens.shape[0] != batch or tokens.shape[1] < 1:
        raise ValueError(f"tokens must be [{batch}, T] with at least one token; got {tokens.shape}")
    if lengths is None:
        lengths = np.full(batch, tokens.shape[1])
    lengths = integers("lengths", lengths)
    if lengths.shape != (batch,) or lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        raise ValueError(f"lengths must be [{batch}] in 1..{tokens.shape[1]}; got {lengths}")
    lengths = lengths.astype(np.int32)
    needed = int((np.asarray(cache.lengths) + lengths).max())
    if needed > cache.max_len:
        raise ValueError(
            f"{needed} tokens do not fit max_len={cache.max_len} ({tokens.shape[1]} new ones); "
            "shorten the prompt or make the engine or cache with a larger max_len"
        )
    return lengths


def _check_room(needed, cache):
    if needed > cache.slots:
        raise ValueError(
            f"a shard needs {needed} slots and has {cache.slots}; "
            "make the cache with a larger max_len"
        )
