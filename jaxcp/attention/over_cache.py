# SPDX-License-Identifier: Apache-2.0
"""Attention of new tokens over a cache, which they join.

Many new tokens are sharded, and keys travel by the strategy; few (at most `MAX_EXTEND`) are the
same on every device: each attends to its own shard and one collective merges `(out, lse)`. What
becomes of them is the business of each kind.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jaxcp.attention.attend import Attend
from jaxcp.attention.cache import Cache
from jaxcp.attention.places import OwnSlots
from jaxcp.attention.slots import MAX_EXTEND, ROWS, TOKENS
from jaxcp.context_parallel.ring import Ring
from jaxcp.context_parallel.shards import on_shards
from jaxcp.context_parallel.strategy import Strategy
from jaxcp.layout import Layout
from pallas_kernels import PAD_POSITION


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class NewTokens:
    """The tokens that attend, and join what is kept."""

    positions: Any  # int32 [B, T]
    before: Any  # int32 [B]: tokens in the cache before them
    added: Any  # int32 [B]: how many of T each row has
    sharded: bool
    strategy: Strategy | None
    layout: Layout | None
    """(static) The layout in whose places they lie where they are sharded; None: in any order."""
    used: int | None
    """(static) A bound on the slots that a shard uses afterwards; None: all."""
    first: bool
    """(static) The cache was empty."""
    halos: Any
    """By window, what shards send each other of the new tokens: see `window.attend`."""
    place: Any
    """`OwnSlots` or `PagedSlots`, through which kinds write and read slots."""
    slots: Any = None
    """int32 `[B, S]`: the position in each slot, of the new tokens too; None without slots."""

    @property
    def after(self):
        """int32 `[B]`: tokens in the cache after them."""
        return self.before + self.added


class OverKept(Attend):
    """Attention of `tokens` over what layers keep, a kind by the name of a stack of layers."""

    keeps_rows = True

    def __init__(self, layers: Mapping[str, Any], tokens: NewTokens):
        self.layers, self.tokens = dict(layers), tokens

    def kept(self, name):
        return self.layers[name]

    def keep(self, name, state):
        self.layers[name] = state

    def of(self, state, layer):
        return OverLayer(self.tokens, state, layer)


class OverCache(OverKept):
    """Attention over `cache`; `cache_after` is what it becomes.

    Args:
      positions: int32 `[B, T]`, from `cache.lengths` on; `PAD_POSITION` for pads.
      added: int32 `[B]`, how many of the tokens of each row are real, no pads.
      sharded: the tokens lie over `seq` in the strategy's layout, and every shard writes its own
        behind what it holds of each row; else every device has them all.
      strategy: for layers that see everything; None is `Ring()`, or in `Full` `RingPassQ()` where
        that sends less (`RingPassQ.fewer_bytes`).
      used: (static) bounds the slots that a shard holds afterwards, and only those travel; None
        says that the cache was empty.
      halos: by window, what shards send each other of the new tokens.
    Raises:
      ValueError: more than `MAX_EXTEND` tokens that are not sharded.
      NotImplementedError: the strategy cannot fill a cache.
    """

    def __init__(
        self,
        cache: Cache,
        positions: Any,
        added: Any,
        *,
        sharded: bool,
        strategy: Strategy | None = None,
        used: int | None = None,
        halos: Any = None,
    ):
        check_tokens(positions, sharded, strategy)
        first = sharded and used is None
        self.cache = cache
        tokens = NewTokens(
            positions=positions,
            before=cache.lengths,
            added=added,
            sharded=sharded,
            strategy=strategy,
            layout=(Ring() if strategy is None else strategy).layout,
            used=positions.shape[1] // cache.shards if first else used,
            first=first,
            halos={} if halos is None else halos,
            place=OwnSlots(cache.lengths, sharded=sharded, first=first),
        )
        if cache.positions is not None:
            tokens = dataclasses.replace(tokens, slots=_positions_after(cache, tokens))
        super().__init__(cache.layers, tokens)

    def cache_after(self, recent) -> Cache:
        """The cache after all layers; `recent [B, W - 1]`: its latest token ids."""
        return dataclasses.replace(
            self.cache,
            layers=self.layers,
            positions=self.tokens.slots,
            lengths=self.tokens.after,
            recent=recent,
        )


def check_tokens(positions, sharded: bool, strategy: Strategy | None) -> None:
    """Raise what `OverCache` says of a strategy, or of so many tokens, over what is kept."""
    if strategy is not None and not strategy.fills_caches:
        raise NotImplementedError("prefill over a cache has no reproducible form; use Ring()")
    if not sharded and positions.shape[1] > MAX_EXTEND:
        # more would push out of a window what it still needs
        raise ValueError(
            f"at most {MAX_EXTEND} tokens are not sharded; got {positions.shape[1]}: sharded=True"
        )


def _positions_after(cache, tokens):
    """The position in each slot of the cache, of the new tokens too."""
    pads = {} if tokens.sharded else {"pad": PAD_POSITION}

    def local(held, new, place):
        return place.write(held[None], 0, new, **pads)[0]

    specs = TOKENS, TOKENS if tokens.sharded else ROWS, tokens.place.specs
    return on_shards(local, specs, TOKENS)(cache.positions, tokens.positions, tokens.place)


class OverLayer(Attend):
    """Attention over what one layer keeps: the kind answers."""

    keeps_rows = True

    def __init__(self, tokens: NewTokens, state: Any, layer: jax.Array | int):
        self.tokens, self.state, self.layer = tokens, state, layer

    def __call__(self, q, k, v, **options):
        return self._answer("attend", q, k, v, **options)

    def latent(self, q, latent, weights, **options):
        return self._answer("latent", q, latent, weights, **options)

    def selected(self, q, keys, selection, **options):
        return self._answer("selected", q, keys, selection, **options)

    def compress(self, values, gates, **options):
        return self._answer("compress", values, gates, **options)

    def compressed(self, q, kv, entries, blocks, **options):
        return self._answer("compressed", q, kv, entries, blocks, **options)

    def shared(self, q, kv, **options):
        return self._answer("shared", q, kv, **options)

    def convolved(self, inputs, taps):
        return self._answer("convolved", inputs, taps)

    def delta(self, q, k, v, log_decay, beta):
        return self._answer("delta", q, k, v, log_decay, beta)

    def _answer(self, method, *arrays, **options):
        answer, self.state = getattr(self.state, method)(
            self.tokens, self.layer, *arrays, **options
        )
        return answer
