# SPDX-License-Identifier: Apache-2.0
"""Token ids in, arrays out: prefill, one decode step, whole-sequence logits.

The host decides where tokens go (layout, shards, padding). What runs on devices is four jitted
functions: a sharded piece of a turn, a short one, a step of decoding, and scoring. The first three
donate the cache: use the one that comes back.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxcp.attention.cache import Cache
from jaxcp.attention.over_cache import OverCache
from jaxcp.attention.slots import MAX_EXTEND, check_rows
from jaxcp.context_parallel import Ring, Strategy
from jaxcp.context_parallel.overlap import compiler_options
from jaxcp.data.windows import windows
from jaxcp.inference.checks import integers, token_ids
from jaxcp.inference.turns import frame_of, latest, layout_of, pieces
from jaxcp.processes import everywhere
from pallas_kernels.dispatch import target_platform

TRIED = 64
"""Tokens of the prefill that is traced to see whether a strategy can do it."""

EXTEND_SIZES = (1, 8, 32, MAX_EXTEND)
"""Widths to which short turns are padded; longer turns are prefilled by the strategy."""


def prefill(
    model: Any,
    cache: Cache,
    tokens: Any,
    *,
    lengths: Any = None,
    strategy: Strategy | None = None,
    donate=True,
) -> tuple[jax.Array, Cache]:
    """Append tokens to the cache; `(logits [B, V] after each row's last real token, cache)`.

    Only these tokens are computed; what the cache holds is reused. A short turn on a filled cache
    runs replicated, a longer one sharded by the strategy, in pieces of few sizes: no
    conversation needs more than 12 compiled programs, decoding aside (`jaxcp.inference.turns`).

    Args:
      tokens: int `[B, T]`, natural order, on the host.
      lengths: int `[B]`, real tokens of each row; default T.
      strategy: the strategy of a long turn; None takes `Ring()`, or `RingPassQ()` where the cache
        is so long that it sends less. Layers with a window send their window, whatever this is.
      donate: False keeps the given cache alive, for forks.
    Raises:
      ValueError: no tokens, rows that do not fit the cache, ids out of range.
    """
    tokens = token_ids(model, tokens)
    lengths = _check_tokens(cache, tokens, lengths)
    cache = cache if donate else _copied(cache)
    width = cache.recent.shape[1] + 1
    start, before = (np.asarray(x) for x in everywhere((cache.lengths, cache.recent)))
    done = np.zeros_like(lengths)
    tokens = windows(tokens[:, : lengths.max()], width, before=before)
    recent = _recent(tokens, before)
    logits: Any = None
    for piece in pieces(frame_of(cache), start, lengths, layout_of(strategy), EXTEND_SIZES):
        ids, positions = piece.laid_out(tokens, done, start)
        done = done + piece.taken
        newest = recent[np.arange(len(done)), done]
        arrays = model, cache, ids, positions, piece.taken.astype(np.int32), newest
        if not piece.sharded:
            newest_logits, cache = _replicated(*arrays)
        else:
            newest_logits, cache = _spread(*arrays, piece.halos, strategy, piece.used)
        logits = latest(logits, newest_logits, piece.taken)
    return logits, cache


def decode_step(
    model: Any, cache: Cache, next_token: Any, *, donate: bool = True
) -> tuple[jax.Array, Cache]:
    """One token a row `[B]` joins the cache; `(logits [B, V] for the one after it, cache)`.

    Raises:
      ValueError: a row is full, ids out of range.
    """
    longest = int(np.asarray(everywhere(cache.lengths)).max())
    if longest >= cache.max_len:
        raise ValueError(
            f"the cache is full: {longest} of max_len={cache.max_len} tokens; make a longer one"
        )
    token = token_ids(model, next_token)
    if token.shape != cache.lengths.shape:
        raise ValueError(
            f"next_token must be [{cache.lengths.shape[0]}], one a row; got {token.shape}"
        )
    cache = cache if donate else _copied(cache)
    return jitted(decode_tokens, True)(model, cache, token)


def logits(model: Any, tokens: Any, *, strategy: Strategy | None = None) -> jax.Array:
    """Float32 logits `[B, T, V]` of every token, in natural order, on the host; for scoring.

    Args:
      tokens: int `[B, T]`, natural order, on the host; any T, padded to what the shards need.
      strategy: the strategy; None is `Ring()`.
    Raises:
      ValueError: no tokens, ids out of range, more than the model has positions, or rows that the
        mesh's `data` does not divide.
    """
    tokens = token_ids(model, tokens)
    if tokens.ndim != 2 or not tokens.size:
        raise ValueError(f"tokens must be [B, T] with at least one token; got {tokens.shape}")
    check_rows(len(tokens))
    limit = getattr(model.config, "max_positions", tokens.shape[1])
    if tokens.shape[1] > limit:
        raise ValueError(f"the model has {limit} positions; got {tokens.shape[1]} tokens")
    strategy = Ring() if strategy is None else strategy
    shards = jax.sharding.get_abstract_mesh().shape.get("seq", 1)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    tokens = windows(tokens, getattr(model.config, "ngram_width", 1))
    batch = strategy.layout.permute({"tokens": tokens, "positions": positions}, shards)
    batch = _put((batch["tokens"], batch["positions"]), P("data", "seq"))
    whole = jitted(whole_sequence, False)
    length = tokens.shape[1] if getattr(model.config, "recurrent", False) else None
    found = whole(model, *batch, strategy, length)
    return strategy.layout.inverse(found, shards, tokens.shape[1])


def whole_sequence(model, tokens, positions, strategy, length):
    return model(tokens, positions, strategy=strategy, consecutive=True, length=length)


@jax.named_scope("prefill")
def prefill_piece(model, cache, tokens, positions, added, recent, halos, strategy, used):
    attend = OverCache(
        cache, positions, added, sharded=True, strategy=strategy, used=used, halos=halos
    )
    hidden, _ = model.forward(tokens, positions, attend)
    return logits_at(model, hidden, positions, cache.lengths + added - 1), attend.cache_after(
        recent
    )


@jax.named_scope("extend")
def extend_piece(model, cache, tokens, positions, added, recent):
    return _appended(model, cache, tokens, positions, added, recent)


def _appended(model, cache, tokens, positions, added, recent):
    """Run tokens that every shard has."""
    attend = OverCache(cache, positions, added, sharded=False)
    hidden, _ = model.forward(tokens, positions, attend)
    last = cache.lengths + added - 1
    return logits_at(model, hidden, positions, last), attend.cache_after(recent)


@jax.named_scope("decode")
def decode_tokens(model, cache, token):
    if not jax.sharding.get_abstract_mesh().empty:  # it comes from the host
        token = jax.sharding.reshard(token, P("data"))
    window = jnp.concatenate([token[:, None], cache.recent], axis=1)
    tokens, positions = window[:, None] if window.shape[1] > 1 else window, cache.lengths[:, None]
    return _appended(model, cache, tokens, positions, jnp.ones_like(token), window[:, :-1])


def _spread(model, cache, ids, positions, added, recent, halos, strategy, used):
    """Run a piece that is sharded."""
    arrays = *_put((ids, positions), P("data", "seq")), added, *_put((recent,), P("data", None))
    return jitted(prefill_piece, True)(model, cache, *arrays, halos, strategy, used)


def _replicated(model, cache, ids, positions, added, recent):
    """Run a piece that is the same everywhere; of one token it is a step of decoding."""
    if ids.shape[1] == 1 and added.all():
        return jitted(decode_tokens, True)(model, cache, ids.reshape(len(ids), -1)[:, 0])
    ids, positions, recent = _put((ids, positions, recent), P("data", None))
    return jitted(extend_piece, True)(model, cache, ids, positions, added, recent)


def logits_at(model, hidden, positions, last):
    """Logits `[B, V]` of the token whose position is `last [B]`, wherever it lies."""
    here = (positions == last[:, None]).astype(hidden.dtype)
    sharding = None if jax.sharding.get_abstract_mesh().empty else P("data", None)
    row = jnp.einsum("bt,btd->bd", here, hidden, out_sharding=sharding)
    return model.logits(row[:, None])[:, 0]


STATIC = {prefill_piece: (7, 8), whole_sequence: (3, 4)}
"""Arguments of which a program is compiled for each value."""


def jitted(fn, donate: bool):
    """Compile a function of this module for the platform in scope; `donate`: the cache."""
    return _jit(fn, donate, target_platform())


@functools.cache
def _jit(fn, donate: bool, platform: str):
    return jax.jit(
        fn,
        static_argnums=STATIC.get(fn, ()),
        donate_argnums=(1,) if donate else (),
        compiler_options=compiler_options(platform),
    )


@jax.jit
def _copied(cache):
    """Copy a cache that a fork still needs, so that one donating program does for both."""
    return jax.tree.map(jnp.copy, cache)


def check_strategy(model: Any, strategy: Any, max_len: int) -> None:
    """Trace a prefill by this strategy on the mesh in scope, and compute nothing.

    Raises:
      ValueError, NotImplementedError: what the strategy says of this model and mesh.
    """
    if not isinstance(strategy, Strategy):
        raise ValueError(f"strategy must be one, such as jaxcp.Ring(); got {strategy!r}")
    rows = jax.sharding.get_abstract_mesh().shape.get("data", 1)
    tokens = min(max_len, TRIED)
    cache, text = model.init_cache(rows, tokens), np.zeros((rows, tokens), np.int32)
    jax.eval_shape(lambda: prefill(model, cache, text, strategy=strategy)[0])


def _recent(tokens, before):
    """`[B, T + 1, width - 1]`: the newest ids of each row after 0, 1, ... of windows `tokens`."""
    if tokens.ndim == 2:
        return np.zeros((len(tokens), tokens.shape[1] + 1, 0), np.int32)
    return np.concatenate([before[:, None], tokens[:, :, :-1]], axis=1)


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
    needed = int((np.asarray(everywhere(cache.lengths)) + lengths).max())
    if needed > cache.max_len:
        raise ValueError(
            f"{needed} tokens do not fit max_len={cache.max_len} ({tokens.shape[1]} new ones); "
            "shorten the prompt or make the engine or cache with a larger max_len"
        )
    return lengths
