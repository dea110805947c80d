# SPDX-License-Identifier: Apache-2.0
"""Streams tensors from files into the shards of an array, a bounded piece at a time.

The host holds the shards of its devices and `CHUNK` bytes of one tensor: each byte of a file is
read once, however many shards it goes to, and its pages are given back at once.
"""

import collections
import contextlib
import math
import mmap
import sys
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Sharding

from jaxcp.models.weight_table import Piece

CHUNK = 64 << 20
ALIGNED = 64  # the CPU's devices take memory that begins so without a copy

BIG = 1 << 30  # bytes: smaller ones are there before a bar is read

Box = tuple[tuple[int, int], ...]  # first and end on each axis


def stream(
    pieces: Iterable[Piece], shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding | None
) -> tuple[jax.Array, collections.Counter]:
    """Assemble an array of pieces, and count each tensor's values that are NaN or Inf in `dtype`.

    Args:
      pieces: cover `shape` and do not overlap. Pieces for other hosts' devices are not read.
      sharding: None puts the array where JAX puts arrays by default.
    Raises:
      ValueError: `sharding` does not divide `shape`.
    """
    holders = _holders(shape, sharding)
    shards = {box: _empty([end - first for first, end in box], dtype) for box in holders}
    nonfinite: collections.Counter = collections.Counter()
    for piece in pieces:
        if not any(_overlap(_box(piece.start, piece.shape), box) for box in shards):
            continue
        for start, values in _chunks(piece):
            nonfinite[piece.name] += _scatter(start, values, shards)
            _give_back(values)
    if sharding is None:
        (only,) = shards.values()
        return jax.device_put(only), +nonfinite
    arrays = [
        jax.device_put(shards[box], device)
        for box, devices in holders.items()
        for device in devices
    ]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays), +nonfinite


def _holders(shape, sharding) -> dict[Box, list]:
    """The devices of this host that hold each part of an array, by the part."""
    if sharding is None:
        return {_box((0,) * len(shape), shape): []}
    holders: dict[Box, list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        ends = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
        holders.setdefault(tuple(ends), []).append(device)
    return holders


def _empty(shape, dtype):
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + ALIGNED, np.uint8)
    first = -raw.ctypes.data % ALIGNED
    return raw[first : first + size].view(dtype).reshape(shape)


def _chunks(piece: Piece) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Cut a piece into parts of about CHUNK bytes, along the axis that is outermost in the file."""
    values = piece.values()
    assert values.shape == piece.shape, f"{piece.name}: {values.shape} for {piece.shape}"
    if values.nbytes <= CHUNK:
        yield piece.start, values
        return
    axis = int(np.argmax(values.strides))
    step = max(1, CHUNK * values.shape[axis] // values.nbytes)
    for first in range(0, values.shape[axis], step):
        start = list(piece.start)
        start[axis] += first
        index = [slice(None)] * values.ndim
        index[axis] = slice(first, first + step)
        yield tuple(start), values[tuple(index)]


def _scatter(start, values, shards) -> int:
    """Copy `values` into the shards that hold them; return how many are not finite there."""
    nonfinite = 0
    for box, shard in shards.items():
        overlap = _overlap(_box(start, values.shape), box)
        if overlap is None:
            continue
        to = shard[_index(overlap, [first for first, _ in box])]
        with np.errstate(
            over="ignore", invalid="ignore"
        ):  # overflow is counted and reported by name
            to[...] = values[_index(overlap, start)]
        nonfinite += to.size - int(np.isfinite(to).sum())
    return nonfinite


def _give_back(values):
    """Give back the pages of a mapped file: until then they count as this process's memory."""
    pages = getattr(values, "_mmap", None)
    if pages is not None and hasattr(pages, "madvise"):
        pages.madvise(mmap.MADV_DONTNEED)


def _box(start, shape) -> Box:
    return tuple((first, first + size) for first, size in zip(start, shape, strict=True))


def _index(box: Box, origin) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for (a, b), o in zip(box, origin, strict=True))


def _overlap(one: Box, other: Box) -> Box | None:
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return both if all(first < end for first, end in both) else None


@contextlib.contextmanager
def progress_bar(
    total: int, shown: bool | None, label: str = "loading"
) -> Iterator[Callable[[int], None]]:
    """Draw a bar of bytes on stderr and yield the function that advances it.

    `shown`: None draws it for a big total on a terminal.
    """
    if shown is None:
        shown = total >= BIG and sys.stderr.isatty()
    if not shown:
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(TextColumn(label), BarColumn(), *columns, console=console) as bar:
        task = bar.add_task(label, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


def counted(
    pieces: Iterable[Piece], itemsize: int, advance: Callable[[int], None]
) -> Iterator[Piece]:
    """Yield the pieces; call `advance` with the bytes of one when the next is asked for."""
    for piece in pieces:
        yield piece
        advance(math.prod(piece.shape) * itemsize)
