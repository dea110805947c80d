# SPDX-License-Identifier: Apache-2.0
"""Training batches as pure functions of the step: resuming needs no saved iterator.

A source is any object with `batch(step, rows, length)`. Three come with the library: `TokenFiles`
(what `jaxcp prepare` wrote, and files of others), `TextSource` (text as bytes or characters) and
`Mixture` (of sources, by weight). The first two see their tokens as one circular stream, cut into
windows that are shuffled anew every epoch; each token is trained on once an epoch.
"""

import dataclasses
import functools
import glob
import json
import logging
import pathlib
from collections.abc import Sequence
from typing import ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from jaxcp.data.batch import Batch
from jaxcp.data.batch import checked as checked
from jaxcp.data.batch import consecutive as consecutive
from jaxcp.data.prepared import TOKENIZER, Part, Place, Prepared, is_prepared, read_prepared
from jaxcp.data.stream import Stream
from jaxcp.data.token_formats import open_tokens

logger = logging.getLogger(__name__)

LATER = {"later": True}
"""Metadata of a field that runs from before it have not: at its default it is no part of the
identity of a run (`training.config.identity`)."""

SHAKESPEARE = "tinyshakespeare"
"""The text of nanoGPT's character-level runs, which comes with jaxcp (public domain)."""
SHIPPED = {SHAKESPEARE: pathlib.Path(__file__).with_name("tinyshakespeare.txt")}


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


@runtime_checkable
class WholeSource(Protocol):
    """A source that can be gone through from beginning to end, as an evaluation does."""

    def rows_of_all(self, length: int) -> int:
        """Count the rows in which every token but the first is a target, once."""
        ...

    def part_of_all(self, first: int, rows: int, length: int) -> Batch:
        """Rows `first` and on of those, `[rows, length]`, without targets after the last."""
        ...


