# SPDX-License-Identifier: Apache-2.0
"""Training batches as pure functions of the step: resuming needs no saved iterator.

A source is any object with `batch(step, rows, length)`. Two come with the library: `TokenFiles`
(raw `.bin` files) and `TextSource` (text as bytes). Both see their tokens as one circular stream,
cut into windows that are shuffled anew every epoch; each token is trained on once an epoch.
"""

import dataclasses
import functools
import glob
import logging
import pathlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcp.data.batch import Batch
from jaxcp.data.batch import checked as checked
from jaxcp.data.batch import consecutive as consecutive
from jaxcp.layout import Layout

logger = logging.getLogger(__name__)


@runtime_checkable
class BatchSource(Protocol):
    """A source of batches that a run may bring; `batch` depends on its arguments only."""

    def batch(self, step: int, rows: int, length: int) -> Batch:
        """The batch of one optimizer step, in natural order, targets already shifted.

        `positions` (0, 1, 2, ...) and `weights` (1 where `targets >= 0`) are filled in where they
        are missing. Positions that start anew within a row need `segment_ids`, which alone keep
        documents apart; `PAD_POSITION` marks pads. A source may return another `[B, T]` than asked
        for, to change the context during a run; each new shape compiles once.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFiles:
    """Raw little-endian token files, as nanoGPT writes them.

    With `separator` (the token that ends a document) documents do not see each other: they get
    `segment_ids`, and no target crosses a boundary.

    Raises (on the first batch):
      ValueError: no file matches, a file is empty or cut off, or all together are too short.
    """

    pattern: str
    dtype: str = "uint16"
    separator: int | None = None
    seed: int = 0

    def __post_init__(self):
        try:
            dtype = np.dtype(self.dtype)
        except TypeError:
            raise ValueError(f"dtype must name a dtype, as uint16; got {self.dtype!r}") from None
        if dtype.kind not in "ui" or dtype.byteorder == ">":
            raise ValueError(f"tokens must be little-endian integers; got dtype={self.dtype!r}")
        if self.separator is None:
            return
        last = np.iinfo(dtype).max
        if type(self.separator) is not int or not 0 <= self.separator <= last:
            raise ValueError(
                f"separator must be a token of dtype={self.dtype}, 0 to {last}; "
                f"got separator={self.separator!r}"
            )

    @functools.cached_property
    def paths(self) -> list[str]:
        """The files, in the order in which their tokens follow each other."""
        paths = _files(self.pattern)
        if not paths:
            raise ValueError(f"no file matches data={self.pattern!r} (from {pathlib.Path.cwd()})")
        return paths

    @functools.cached_property
    def pieces(self) -> list[np.ndarray]:
        """The files, mapped into memory."""
        dtype = np.dtype(self.dtype).newbyteorder("<")
        pieces: list[np.ndarray] = []
        for path in self.paths:
            size = pathlib.Path(path).stat().st_size
            if size == 0:
                raise ValueError(f"token file {path} is empty; write it again or take it out")
            if size % dtype.itemsize:
                raise ValueError(
                    f"token file {path} has {size} bytes, which is no multiple of {dtype.itemsize} "
                    f"({self.dtype}): it is cut off or of another dtype"
                )
            pieces.append(np.memmap(path, dtype=dtype, mode="r"))
            if _looks_wider(pieces[-1]):
                logger.warning(
                    "every second token of %s is below 16, as if it held wider integers than %s",
                    path,
                    self.dtype,
                )
        return pieces

    def batch(self, step: int, rows: int, length: int) -> Batch:
        """Random windows `[rows, length]`, the same for the same seed and step."""
        return _window_batch(self.pieces, self.separator, self.seed, step, rows, length)

    def locate(self, step: int, rows: int, length: int, row: int, place: int) -> str:
        """Say where a token of a batch was read: its file and offset."""
        total = sum(piece.size for piece in self.pieces)
        token = int(_starts(total, self.seed, step, rows, length)[row] + place) % total
        for path, piece in zip(self.paths, self.pieces, strict=True):
            if token < piece.size:
                return f"{path}, token {token} (byte {token * piece.itemsize}, {self.dtype})"
            token -= piece.size
        raise AssertionError(token)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSource:
    """UTF-8 text with its bytes as tokens (a vocabulary of 256).

    `path` is a glob of text files; without one the text is CPython's own documentation, the
    topics of `pydoc_data`, which every installation has (its length differs between versions).
    `part` keeps a fraction of the bytes: `(0.0, 0.9)` to train, `(0.9, 1.0)` to test.

    Raises (on the first batch):
      ValueError: no file matches, a file is not UTF-8, or the text is too short.
    """

    path: str | None = None
    part: tuple[float, float] = (0.0, 1.0)
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.part[0] < self.part[1] <= 1:
            raise ValueError(
                f"part must be (start, stop) with 0 <= start < stop <= 1; got part={self.part}"
            )

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """The bytes of `part`, uint8 `[N]`."""
        if self.path is None:
            from pydoc_data.topics import topics

            text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
        else:
            text = b"\n\n".join(_read_utf8(path) for path in _files(self.path))
        if not text:
            raise ValueError(f"no text in data path={self.path!r} (from {pathlib.Path.cwd()})")
        start, stop = (int(x * len(text)) for x in self.part)
        return np.frombuffer(text[start:stop], np.uint8)

    def batch(self, step: int, rows: int, length: int) -> Batch:
        """Random windows `[rows, length]`, the same for the same seed and step."""
        return _window_batch([self.tokens], None, self.seed, step, rows, length)


def as_source(data: str | BatchSource, seed: int = 0) -> BatchSource:
    """Make `TokenFiles` of a glob of `.bin` files; return a source as it is."""
    return TokenFiles(pattern=data, seed=seed) if isinstance(data, str) else data


def _looks_wider(piece: np.ndarray) -> bool:
    """Tell whether odd places look like the upper halves of ids twice as wide, which are small."""
    head = piece[:4096]
    return np.unique(head[::2]).size > 64 and bool(head[1::2].max() < 16)


def _files(pattern: str) -> list[str]:
    """List the files (no folders) that a glob matches, sorted by name."""
    paths = glob.glob(pattern, recursive=True)
    return sorted(path for path in paths if not pathlib.Path(path).is_dir())


def _read_utf8(path: str) -> bytes:
    raw = pathlib.Path(path).read_bytes()
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    return raw


def _window_batch(
    pieces: list[np.ndarray], separator: int | None, seed: int, step: int, rows: int, length: int
) -> Batch:
    total = sum(piece.size for piece in pieces)
    starts = _starts(total, seed, step, rows, length)
    text = np.stack([_circular(pieces, total, int(start), length + 1) for start in starts])
    batch = {"tokens": text[:, :-1], "targets": text[:, 1:].copy()}
    if separator is not None:
        ends = batch["tokens"] == separator
        batch["segment_ids"] = (np.cumsum(ends, axis=1) - ends).astype(np.int32)
        batch["targets"][ends] = -1  # the next document's first token is not this one's to predict
    return batch


def _starts(total: int, seed: int, step: int, rows: int, length: int) -> np.ndarray:
    """The places `[rows]` in the stream of `total` tokens at which the rows of a batch begin."""
    if total < length + 1:
        raise ValueError(
            f"a row needs {length + 1} tokens (one more for the target); the data has {total}"
        )
    windows = total // length
    numbers = step * rows + np.arange(rows)
    starts = np.empty(rows, np.int64)
    for epoch in np.unique(numbers // windows):
        offset, order = _epoch(seed, int(epoch), total, windows)
        here = numbers // windows == epoch
        starts[here] = (offset + order[numbers[here] % windows] * length) % total
    return starts


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, total: int, windows: int) -> tuple[int, np.ndarray]:
    rng = np.random.default_rng((seed, epoch))
    return int(rng.integers(total)), rng.permutation(windows)


def _circular(pieces: list[np.ndarray], total: int, start: int, count: int) -> np.ndarray:
    """Read `count` tokens from `start`, the pieces end to end and around, as int32.

    As int64 where the files hold wider ids: one outside the vocabulary must still be outside of it
    when it is checked.
    """
    out: list[np.ndarray] = []
    while count:
        offset = start % total
        for piece in pieces:
            if offset < piece.size:
                out.append(np.asarray(piece[offset : offset + count]))
                break
            offset -= piece.size
        start, count = start + out[-1].size, count - out[-1].size
    ids = np.concatenate(out)
    if np.can_cast(ids.dtype, np.int32):
        return ids.astype(np.int32)
    if ids.dtype == np.uint64:  # the largest int64 is outside every vocabulary too
        ids = np.minimum(ids, np.uint64(np.iinfo(np.int64).max))
    return ids.astype(np.int64)


def put(batch: Batch, *, mesh: Mesh, layout: Layout, accumulate: int = 1) -> dict[str, jax.Array]:
    """Put a host batch `[B, T]` on the mesh as `[accumulate, B / accumulate, padded T]`: rows over
    `data`; tokens, in the order of `layout`, over `seq`."""
    rows, shards = batch["tokens"].shape[0], mesh.shape["seq"]
    if rows % (accumulate * mesh.shape["data"]):
        raise ValueError(
            f"rows must divide by accumulate x data = {accumulate} x {mesh.shape['data']}; "
            f"got {rows} rows"
        )
    batch = layout.permute(batch, shards=shards)
    sharding = NamedSharding(mesh, P(None, "data", "seq"))
    return {
        key: jax.device_put(x.reshape(accumulate, rows // accumulate, -1, *x.shape[2:]), sharding)
        for key, x in batch.items()
    }


def prefetch(make, start: int, stop: int) -> Iterator[Any]:
    """Yield `make(step)` for each step; a thread makes the next one meanwhile."""
    with ThreadPoolExecutor(1, thread_name_prefix="jaxcp-data") as pool:
        future = pool.submit(make, start)
        for step in range(start, stop):
            ready = future.result()
            if step + 1 < stop:
                future = pool.submit(make, step + 1)
            yield ready
