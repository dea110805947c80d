# SPDX-License-Identifier: Apache-2.0
"""Host arrays of a step: tokens, where they lie, and what each row is sampled by.

Rows that decode are one array of numbers, a line each, and lines of nobody rest; a chunk of a
prompt is a batch of its own, with its tokens and where they lie.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxcp.data.windows import windows
from jaxcp.inference.geometry import FEW, SHORT, Geometry
from jaxcp.inference.plan import Row
from jaxcp.inference.sampling import RowOptions
from jaxcp.layout import Layout
from pallas_kernels import PAD_POSITION

FIELDS = ("line", "late", "drafts", "before", "added", "state", "room", *RowOptions._fields)
"""The first columns of a row's numbers, see `columns`; floats by their bits."""
STOPS = 8
"""Stop tokens of a row at most."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Chunks of B prompts, those of each group of devices in a row."""

    ids: np.ndarray
    """int32 `[B, T]`, or `[B, T, ngram]`."""
    positions: np.ndarray
    """int32 `[B, T]`; `PAD_POSITION` for pads."""
    following: np.ndarray
    """int32 `[B, T]`: the token after each one; -1 after the last that is known."""
    numbers: np.ndarray
    """Numbers of these rows, see `columns`."""
    sharded: bool


def columns(numbers: Any, geometry: Geometry) -> dict[str, Any]:
    """The columns of `numbers`, int32 `[B, n]`, by name: those of `FIELDS`, and three of several.

    | name | `[B]` or `[B, n]` |
    |---|---|
    | `line` | the row of the seat; `max_rows` rests |
    | `late` | the token is the one that the step before has sampled, not yet read |
    | `drafts` | so many of the last tokens of this step are guesses |
    | `before`, `added` | tokens that are computed already, and of this step |
    | `state` | of the row; `geometry.states` is none |
    | `room` | tokens that its pages have room for |
    | `stops` | its stop tokens, -1 for none |
    | `window` | the last of its tokens that are known, the latest first |
    | `pages` | see `OverPool` |
    """
    named = {name: numbers[:, i] for i, name in enumerate(FIELDS)}
    rest = numbers[:, len(FIELDS) :]
    named |= {
        "stops": rest[:, :STOPS],
        "window": rest[:, STOPS : STOPS + geometry.ngram],
        "pages": rest[:, STOPS + geometry.ngram :],
    }
    if jax.sharding.get_abstract_mesh().empty:
        return named
    # jax 0.12 forgets where a slice of one number lies
    lines = jax.P(jax.typeof(numbers).sharding.spec[0])
    return {name: jax.sharding.reshard(x, lines) for name, x in named.items()}


def lines_of(groups: Sequence[Sequence[Row]], geometry: Geometry) -> list[Row | None]:
    """The rows of each group, padded with None to one of `geometry.row_sizes`, side by side."""
    most = max(map(len, groups))
    return padded_lines(groups, next(size for size in geometry.row_sizes if size >= most))


def padded_lines(groups: Sequence[Sequence[Row]], size: int) -> list[Row | None]:
    """The rows of each group, padded with None to `size`, side by side."""
    return [row for rows in groups for row in (*rows, *[None] * (size - len(rows)))]


def decode_batch(lines: Sequence[Row | None], geometry: Geometry) -> np.ndarray:
    """The numbers of rows that compute one token each."""
    numbers = resting(len(lines), geometry)
    for line, row in enumerate(lines):
        if row is not None:
            numbers[line] = _numbers(row, geometry)
    return numbers


