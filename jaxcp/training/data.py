# SPDX-License-Identifier: Apache-2.0
"""Training batches as pure functions of the step: resuming needs no saved iterator.

A source is any object with `batch(step, rows, length)`. Two come with the library: `TokenFiles`
(raw `.bin` files) and `TextSource` (text as bytes). Both see their tokens as one circular stream,
cut into windows that are shuffled anew every epoch; each token is trained on once an epoch.
"""

import dataclasses
import functools
import glob
import pathlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcp.layout import Layout

Batch = dict[str, np.ndarray]
"""`[B, T]` each: int32 `tokens`, `targets` (-1: none), `positions`, float32 `weights` of the
targets, and int32 `segment_ids` where documents are packed."""


@runtime_checkable
class BatchSource(Protocol):
    """What a run may bring instead of the sources here; `batch` depends on its arguments only."""

    def batch(self, step: int, rows: int, length: int) -> Batch:
        """The batch of one optimizer step, in natural order, targets already shifted.

        `positions` (0, 1, 2, ...) and `weights` (1 where `targets >= 0`) are filled in where they
        are missing. A source may return another `[B, T]` than asked for, to change the context
        during a run; each new shape compiles once.
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
        if np.dtype(self.dtype).kind not in "ui":
            raise ValueError(f"tokens must be integers; got dtype={self.dtype!r}")

    @functools.cached_property
    def pieces(self) -> list[np.ndarray]:
        """The files, mapped into memory."""
        dtype = np.dtype(self.dtype).newbyteorder("<")
        paths = sorted(glob.glob(self.pattern, recursive=True))
        if not paths:
            raise ValueError(f"no file matches data={self.pattern!r} (from {pathlib.Path.cwd()})")
        pieces: list[np.ndarray] = []
        for path in paths:
            size = pathlib.Path(path).stat().st_size
            if size == 0:
                raise ValueError(f"token file {path} is empty; write it again or take it out")
            if size % dtype.itemsize:
                raise ValueError(
                    f"token file {path} has {size} bytes, which is no multiple of {dtype.itemsize} "
                    f"({self.dtype}): it is cut off or of another dtype"
                )
            pieces.append(np.memmap(path, dtype=dtype, mode="r"))
        return pieces

    def batch(self, step: int, rows: int, length: int) -> Batch:
        return _window_batch(self.pieces, self.separator, self.seed, step, rows, length)


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
            text = b"\n\n".join(
                _read_utf8(path) for path in sorted(glob.glob(self.path, recursive=True))
            )
        if not text:
            raise ValueError(f"no text in data path={self.path!r} (from {pathlib.Path.cwd()})")
        start, stop = (int(x * len(text)) for x in self.part)
        return np.frombuffer(text[start:stop], np.uint8)

    def batch(self, step: int, rows: int, length: int) -> Batch:
        return _window_batch([self.tokens], None, self.seed, step, rows, length)


def as_source(data: str | BatchSource, seed: int = 0) -> BatchSource:
    """A glob of `.bin` files becomes `TokenFiles`; a source stays what it is."""
    return TokenFiles(pattern=data, seed=seed) if isinstance(data, str) else data


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
    text = np.stack([_circular(pieces, total, int(start), length + 1) for start in starts])
    batch = {"tokens": text[:, :-1], "targets": text[:, 1:].copy()}
    if separator is not None:
        ends = batch["tokens"] == separator
        batch["segment_ids"] = (np.cumsum(ends, axis=1) - ends).astype(np.int32)
        batch["targets"][ends] = -1  # the next document's first token is not this one's to predict
    return batch


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, total: int, windows: int) -> tuple[int, np.ndarray]:
    rng = np.random.default_rng((seed, epoch))
    return int(rng.integers(total)), rng.permutation(windows)


def _circular(pieces: list[np.ndarray], total: int, start: int, count: int) -> np.ndarray:
    """`count` tokens from `start` of the pieces end to end and around, int32."""
    out: list[np.ndarray] = []
    while count:
        offset = start % total
        for piece in pieces:
            if offset < piece.size:
                out.append(np.asarray(piece[offset : offset + count], np.int32))
                break
            offset -= piece.size
        start, count = start + out[-1].size, count - out[-1].size
    return np.concatenate(out)


def checked(batch: Batch, vocab_size: int) -> Batch:
    """The batch with its optional leaves filled in, cast, and known to be in range.

    Raises:
      ValueError: a leaf missing or unknown, shapes that differ, a token outside the vocabulary
        (an index out of range is silently clamped on devices, so it must be found here).
    """
    known = {"tokens", "targets", "positions", "segment_ids", "weights"}
    if not {"tokens", "targets"} <= batch.keys() <= known:
        raise ValueError(
            f"a batch needs tokens and targets and may have {sorted(known)}; got {sorted(batch)}"
        )
    tokens, targets = np.asarray(batch["tokens"]), np.asarray(batch["targets"])
    out: dict[str, Any] = {"tokens": tokens, "targets": targets}
    out["positions"] = batch.get(
        "positions", np.broadcast_to(np.arange(tokens.shape[-1]), tokens.shape)
    )
    if "segment_ids" in batch:
        out["segment_ids"] = batch["segment_ids"]
    out = {key: np.asarray(x, np.int32) for key, x in out.items()}
    weights = np.asarray(batch.get("weights", 1.0), np.float32)
    # A target below 0 is none, whatever weight came with it.
    out["weights"] = np.where(targets >= 0, weights, np.float32(0))
    shapes = {key: x.shape for key, x in out.items()}
    if len(set(shapes.values())) != 1 or tokens.ndim != 2:
        raise ValueError(f"all leaves of a batch must be [B, T] alike; got {shapes}")
    for name in ("tokens", "targets"):
        if out[name].max() >= vocab_size:
            raise ValueError(
                f"{name} hold id {out[name].max()}, but the vocabulary has {vocab_size}: "
                "raise vocab_size, or the data is of another tokenizer or dtype"
            )
    if tokens.min() < 0:
        raise ValueError(f"tokens must be >= 0; got {tokens.min()}")
    return out


def consecutive(batch: Batch) -> bool:
    """Whether the tokens of every segment lie one after the other, with positions that say so."""
    positions = batch["positions"]
    segments = batch.get("segment_ids", np.zeros_like(positions))
    step, same = np.diff(positions), np.diff(segments)
    return bool(((same > 0) | ((same == 0) & (step == 1))).all())


def put(batch: Batch, *, mesh: Mesh, layout: Layout, accumulate: int = 1) -> dict[str, jax.Array]:
    """Host batch `[B, T]` -> device batch `[accumulate, B / accumulate, padded T]`: rows over
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
    """`make(step)` for each step, one step ahead in a thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="jaxcp-data") as pool:
        future = pool.submit(make, start)
        for step in range(start, stop):
            ready = future.result()
            if step + 1 < stop:
                future = pool.submit(make, step + 1)
            yield ready