class Streamed:
    """A source whose tokens are one stream."""

    stream: Stream
    by_rows: ClassVar[bool] = True
    """`some_rows` reads a part of a batch, whose tokens are consecutive."""

    def __init_subclass__(cls) -> None:
        if "batch" in vars(cls):  # a source of one's own makes batches that these rows are not of
            cls.by_rows = "some_rows" in vars(cls)

    def batch(self, step: int, rows: int, length: int) -> Batch:
        """Random windows `[rows, length]`, the same for the same seed and step."""
        return self.some_rows(step, rows, length, range(rows))

    def some_rows(self, step: int, rows: int, length: int, only: Sequence[int]) -> Batch:
        """The rows `only` of a batch, and nothing read of the others."""
        return self.stream.batch(step, rows, length, only)

    def rows_of_all(self, length: int) -> int:
        """Count the rows in which every token but the first is a target, once."""
        return self.stream.rows_of_all(length)

    def part_of_all(self, first: int, rows: int, length: int) -> Batch:
        """Rows `first` and on of those, `[rows, length]`, without targets after the last."""
        return self.stream.part_of_all(first, rows, length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFiles(Streamed):
    """Token files: a folder that `jaxcp prepare` wrote, or a glob of files of ours, nanoGPT's,
    llm.c's or Megatron's (`data/token_formats.py`).

    With `separator` (the token between documents; of a prepared folder, its own) documents do not
    see each other: they get `segment_ids`, and no target crosses a boundary.

    Raises (on the first batch):
      ValueError: no file matches, a file is empty or cut off, or all together are too short.
    """

    pattern: str
    dtype: str = "uint16"
    """The dtype of files that do not say it, as nanoGPT's."""
    separator: int | None = None
    seed: int = 0
    part: Part = dataclasses.field(default="train", metadata=LATER)
    """The part of a prepared folder."""
    separator_at: Place = dataclasses.field(default="ends", metadata=LATER)
    """The separator ends a document, as nanoGPT's does, or starts one, as llm.c's."""
    isolate: bool = dataclasses.field(default=True, metadata=LATER)
    """False lets documents see each other, as nanoGPT does."""

    def __post_init__(self):
        try:
            dtype = np.dtype(self.dtype)
        except TypeError:
            raise ValueError(f"dtype must name a dtype, as uint16; got {self.dtype!r}") from None
        if dtype.kind not in "ui" or dtype.byteorder == ">":
            raise ValueError(f"tokens must be little-endian integers; got dtype={self.dtype!r}")
        if self.part not in ("train", "val") or self.separator_at not in ("ends", "starts"):
            raise ValueError(
                "part must be 'train' or 'val', separator_at 'ends' or 'starts'; got "
                f"part={self.part!r}, separator_at={self.separator_at!r}"
            )
        if self.separator is None:
            return
        last = np.iinfo(dtype).max
        if type(self.separator) is not int or not 0 <= self.separator <= last:
            raise ValueError(
                f"separator must be a token of dtype={self.dtype}, 0 to {last}; "
                f"got separator={self.separator!r}"
            )

    @functools.cached_property
    def prepared(self) -> Prepared | None:
        """The list of a prepared folder; None of other files."""
        if not is_prepared(self.pattern):
            return None
        prepared = read_prepared(self.pattern)
        if self.separator not in (None, prepared.separator):
            raise ValueError(
                f"{self.pattern} was prepared with separator={prepared.separator}; got "
                f"separator={self.separator}. Leave it out"
            )
        return prepared

    @property
    def tokenizer_file(self) -> pathlib.Path | None:
        """The `tokenizer.json` that the tokens were made with, of a prepared folder."""
        return None if self.prepared is None else pathlib.Path(self.pattern, TOKENIZER)

    @functools.cached_property
    def paths(self) -> list[str]:
        """The files, in the order in which their tokens follow each other."""
        if self.prepared is not None:
            shards = getattr(self.prepared, self.part)
            if not shards:
                raise ValueError(f"{self.pattern} was prepared without a part {self.part!r}")
            return [str(pathlib.Path(self.pattern, shard.file)) for shard in shards]
        paths = _files(self.pattern)
        if not paths:
            raise ValueError(f"no file matches data={self.pattern!r} (from {pathlib.Path.cwd()})")
        return paths

    @functools.cached_property
    def pieces(self) -> list[np.ndarray]:
        """The files, mapped into memory."""
        pieces = [open_tokens(path, self.dtype) for path in self.paths]
        for path, piece in zip(self.paths, pieces, strict=True):
            if piece.offset == 0 and _looks_wider(piece):  # type: ignore[attr-defined]
                logger.warning(
                    "every second token of %s is below 16, as if it held wider integers than %s",
                    path,
                    self.dtype,
                )
        if self.prepared is not None:
            self._check_counts(pieces)
        return pieces

    def _check_counts(self, pieces: list[np.ndarray]) -> None:
        shards = getattr(self.prepared, self.part)
        for shard, piece in zip(shards, pieces, strict=True):
            if shard.tokens != piece.size:
                raise ValueError(
                    f"prepared.json says {shard.tokens:,} tokens; {self.pattern}/{shard.file} has "
                    f"{piece.size:,}: it is of another folder"
                )

    @functools.cached_property
    def stream(self) -> Stream:  # type: ignore[override]
        """The tokens of all files."""
        separator, place = self.separator, self.separator_at
        if self.prepared is not None:
            separator, place = self.prepared.separator, self.prepared.separator_at
        return Stream(
            pieces=self.pieces,
            separator=separator if self.isolate else None,
            separator_at=place,
            seed=self.seed,
        )

    def locate(self, step: int, rows: int, length: int, row: int, place: int) -> str:
        """Say where a token of a batch was read: its file and offset."""
        stream = self.stream
        token = int(stream.starts(step, rows, length)[row] + place) % stream.total
        for path, piece in zip(self.paths, self.pieces, strict=True):
            if token < piece.size:
                byte = piece.offset + token * piece.itemsize  # type: ignore[attr-defined]
                return f"{path}, token {token} (byte {byte}, {piece.dtype})"
            token -= piece.size
        raise AssertionError(token)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSource(Streamed):
    """UTF-8 text with its bytes as tokens (a vocabulary of 256), or its characters.

    `path` is a glob of text files, or "tinyshakespeare", which comes with jaxcp; without one the
    text is CPython's own documentation, the topics of `pydoc_data`, which every installation has
    (its length differs between versions). `part` keeps a fraction of the text: `(0.0, 0.9)` to
    train, `(0.9, 1.0)` to test.

    Raises (on the first batch):
      ValueError: no file matches, a file is JSON lines, Parquet or not UTF-8, or the text is too
        short.
    """

    path: str | None = None
    part: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    alphabet: Literal["bytes", "characters"] = dataclasses.field(default="bytes", metadata=LATER)
    """Characters are numbered in order, those of the whole text, whatever its `part`."""

    def __post_init__(self):
        if not 0 <= self.part[0] < self.part[1] <= 1:
            raise ValueError(
                f"part must be (start, stop) with 0 <= start < stop <= 1; got part={self.part}"
            )
        if self.alphabet not in ("bytes", "characters"):
            raise ValueError(
                f"alphabet must be 'bytes' or 'characters'; got alphabet={self.alphabet!r}"
            )

    @functools.cached_property
    def text(self) -> bytes:
        """The whole text."""
        if self.path is None:
            from pydoc_data.topics import topics

            text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
        elif self.path in SHIPPED:
            text = SHIPPED[self.path].read_bytes()
        else:
            text = b"\n\n".join(_read_utf8(path) for path in _files(self.path))
        if not text:
            raise ValueError(f"no text in data path={self.path!r} (from {pathlib.Path.cwd()})")
        return text

    @functools.cached_property
    def symbols(self) -> str | None:
        """The characters, in order of their ids; None of bytes."""
        return None if self.alphabet == "bytes" else "".join(sorted(set(self.text.decode())))

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """The tokens of `part`, uint8 (of characters as wide as it takes) `[N]`."""
        if self.symbols is None:
            ids = np.frombuffer(self.text, np.uint8)
        else:
            ids = numbered(self.text.decode(), self.symbols)
        start, stop = (int(x * len(ids)) for x in self.part)
        return ids[start:stop]

    @functools.cached_property
    def stream(self) -> Stream:  # type: ignore[override]
        """The tokens of `part`."""
        return Stream(pieces=[self.tokens], seed=self.seed)


def numbered(text: str, symbols: str) -> np.ndarray:
    """Number the characters of a text by their places in `symbols`, which are sorted.

    Raises:
      ValueError: a character is none of them.
    """
    known = np.frombuffer(symbols.encode("utf-32-le"), np.uint32)
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    ids = np.searchsorted(known, codes)
    wrong = np.flatnonzero(known[np.minimum(ids, known.size - 1)] != codes)
    if wrong.size:
        raise ValueError(
            f"character {text[wrong[0]]!r} at place {wrong[0]} is none of the {known.size} of the "
            "tokenizer: make one of all texts"
        )
    return ids.astype(np.uint8 if known.size <= 256 else np.uint32)


def as_source(data: str | BatchSource, seed: int = 0, part: Part = "train") -> BatchSource:
    """Make `TokenFiles` of a prepared folder or a glob; return a source as it is.

    Args:
      part: of a prepared folder.
    """
    if not isinstance(data, str):
        return data
    return TokenFiles(pattern=data, seed=seed, part=part if is_prepared(data) else "train")


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
    if problem := not_text(path, raw[:65536]):
        raise ValueError(f"needed text; {path} {problem}")
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    return raw


ARRAY = "is a JSON array: write one object a line (JSON lines)"


def not_text(path: str, head: bytes) -> str | None:
    """Say why a file is no plain text, by its name and its beginning; None where it may be."""
    suffix = pathlib.Path(path).suffix.lower()
    if suffix == ".parquet" or head.startswith(b"PAR1"):
        return f"is Parquet: jaxcp prepare {path} --field text --out DIR"
    if suffix in (".jsonl", ".ndjson") or all(map(_is_object, head.split(b"\n")[:-1][:2] or [b""])):
        return f"is JSON lines: jaxcp prepare {path} --field text --out DIR"
    if suffix == ".json" and head.lstrip().startswith(b"["):
        return ARRAY
    return None


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
