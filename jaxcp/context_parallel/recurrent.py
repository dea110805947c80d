# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers over a sharded sequence: what each piece of it starts from.

Attention needs positions alone; a recurrence needs order. A layout cuts a row into pieces of
consecutive tokens, one or (zigzag) two on each shard. A layer sums up each piece as `state_after =
transition * state_before + state`; here the summaries of all pieces are put in order and chained,
so that every piece starts from the state that a plain scan would have there. Short convolutions
take the last inputs before each piece the same way.

Communication a device: one all-gather of the summaries, `shards * pieces` of them, whatever the
number of tokens; for a convolution, of the last inputs of every piece, each with its number.
Backward: the same bytes, scattered (`summaries_cost`, `inputs_cost`).
Source: the chunked form of linear attention; Sun et al., LASP-2 (arXiv 2502.07563).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcp.context_parallel.cost import Cost, Traffic
from jaxcp.layout import Layout
from pallas_kernels import PAD_POSITION


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pieces:
    """Pieces of consecutive tokens, of local shards `[B, t, ...]` inside shard_map.

    One or two pieces lie on a shard, in natural order; each has `t / most` places, P. Below, n is
    the number of pieces of all shards.
    """

    numbers: Any
    """int32 `[B or 1, t]`: the place of each token in its row, ascending; `PAD_POSITION` for none,
    which come last."""
    order: Any
    """int32 `[B or 1, n]`: pieces in natural order, by `shard * most + piece`; those without a
    token come last."""
    most: int
    axis_name: str | None

    @classmethod
    def of_one_shard(cls, tokens: int) -> "Pieces":
        """The one piece of rows that lie in natural order, whatever layout has filled them up."""
        numbers = jnp.arange(tokens, dtype=jnp.int32)[None]
        return cls(numbers=numbers, order=_ONE, most=1, axis_name=None)

    @classmethod
    def of_layout(cls, layout: Layout, length: int, axis_name: str) -> "Pieces":
        """Pieces of rows of `length` tokens that `layout` has put on the shards of `axis_name`.

        Raises:
          NotImplementedError: a layout whose shards hold more pieces.
        """
        numbers, order = _tables(layout, lax.axis_size(axis_name), length)
        own = jnp.asarray(numbers)[lax.axis_index(axis_name)][None]
        return cls(numbers=own, order=order, most=layout.pieces, axis_name=axis_name)

    @classmethod
    def of_positions(cls, positions, layout: Layout | None, axis_name: str | None) -> "Pieces":
        """Pieces of rows whose tokens have consecutive `positions [B, t]`, each of its own number.

        Raises:
          NotImplementedError: a layout whose shards hold more pieces; None is one.
        """
        if axis_name is None or lax.axis_size(axis_name) == 1:
            return cls(numbers=positions, order=_ONE, most=1, axis_name=axis_name)
        most = check_layout(layout)
        own = cls(numbers=positions, order=None, most=most, axis_name=axis_name)
        first = own._gathered(own._split_numbers[..., 0])
        order = jnp.argsort(first, axis=0, stable=True).T
        return dataclasses.replace(own, order=order.astype(jnp.int32))

    def split(self, tree):
        """`[B, t, ...]` -> `[most, B, P, ...]`; zeros where a piece has no token."""

        def one(x):
            parts = self._cut(x)
            return jnp.where(_wide(self.real, parts), parts, jnp.zeros_like(parts))

        return jax.tree.map(one, tree)

    def join(self, tree):
        """Undo `split`; what is no token becomes zeros."""

        def one(x):
            flat = x[0]
            if self.most == 2:
                size = x.shape[2]
                place, first = jnp.arange(2 * size), self._first_size[:, None]
                place = jnp.where(
                    place < first, place, jnp.minimum(size + place - first, 2 * size - 1)
                )
                flat = _taken(jnp.concatenate([x[0], x[1]], axis=1), place)
            there = self.numbers != PAD_POSITION
            return jnp.where(_wide(there, flat), flat, jnp.zeros_like(flat))

        return jax.tree.map(one, tree)

    @property
    def real(self):
        """Boolean `[most, B or 1, P]`: which places of `split` hold a token. They come first."""
        return self._split_numbers != PAD_POSITION

    def starts(self, transition, state, *, apply: Callable, before=None):
        """`(state before each local piece [most, B, ...], state after the last of all [B, ...])`.

        Args:
          transition, state: summaries of the local pieces, `[most, B, ...]`. A piece without a
            token must bring the transition that changes nothing, and a state of zeros.
          apply: `apply(transition, state)`, linear in both.
          before: the state before the first piece; default zeros.
        """
        before = jnp.zeros_like(state[0]) if before is None else before
        together = jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in (transition, state)], -1)
        everyone = self._in_order(self._gathered(together))
        parts = jnp.split(everyone, [math.prod(transition.shape[2:])], axis=-1)
        parts = [
            x.reshape(-1, *like.shape[1:])
            for x, like in zip(parts, (transition, state), strict=True)
        ]

        def piece(now, one):
            return apply(one[0], now) + one[1], now

        after, starts = lax.scan(piece, before, tuple(parts))
        return self._own(starts), after

    def inputs(self, x, width: int, before=None) -> "Inputs":
        """The last `width` tokens of each piece of all shards, of `x [B, t, ...]`.

        `before`: `(x, numbers)` of earlier tokens, `[B, m, ...]`.
        """
        count = self.real.sum(2)

        def tails(parts, fill):
            """`[most, B, P, ...]` -> `[B, n * width, ...]`."""
            lead = [(0, 0), (0, 0), (width, 0)] + [(0, 0)] * (parts.ndim - 3)
            ends = jnp.broadcast_to(count, parts.shape[:2])
            cut = jax.vmap(jax.vmap(lambda y, end: lax.dynamic_slice_in_dim(y, end, width)))
            own = cut(jnp.pad(parts, lead, constant_values=fill), ends)
            everyone = jnp.moveaxis(self._gathered(own), 0, 1)
            return everyone.reshape(everyone.shape[0], -1, *everyone.shape[3:])

        values = tails(self.split(x), 0)
        numbers = jnp.broadcast_to(tails(self._split_numbers, PAD_POSITION), values.shape[:2])
        if before is not None:
            values = jnp.concatenate([before[0].astype(x.dtype), values], axis=1)
            numbers = jnp.concatenate([before[1], numbers], axis=1)
        return Inputs(values, numbers)

    def carried(self, x, here, nothing):
        """Find for each token the `x [B, t, c]` (integers) of the latest before it that is `here`.

        `nothing [c]` where there is none. `c + 1` integers of each piece travel.
        """
        parts, here = self._cut(x), self.split(here)
        place = jnp.where(here, jnp.arange(here.shape[2]), -1)
        latest = lax.cummax(place, axis=2)
        values = jnp.take_along_axis(parts, jnp.maximum(latest, 0)[..., None], axis=2)
        some = (latest[..., -1:] >= 0).astype(x.dtype)
        ends = self._in_order(self._gathered(jnp.concatenate([values[:, :, -1], some], axis=-1)))

        def piece(now, end):
            return jnp.where(end[:, -1:] > 0, end[:, :-1], now), now

        first = jnp.broadcast_to(jnp.asarray(nothing, x.dtype), (*x.shape[:1], x.shape[-1]))
        _, starts = lax.scan(piece, first, ends)
        starts = self._own(starts)[:, :, None]
        values = jnp.where((latest < 0)[..., None], starts, values)
        return self.join(jnp.concatenate([starts, values[:, :, :-1]], axis=2))

    def before(self, width: int):
        """int32 `[most, B or 1, width]`: the numbers before that of the first token of a piece."""
        return self._split_numbers[..., :1] - width + jnp.arange(width, dtype=jnp.int32)

    @property
    def alone(self) -> bool:
        """Tell whether there is one piece of all, so that nothing is chained."""
        return self.most == 1 and (self.axis_name is None or lax.axis_size(self.axis_name) == 1)

    def _cut(self, x):
        if self.most == 1:
            return x[None]
        size = x.shape[1] // 2
        place = self._first_size[:, None] + jnp.arange(size)
        return jnp.stack([x[:, :size], _taken(x, jnp.minimum(place, x.shape[1] - 1))])

    @functools.cached_property
    def _first_size(self):
        """int32 `[B or 1]`: tokens of the first piece."""
        size = self.numbers.shape[1] // 2
        follows = self.numbers[:, 1:] == self.numbers[:, :-1] + 1
        sizes = 1 + jnp.cumprod(follows.astype(jnp.int32), axis=1).sum(1)
        return jnp.where(self.numbers[:, 0] == PAD_POSITION, 0, jnp.minimum(sizes, size))

    @functools.cached_property
    def _split_numbers(self):
        """int32 `[most, B or 1, P]`."""
        if self.most == 1:
            return self.numbers[None]
        first, second = self._cut(self.numbers)
        place = jnp.arange(first.shape[1])
        first = jnp.where(place < self._first_size[:, None], first, PAD_POSITION)
        behind = self._first_size[:, None] + place < self.numbers.shape[1]
        return jnp.stack([first, jnp.where(behind, second, PAD_POSITION)])

    def _gathered(self, x):
        """`[most, ...]` of every shard, `[n, ...]`."""
        return x if self.alone else lax.all_gather(x, self.axis_name, tiled=True)

    def _in_order(self, x):
        """`[n, B, ...]` in natural order."""
        order = jnp.asarray(self.order).T
        return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=0)

    def _own(self, x):
        """`[most, B, ...]` of `[n, B, ...]` in natural order."""
        rank = jnp.argsort(jnp.asarray(self.order), axis=1).T
        if rank.shape[0] > self.most:
            start = lax.axis_index(self.axis_name) * self.most
            rank = lax.dynamic_slice_in_dim(rank, start, self.most)
        return jnp.take_along_axis(x, rank.reshape(*rank.shape, *[1] * (x.ndim - 2)), axis=0)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Some tokens `[B, m, ...]` of each row, and which they are, `[B, m]`."""

    values: Any
    numbers: Any

    def at(self, numbers):
        """The values of tokens of these `numbers [B or 1, w]`; zeros where they are not there."""
        match = numbers[:, :, None] == self.numbers[:, None, :]
        match = match & (self.numbers != PAD_POSITION)[:, None, :]
        values = _taken(self.values, jnp.argmax(match, axis=2))
        return jnp.where(_wide(match.any(2), values), values, jnp.zeros_like(values))


def check_layout(layout: Layout | None) -> int:
    """Count the pieces of a shard; raise NotImplementedError unless they are one or two."""
    if layout is None:
        raise NotImplementedError(
            "recurrent layers need tokens in the places of a layout, Zigzag() or Contiguous()"
        )
    _tables(layout, 2, 16)
    return layout.pieces


def summaries_cost(*, shards: int, most: int, numbers: int, itemsize: int = 4) -> Cost:
    """Cost of `Pieces.starts`: `shards * most * numbers * itemsize` bytes are gathered.

    `numbers`: those of a local piece's transition and state, `B * N * H * (H + V)`.
    """
    size = shards * most * numbers * itemsize
    return Cost(
        forward=(Traffic("all-gather", 1, size, shards),),
        backward=(Traffic("reduce-scatter", 1, size, shards),),
        held=size,
    )


def inputs_cost(*, shards: int, most: int, rows: int, width: int, channels: int, itemsize: int):
    """Cost of `Pieces.inputs`: of `rows` rows `width` tokens of each piece are gathered, `channels
    * itemsize` bytes each."""
    size = shards * most * rows * width * channels * itemsize
    return Cost(
        forward=(Traffic("all-gather", 1, size, shards),),
        backward=(Traffic("reduce-scatter", 1, size, shards),),
        held=size,
    )


_ONE = np.zeros((1, 1), np.int32)


@functools.lru_cache(maxsize=64)
def _tables(layout, shards, length):
    """`(numbers [shards, t], order [1, pieces of all])`, see `Pieces`."""
    order = layout.order(length, shards).reshape(shards, -1)
    numbers = np.where(order < length, order, PAD_POSITION).astype(np.int32)
    firsts = []
    for own in order:
        own = own[own < length]
        jumps = np.flatnonzero(np.diff(own) != 1) + 1
        if len(jumps) >= min(layout.pieces, 2) or layout.pieces > 2:
            raise NotImplementedError(
                "recurrent layers need pieces of consecutive tokens, one or two a shard; "
                f"{layout} has more; use Zigzag() or Contiguous()"
            )
        size = order.shape[1] // layout.pieces
        first = min(size, jumps[0] if len(jumps) else own.size)
        places = (0, first)[: layout.pieces]
        firsts += [own[i] if i < own.size else PAD_POSITION for i in places]
    return numbers, np.argsort(firsts, kind="stable").astype(np.int32)[None]


def _taken(x, places):
    """Take `x [B, t, ...]` at `places [B or 1, p]`."""
    places = jnp.broadcast_to(places, (x.shape[0], places.shape[1]))
    places = places.reshape(*places.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, places, axis=1)


def _wide(mask, x):
    """`mask` with as many axes as x."""
    return mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))