def few_batch(lines: Sequence[Row | None], geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """`(ids [B, FEW] or [B, FEW, ngram], numbers)` of rows with at most `FEW` tokens each."""
    ids = np.zeros(_shape(len(lines), FEW, geometry), np.int32)
    for line, row in enumerate(lines):
        if row is not None:
            ids[line, : row.count] = _tokens(row, geometry)
    return ids, decode_batch(lines, geometry)


def chunk_batch(
    rows: Sequence[Row | None], geometry: Geometry, sizes: tuple[int, ...], layout: Layout
) -> Chunk:
    """A chunk of the prompt of each row: short and the same on every shard, or sharded in the
    places of `layout`.

    Args:
      rows: as many of each group; None rests.
      sizes: the chunks' tokens are padded to the first of these that holds them.
    """
    size = next(size for size in sizes if size >= max(row.count for row in rows if row))
    chunk = resting_chunk(size, len(rows), geometry)
    places = np.arange(size)
    if chunk.sharded:
        places = np.argsort(np.sort(layout.places(size, geometry.shards), axis=1), axis=None)
    for line, row in enumerate(rows):
        if row is not None:
            own = places[: row.count]
            chunk.ids[line, own] = _tokens(row, geometry)
            chunk.positions[line, own] = np.arange(row.start, row.start + row.count)
            after = row.request.tokens[row.start + 1 : row.start + row.count + 1]
            chunk.following[line, own[: len(after)]] = after
            chunk.numbers[line] = _numbers(row, geometry)
    return chunk


def resting_chunk(size: int, rows: int, geometry: Geometry) -> Chunk:
    """Chunks of pads alone."""
    return Chunk(
        ids=np.zeros(_shape(rows, size, geometry), np.int32),
        positions=np.full((rows, size), PAD_POSITION, np.int32),
        following=np.full((rows, size), -1, np.int32),
        numbers=resting(rows, geometry),
        sharded=size > SHORT[-1],
    )


def _shape(rows, tokens, geometry):
    """The shape of ids."""
    return (rows, tokens) if geometry.ngram == 1 else (rows, tokens, geometry.ngram)


def resting(rows: int, geometry: Geometry) -> np.ndarray:
    """The numbers of lines that are nobody's."""
    width = len(FIELDS) + STOPS + geometry.ngram + geometry.shards * geometry.listed
    numbers = np.zeros((rows, width), np.int32)
    numbers[:, FIELDS.index("line")] = geometry.max_rows
    numbers[:, FIELDS.index("state")] = geometry.states
    return numbers


def copies(groups: Sequence[Sequence[tuple[int, int]]], count: int) -> np.ndarray:
    """`[groups, 2, count]` of sources and targets; -1 where there is nothing to copy."""
    array = np.full((len(groups), 2, count), -1, np.int32)
    for of_group, pairs in zip(array, groups, strict=True):
        of_group[:, : len(pairs)] = np.asarray(pairs, np.int32).reshape(-1, 2).T
    return array


def _tokens(row, geometry):
    """`[count]` of a row, or `[count, ngram]`."""
    first = max(0, row.start - geometry.ngram + 1)
    known = row.start + row.count - row.drafts
    ids = np.asarray(row.request.tokens[first:known], np.int32)
    if row.drafts:
        ids = np.append(ids, np.asarray(row.request.guesses.tokens[: row.drafts], np.int32))
    return windows(ids[None], geometry.ngram)[0, row.start - first :]


def is_late(row: Row) -> bool:
    """Tell whether the row's token is one that is not read yet."""
    return row.start + row.count - row.drafts > len(row.request.tokens)


def _numbers(row, geometry) -> np.ndarray:
    seat, late = row.seat, is_late(row)
    state = geometry.states if seat.state is None else seat.state
    options = row.request.sampling.bits if row.samples else RowOptions().bits()
    room = len(seat.table) * geometry.page_size
    fields = [seat.row, late, row.drafts, row.start, row.count, state, room, *options]
    stops = np.full(STOPS, -1, np.int32)
    stops[: len(row.request.stop_tokens)] = sorted(row.request.stop_tokens)
    window = np.zeros(geometry.ngram, np.int32)
    if not late:
        window[:] = _tokens(row, geometry)[-1]
    pages = np.zeros((geometry.shards, geometry.listed), np.int32)
    table = np.asarray(row.seat.table, np.int32) % geometry.pages_per_shard
    for shard in range(geometry.shards):
        own = table[shard :: geometry.shards]
        pages[shard, : len(own)] = own
    return np.concatenate([fields, stops, window, pages.reshape(-1)]).astype(np.int32)
