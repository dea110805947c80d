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
from jaxcp.context_parallel.kv_cache import Extend, KVCache, Prefill
from jaxcp.layers.ngram import windows
from pallas_kernels import PAD_POSITION

EXTEND_SIZES = (1, 8, 32, 64)
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
      donate: False keeps the given cache alive, for forks.
    Raises:
      ValueError: no tokens, rows that do not fit the cache, ids out of range.
    """
    tokens = np.asarray(tokens)
    lengths = _check_tokens(model, cache, tokens, lengths)
    start, fill = np.asarray(cache.lengths), np.asarray(cache.fill)
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
    strategy = Ring() if attention is None else attention
    tokens, positions, counts = _spread(strategy, cache, tokens, positions, fill)
    width = tokens.shape[1] // cache.shards
    _check_room(fill.max() + width, cache)
    used = min(_bucket(int(fill.max()) + width), cache.slots)
    last = (start + lengths - 1).astype(np.int32)
    return _jitted(_prefill, donate)(
        model,
        cache,
        *_put((tokens, positions), P("data", "seq")),
        last,
        lengths,
        counts,
        recent,
        strategy,
        used,
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
    token = np.asarray(next_token)
    if token.shape != cache.lengths.shape:
        raise ValueError(
            f"next_token must be [{cache.lengths.shape[0]}], one a row; got {token.shape}"
        )
    check_ids(model, token)
    _check_room(int(np.asarray(cache.fill).max()) + 1, cache)
    return _jitted(_decode, donate)(model, cache, token.astype(np.int32))


def logits(model: Any, tokens: Any, *, attention: Strategy | None = None) -> jax.Array:
    """Float32 logits `[B, T, V]` of every token, in natural order, on the host."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size:
        raise ValueError(f"tokens must be [B, T] with at least one token; got {tokens.shape}")
    check_ids(model, tokens)
    limit = getattr(model.config, "max_positions", tokens.shape[1])
    if tokens.shape[1] > limit:
        raise ValueError(f"the model has {limit} positions; got {tokens.shape[1]} tokens")
    strategy = Ring() if attention is None else attention
    shards = jax.sharding.get_abstract_mesh().shape.get("seq", 1)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    tokens = windows(tokens, getattr(model.config, "ngram_width", 1))
    batch = strategy.layout.permute({"tokens": tokens, "positions": positions}, shards)
    batch = _put((batch["tokens"], batch["positions"]), P("data", "seq"))
    return strategy.layout.inverse(_whole(model, *batch, strategy), shards, tokens.shape[1])


@functools.partial(jax.jit, static_argnums=3)
def _whole(model, tokens, positions, strategy):
    return model(tokens, positions, attention=strategy, consecutive=True)


def _prefill(model, cache, tokens, positions, last, lengths, counts, recent, strategy, used):
    attend = Prefill(cache, positions, strategy=strategy, used=used)
    hidden, _ = model.forward(tokens, positions, attend)
    return _at(model, hidden, positions, last), attend.filled(lengths, counts, recent)


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


@functools.cache
def _jitted(fn, donate: bool):
    static = (8, 9) if fn is _prefill else ()
    return jax.jit(fn, static_argnums=static, donate_argnums=(1,) if donate else ())


def _spread(strategy, cache, tokens, positions, fill):
    """Tokens and positions in shard order, and how many slots each shard gains.

    The shard with most new tokens is the emptiest one: positions mask, so any shard may hold any
    chunk. So over any number of turns no shard is further ahead of another than one turn can put
    it, which is less than `2 * shards` slots: the pads of a layout.
    """
    shards = cache.shards
    batch = strategy.layout.permute({"tokens": tokens, "positions": positions}, shards)
    by_shard = {name: x.reshape(x.shape[0], shards, -1, *x.shape[2:]) for name, x in batch.items()}
    counts = (by_shard["positions"] != PAD_POSITION).any(0).sum(-1)
    place = np.empty(shards, int)  # place[s]: which of the layout's shards lies on device s
    place[np.argsort(fill, kind="stable")] = np.argsort(-counts, kind="stable")
    width = by_shard["tokens"].shape[2]
    room = cache.slots - int(fill.max())
    pad = [(0, 0), (0, 0), (0, max(0, min(_bucket(width), room) - width))]
    tokens = _pad(by_shard["tokens"][:, place], pad)
    positions = np.pad(by_shard["positions"][:, place], pad, constant_values=PAD_POSITION)
    rows = tokens.shape[0]
    tokens = tokens.reshape(rows, -1, *tokens.shape[3:])
    return tokens, positions.reshape(rows, -1), counts[place].astype(np.int32)


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


def _check_tokens(model, cache, tokens, lengths):
    batch = cache.lengths.shape[0]
    if tokens.ndim != 2 or tokens.shape[0] != batch or tokens.shape[1] < 1:
        raise ValueError(f"tokens must be [{batch}, T] with at least one token; got {tokens.shape}")
    check_ids(model, tokens)
    lengths = np.full(batch, tokens.shape[1]) if lengths is None else np.asarray(lengths)
    if lengths.shape != (batch,) or lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        raise ValueError(f"lengths must be [{batch}] in 1..{tokens.shape[1]}; got {lengths}")
    needed = int((np.asarray(cache.lengths) + lengths).max())
    if needed > cache.max_len:
        raise ValueError(
            f"{needed} tokens do not fit max_len={cache.max_len} ({tokens.shape[1]} new ones); "
            "shorten the prompt or make the engine or cache with a larger max_len"
        )
    return lengths.astype(np.int32)


def check_ids(model: Any, tokens: np.ndarray) -> None:
    """Raise ValueError for ids that the model has no embedding of."""
    vocab = model.config.vocab_size
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"token ids must be integers; got {tokens.dtype}")
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise ValueError(
            f"token ids must lie in 0..{vocab - 1}; got {tokens.min()}..{tokens.max()}. "
            "Is it another tokenizer's?"
        )


def _check_room(needed, cache):
    if needed > cache.slots:
        raise ValueError(
            f"a shard needs {needed} slots and has {cache.slots}; "
            "make the cache with a larger max_len"
        )
