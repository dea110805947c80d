# SPDX-License-Identifier: Apache-2.0
"""Cuts a turn into pieces, each of which one program runs, and says where their tokens lie.

A program is compiled for the shapes of its piece, so they come from few, whatever is said and in
whatever portions: no conversation needs more than 12 programs to prefill.

| piece | programs |
|---|---|
| the first turn, which meets an empty cache | 1 |
| of a later turn, sharded, `WIDTHS` a shard; padded where that adds a third at most | 8 |
| of a later turn, the last 64 tokens or fewer, the same on every shard, `sizes` | 3 |

A sharded piece looks at all slots, or at the first `1 / PART` of them while all tokens fit into
those. The narrowest piece takes a device about as long as one token does, the widest keeps it busy.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcp.attention.slots import slots_in_use
from jaxcp.context_parallel import Ring, Strategy
from jaxcp.context_parallel.halo import full_reach, rows_to_send, worth_it
from jaxcp.layout import Layout
from pallas_kernels import PAD_POSITION

WIDTHS = (128, 512, 2048, 8192)
PART = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """The facts of a cache that decide which programs there are."""

    shards: int
    slots: int | None = None
    """A shard's; None: the cache does not shard its slots."""
    windows: tuple[int | None, ...] = ()
    """Windows of the layers that exchange nothing else."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """Tokens of a turn that one program takes."""

    order: np.ndarray
    """int `[B, places]`: which of the row's next tokens lies where; pads are `>= taken`."""
    taken: np.ndarray
    """int `[B]`: how many of its tokens each row gives."""
    sharded: bool
    used: int | None = None
    """Slots of a shard that are looked at; None: the cache was empty."""
    halos: dict[int, dict[int, np.ndarray] | None] = dataclasses.field(default_factory=dict)
    """By window, what shards send each other of the new tokens: see `window.attend`."""

    @property
    def program(self) -> tuple:
        """The key of a compiled program: pieces that agree in it run the same one."""
        shapes = [
            (window, rows if rows is None else [(d, x.shape) for d, x in rows.items()])
            for window, rows in sorted(self.halos.items())
        ]
        return self.sharded, self.order.shape[1], self.used, repr(shapes)

    def laid_out(self, tokens: np.ndarray, done: np.ndarray, start: np.ndarray):
        """`(tokens [B, places, ...], positions)` of rows that had `start` tokens before the turn
        and have given `done` of it."""
        real = self.order < self.taken[:, None]
        where = np.where(real, done[:, None] + self.order, 0)
        laid = tokens[np.arange(len(tokens))[:, None], where]
        laid[~real] = 0
        positions = np.where(real, (start + done)[:, None] + self.order, PAD_POSITION)
        return laid, positions.astype(np.int32)


def pieces(
    frame: Frame, start: Any, lengths: Any, layout: Layout, sizes: tuple[int, ...]
) -> Iterator[Piece]:
    """The pieces of a turn of `lengths [B]` tokens on rows of `start [B]`.

    Args:
      sizes: widths of a piece that is not sharded.
    """
    start, lengths = np.asarray(start, np.int64), np.asarray(lengths, np.int64)
    if start.max() == 0:
        yield _first(frame, lengths, layout)
        return
    left = lengths
    while left.max() > sizes[-1]:
        piece = _sharded(frame, start + lengths - left, left, layout)
        left = left - piece.taken
        yield piece
    if left.max() > 0:
        enough = [size for size in sizes if size >= left.max()]
        # one token a row is a step of decoding, but not where a row has none
        width = enough[0] if enough[0] > 1 or left.all() else enough[min(1, len(enough) - 1)]
        order = np.broadcast_to(np.arange(width), (len(left), width))
        yield Piece(order=order, taken=left, sharded=False)


def frame_of(cache: Any) -> Frame:
    """The frame of a `Cache`, which may be abstract."""
    return Frame(shards=cache.shards, slots=cache.slots, windows=cache.windows)


def layout_of(strategy: Strategy | None) -> Layout:
    return (Ring() if strategy is None else strategy).layout


def latest(before: Any, newest: jax.Array, taken: np.ndarray) -> jax.Array:
    """Logits `[B, V]` after each row's last token so far; `newest` where a row had some."""
    if before is None or taken.all():
        return newest
    here = np.broadcast_to((taken > 0)[:, None], newest.shape)
    return jnp.where(jax.device_put(here, newest.sharding), newest, before)


