# SPDX-License-Identifier: Apache-2.0
"""Host arrays of a step: tokens, where they lie, and what each row is sampled by.

`Rows` that decode are one batch, in which a request has the line of its seat and lines of nobody
rest; a chunk of a prompt is a batch of its own. All numbers of a row are in one array, so that a
step sends three.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcp.data.windows import windows
from jaxcp.inference.plan import Row
from jaxcp.inference.sampling import RowOptions
from pallas_kernels import PAD_POSITION

SHORT = (8, 32, 64)
"""Widths of a chunk that every device computes."""
FIELDS = ("before", "added", "state", "last", "seed", "top_k", "temperature", "top_p")
"""Columns of `Batch.numbers`, before those of the pages; floats by their bits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of a pool and its batches that never change."""

    shards: int
    pages_per_shard: int
    page_size: int
    states: int
    max_rows: int
    listed: int
    """Pages of a row on a shard at most."""
    ngram: int = 1
    """Tokens that the embedding of one token sees."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    ids: np.ndarray
    """int32 `[B, T]`, or `[B, T, ngram]`."""
    positions: np.ndarray
    """int32 `[B, T]`; `PAD_POSITION` for pads."""
    numbers: np.ndarray
    """int32 `[B, FIELDS and shards * listed pages]`; see `OverPool` for pages."""
    sharded: bool


def decode_batch(rows: Sequence[Row], geometry: Geometry) -> Batch:
    """One token of each row."""
    batch = _resting(geometry.max_rows, 1, geometry, sharded=False)
    for row in rows:
        line = row.seat.row
        batch.ids[line], batch.positions[line] = _tokens(row, geometry), row.start
        batch.numbers[line] = _numbers(row, geometry)
    return batch


def chunk_batch(row: Row, geometry: Geometry, sizes: tuple[int, ...]) -> Batch:
    """A chunk of a prompt: short and the same everywhere, or each token on the shard of its page.

    Args:
      sizes: the chunk's tokens are padded to the first of these that holds them.
    """
    size = next(size for size in sizes if size >= row.count)
    batch = resting_chunk(size, geometry)
    where = np.arange(row.start, row.start + row.count)
    order = target = np.arange(row.count)
    if batch.sharded:
        width = batch.positions.shape[1] // geometry.shards
        shard = where // geometry.page_size % geometry.shards
        order = np.argsort(shard, kind="stable")
        first = np.searchsorted(shard[order], np.arange(geometry.shards))
        target = shard[order] * width + np.arange(row.count) - first[shard[order]]
    batch.ids[0, target] = _tokens(row, geometry)[order]
    batch.positions[0, target], batch.numbers[0] = where[order], _numbers(row, geometry)
    return batch


def resting_chunk(size: int, geometry: Geometry) -> Batch:
    """A chunk of pads alone."""
    if size <= SHORT[-1]:
        return _resting(1, size, geometry, sharded=False)
    places = -(-size // geometry.page_size)
    # a chunk may begin and end inside a page
    width = (-(-places // geometry.shards) + 1) * geometry.page_size
    return _resting(1, width * geometry.shards, geometry, sharded=True)


def copies(pairs: list[tuple[int, int]], count: int) -> np.ndarray:
    """`[2, count]` of sources and targets; -1 where there is nothing to copy."""
    array = np.full((2, count), -1, np.int32)
    array[:, : len(pairs)] = np.asarray(pairs, np.int32).reshape(-1, 2).T
    return array


def _resting(rows, width, geometry, *, sharded) -> Batch:
    """Lines of nobody: pads alone, and a state that is none."""
    shape = (rows, width) if geometry.ngram == 1 else (rows, width, geometry.ngram)
    columns = len(FIELDS) + geometry.shards * geometry.listed
    numbers = np.zeros((rows, columns), np.int32)
    numbers[:, FIELDS.index("state")] = geometry.states
    return Batch(
        ids=np.zeros(shape, np.int32),
        positions=np.full((rows, width), PAD_POSITION, np.int32),
        numbers=numbers,
        sharded=sharded,
    )


def _tokens(row, geometry):
    """`[count]` of a row, or `[count, ngram]`."""
    first = max(0, row.start - geometry.ngram + 1)
    ids = np.asarray(row.request.tokens[first : row.start + row.count], np.int32)[None]
    return windows(ids, geometry.ngram)[0, row.start - first :]


def _numbers(row, geometry) -> np.ndarray:
    options: RowOptions = row.request.sampling.row_options()
    values: dict[str, Any] = {
        "before": row.start, "added": row.count, "last": row.start + row.count - 1,
        "state": geometry.states if row.seat.state is None else row.seat.state,
        "seed": np.uint32(options.seed).view(np.int32), "top_k": options.top_k,
        "temperature": np.float32(options.temperature).view(np.int32),
        "top_p": np.float32(options.top_p).view(np.int32),
    }  # fmt: skip
    pages = np.zeros((geometry.shards, geometry.listed), np.int32)
    table = np.asarray(row.seat.table, np.int32) % geometry.pages_per_shard
    for shard in range(geometry.shards):
        own = table[shard :: geometry.shards]
        pages[shard, : len(own)] = own
    return np.concatenate([[values[name] for name in FIELDS], pages.reshape(-1)]).astype(np.int32)
