# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers over a sharded sequence: what each piece of it starts from.

Attention needs positions alone; a recurrence needs order. A layout cuts the sequence into pieces
of consecutive tokens, some of them on each shard (zigzag: two). A layer sums up each piece as
`state_after = transition * state_before + state`; here the summaries of all pieces are put in
order and chained, so that every piece starts from the state that a plain scan would have there.
Short convolutions take the last inputs before each piece the same way.

Communication a device: one all-gather of the summaries, `pieces * shards` of them, whatever the
number of tokens; for a convolution, of the last inputs of every piece. Backward: as much.
Source: the chunked form of linear attention; Sun et al., LASP-2 (arXiv 2502.07563).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcp.layout import Layout


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The pieces of a sequence of `length` real tokens in `layout`, over the axis `axis_name`.

    Used inside shard_map, on local shards `[B, t, ...]`.
    """

    layout: Layout
    axis_name: Any
    length: int

    def split(self, tree):
        """`[B, t, ...]` -> `[pieces, B, P, ...]`, natural order inside a piece; zeros fill up."""
        rows = self._mine(self._tables[0])

        def one(x):
            taken = jnp.take(x, jnp.maximum(rows, 0).reshape(-1), axis=1)
            taken = taken.reshape(x.shape[0], *rows.shape, *x.shape[2:])
            mask = (rows >= 0).reshape(1, *rows.shape, *[1] * (x.ndim - 2))
            return jnp.moveaxis(jnp.where(mask, taken, jnp.zeros_like(taken)), 1, 0)

        return jax.tree.map(one, tree)

    def real(self):
        """Boolean `[pieces, P]`: which places of `split` hold a token. They come first."""
        return self._mine(self._tables[0]) >= 0

    def join(self, tree):
        """Undo `split`; pads become zeros."""
        place = self._mine(self._tables[2])

        def one(x):
            flat = jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])
            taken = jnp.take(flat, jnp.maximum(place, 0), axis=1)
            mask = (place >= 0).reshape(1, -1, *[1] * (taken.ndim - 2))
            return jnp.where(mask, taken, jnp.zeros_like(taken))

        return jax.tree.map(one, tree)

    def states(self, transition, state, *, apply: Callable, compose: Callable):
        """The state before each local piece, `[pieces, ...]`; zeros before the first of all.

        Args:
          transition, state: summaries of the local pieces, trees of `[pieces, ...]`. A piece
            without a token must bring the transition that changes nothing, and a state of zeros.
          apply: `apply(transition, state)`, linear in both.
          compose: `compose(later, earlier)`, the transition of both, one after the other.
        """

        def both(earlier, later):
            (a, s), (b, u) = earlier, later
            return compose(b, a), jax.tree.map(jnp.add, apply(b, s), u)

        _, after = lax.associative_scan(jax.vmap(both), self._ordered((transition, state)))
        return jax.tree.map(lambda x: self._before(x, jnp.zeros_like(x[:1])), after)

    def last(self, x, width: int):
        """The `width` inputs before each local piece, `[pieces, B, width, ...]`; zeros at first.

        For a causal convolution of `width + 1` taps. `x` is of `split`.
        Raises:
          ValueError: pieces shorter than `width`.
        """
        counts = self._tables[1]
        short = min((n for i, n in counts.items() if i > 0), default=width)
        if short < width:  # the first may be shorter: zeros come before it
            raise ValueError(
                f"a convolution reaches {width} tokens back, but a piece of {self.layout} has "
                f"{short}; use fewer shards or a longer sequence"
            )

        def tail(piece, end):  # of `width` zeros and the piece
            widths = [(width if i == 1 else 0, 0) for i in range(piece.ndim)]
            return lax.dynamic_slice_in_dim(jnp.pad(piece, widths), end, width, axis=1)

        ends = self.real().sum(1)
        tails = self._ordered(jax.vmap(tail)(x, ends))
        return self._before(tails, jnp.zeros_like(tails[:1]))

    def _mine(self, table):
        return jnp.asarray(table)[lax.axis_index(self.axis_name)]

    def _ordered(self, tree):
        """Every device's `[pieces, ...]`, in natural order of the pieces."""
        order = np.argsort(self._tables[3].reshape(-1), kind="stable")
        return jax.tree.map(
            lambda x: jnp.take(lax.all_gather(x, self.axis_name, tiled=True), order, axis=0), tree
        )

    def _before(self, ordered, first):
        """Take from the values after each piece in order those before each local one."""
        shifted = jnp.concatenate([first, ordered[:-1]])
        return jnp.take(shifted, self._mine(self._tables[3]), axis=0)

    @property
    def _tables(self):
        return _tables(self.layout, lax.axis_size(self.axis_name), self.length)


@functools.lru_cache(maxsize=64)
def _tables(layout, shards, length):
    """`(rows, counts, place, number)`.

    rows `[shards, pieces, P]`: local row of each place; counts: tokens of each piece by its number;
    place `[shards, t]`: where each local row went; number `[shards, pieces]`: natural order.
    """
    order = layout.order(length, shards).reshape(shards, -1)
    runs = []
    for shard, own in enumerate(order):
        own = own[own < length]
        for rows in np.split(np.arange(own.size), np.flatnonzero(np.diff(own) != 1) + 1):
            if rows.size:
                runs.append((own[rows[0]], shard, rows))
    runs.sort(key=lambda run: run[0])
    each = max(layout.pieces, max(np.bincount([shard for _, shard, _ in runs])))
    if each > layout.pieces:
        raise NotImplementedError(
            f"recurrent layers need pieces of consecutive tokens, {layout.pieces} a shard; "
            f"{layout} has {each}; use Zigzag() or Contiguous()"
        )
    longest = max(rows.size for _, _, rows in runs)
    table = np.full((shards, each, longest), -1, np.int32)
    place = np.full(order.shape, -1, np.int32)
    # pieces with no token come after all others, where nothing reads what they leave
    number = np.full((shards, each), -1, np.int32)
    filled, counts = np.zeros(shards, int), {}
    for i, (_, shard, rows) in enumerate(runs):
        slot = filled[shard]
        table[shard, slot, : rows.size] = rows
        place[shard, rows] = slot * longest + np.arange(rows.size)
        number[shard, slot], counts[i] = i, rows.size
        filled[shard] += 1
    number[number < 0] = np.arange(len(runs), number.size)
    return table, counts, place, number