def _first(frame, lengths, layout):
    """All tokens at once; of eight widths between powers of two, where slots allow."""
    shards, length = frame.shards, int(lengths.max())
    least = WIDTHS[0] if frame.slots is None else 1  # without slots any width fits
    width = layout.padded_length(length, shards) // shards
    longer = layout.padded_length(shards * _bucket(max(width, least)), shards) // shards
    width = longer if frame.slots is None or longer <= frame.slots else width
    orders = _orders(layout, shards, width, np.zeros_like(lengths), lengths)
    halos = {
        window: worth_it(rows_to_send(_distinct(orders, lengths), window), width)
        for window in _windows(frame)
    }
    return _piece(orders, lengths, None, halos)


def _sharded(frame, start, left, layout):
    """The widest piece that is full, or nearly, of all rows or of those with enough tokens."""
    widths = [w for w in WIDTHS if frame.slots is None or w <= frame.slots]
    widths = widths or [frame.slots // layout.pieces * layout.pieces]
    for width in reversed(widths):
        size = frame.shards * width
        if width > widths[0] and 4 * left.max() < 3 * size:
            continue
        for taken in (np.minimum(left, size), np.where(left < size, 0, size)):
            orders = _orders(layout, frame.shards, width, start, taken)
            halos = _halos(frame, layout, width, orders, taken)
            if taken.any() and halos is not None:
                used = _used(frame, start + taken, width)
                return _piece(orders, taken, used, halos)
    taken = np.minimum(left, size)
    orders = _orders(layout, frame.shards, width, start, taken)
    return _piece(orders, taken, frame.slots, dict.fromkeys(_windows(frame)))


def _piece(orders, taken, used, halos):
    order = np.stack([order.reshape(-1) for order in orders])
    return Piece(order=order, taken=taken, sharded=True, used=used, halos=halos)


def _used(frame, ends, width):
    """One of two bounds on the slots in use."""
    if frame.slots is None:
        return None
    most, some = slots_in_use(ends.max(), 0, frame.shards), frame.slots // PART
    return some if most <= some and width < WIDTHS[-1] else frame.slots


def _orders(layout, shards, width, start, taken):
    """Give, for each row, the natural index of the token at each place `[shards, width]`.

    An index of `taken` or more is a pad.

    The layout's places are more than there are tokens. Which of them stay empty is chosen so that
    every shard gains what keeps it level with the others (`slots_in_use`); they are spread evenly,
    so the work stays balanced as in the layout. Of a zigzag over two shards, 4 places each, with 5
    new tokens on a row that had 1:

        places    0 1 6 7 | 2 3 4 5     of the layout
        gains     2       | 3           of 6 tokens each shard has 3, and the first had one
        taken     0 . 6 . | 2 3 4 .     places that get a token
        natural   0   4   | 1 2 3       their ranks: which of the new tokens
        order     0 4 5 5 | 1 2 3 5     pads, which are 5, come last
    """
    places = layout.places(shards * width, shards)
    shard = np.arange(shards)

    @functools.cache
    def of_row(before, count):
        gains = slots_in_use(before + count, shard, shards) - slots_in_use(before, shard, shards)
        taken_places = [
            own[np.arange(gain) * width // max(gain, 1)]
            for own, gain in zip(places, gains, strict=True)
        ]
        natural = np.argsort(np.argsort(np.concatenate(taken_places)))
        order = np.full((shards, width), count)
        for row, own in zip(order, np.split(natural, np.cumsum(gains)[:-1]), strict=True):
            row[: len(own)] = np.sort(own)
        return order

    return [of_row(int(a) % shards, int(n)) for a, n in zip(start, taken, strict=True)]


def _windows(frame):
    return sorted({*frame.windows} - {None})


def _halos(frame, layout, width, orders, taken):
    """Plan what shards send each other for each window, in the shapes that full pieces need.

    None where that does not do: a piece with few tokens has its windows on many shards.
    """
    plans = {}
    for window in _windows(frame):
        full = full_reach(layout, frame.shards, width, window)
        plans[window] = full
        if full is None or set(taken) <= {0, frame.shards * width}:
            continue
        rows = rows_to_send(_distinct(orders, taken), window)
        if any(x.shape[1] > full.get(d, x[:, :0]).shape[1] for d, x in rows.items()):
            return None
        plans[window] = {d: _as_wide(rows.get(d), x) for d, x in full.items()}
    return plans


def _as_wide(rows, like):
    wide = np.full_like(like, -1)
    if rows is not None:
        wide[:, : rows.shape[1]] = rows
    return wide


def _distinct(orders, taken):
    """Each order once, with its number of tokens."""
    return {id(x): (x, n) for x, n in zip(orders, taken, strict=True)}.values()


def _bucket(size: int) -> int:
    """The next of eight sizes between powers of two: few compilations, little padding."""
    step = max(1, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step
