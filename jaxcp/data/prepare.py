# SPDX-License-Identifier: Apache-2.0
"""Writes a prepared folder: documents as tokens, in shards of two parts. Knows no tokenizer.

All is written into `OUT.preparing`, which becomes OUT when it is complete: a process that dies
leaves OUT as it was, and the next one begins anew.
"""

import contextlib
import hashlib
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, Protocol

import numpy as np

from jaxcp.data.documents import Document, documents, is_records, sizes
from jaxcp.data.prepared import TOKENIZER, Part, Place, Prepared, Shard
from jaxcp.data.token_formats import header

BATCH = 1 << 20
"""Characters that are encoded at once."""


class Encoding(Protocol):
    """A tokenizer as `prepare` needs it; `jaxcp.text.encoders` makes them."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def encode(self) -> Callable[[list[str]], list[np.ndarray]]: ...

    @property
    def separator(self) -> int | None: ...

    @property
    def vocab_size(self) -> int: ...


def has_many(files: list[str]) -> bool:
    """Tell whether files hold more than one document: several of them, or records."""
    return len(files) > 1 or any(is_records(path) for path in sizes(files))


def symbols(files: list[str], *, field: str = "text") -> set[str]:
    """Collect the characters of all documents."""
    found: set[str] = set()
    for path in sizes(files):
        for document in documents(path, field):
            found.update(document.text)
    return found


def prepare(
    files: list[str],
    out: str | os.PathLike,
    *,
    encoder: Encoding,
    field: str = "text",
    val: float = 0.1,
    separator_at: Place = "ends",
    shard_tokens: int = 100_000_000,
    on_read: Callable[[int], None] = lambda read: None,
) -> Prepared:
    """Write the documents of files as a folder that `TokenFiles` reads.

    Of a text file the end is for validation; of records those whose text has a hash below `val`,
    so that the same text is never in both parts.

    Args:
      files: text, JSON lines, Parquet, or "tinyshakespeare".
      encoder: `jaxcp.text.encoders` has them.
      field: the field, or column, with the text of a record.
      val: the fraction of the validation part; 0 for none.
      separator_at: where the encoder's separator stands; it "ends" a document or "starts" one.
      shard_tokens: most tokens of a file.
      on_read: told the bytes of the files that were read so far.
    Raises:
      ValueError: `out` holds something; a file that cannot be read; a part that got no token.
    """
    out, paths = pathlib.Path(out), sizes(files)
    if not 0 <= val < 1 or shard_tokens < 1:
        raise ValueError(f"needed 0 <= val < 1 and shard_tokens >= 1; got {val}, {shard_tokens}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"needed an empty folder; {out} holds something. Name another one")
    work = out.with_name(out.name + ".preparing")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    dtype = next(x for x in ("<u1", "<u2", "<u4") if encoder.vocab_size - 1 <= np.iinfo(x).max)
    count = 0
    with contextlib.ExitStack() as stack:
        writers = {
            part: stack.enter_context(_Shards(work, part, dtype, shard_tokens))
            for part in ("train", "val")
        }
        for part, texts, ended in _by_part(paths, field, val, on_read):
            for ids, end in zip(encoder.encode(texts), ended, strict=True):
                writers[part].write(ids, end, encoder.separator, separator_at)
                count += end
    written = {part: writers[part].shards for part in writers}
    for part, wanted in (("train", True), ("val", val > 0)):
        if wanted and not written[part]:
            raise ValueError(
                f"no document came into the part {part!r}: they are few, and val={val}. Set val "
                "to 0, or to a larger fraction"
            )
    prepared = Prepared(
        vocab_size=encoder.vocab_size, separator=encoder.separator, separator_at=separator_at,
        documents=count, train=tuple(written["train"]), val=tuple(written["val"]),
    )  # fmt: skip
    encoder.tokenizer.save(work / TOKENIZER)
    prepared.write(work)
    _flush(work)
    work.replace(out)
    return prepared


def _by_part(
    paths: dict[pathlib.Path, int], field: str, val: float, on_read: Callable[[int], None]
) -> Iterator[tuple[Part, list[str], list[bool]]]:
    """Yield texts to encode together, the part they go to, and which of them end a document."""
    before = 0
    for path, size in paths.items():
        waiting: dict[Part, list[tuple[str, bool]]] = {"train": [], "val": []}
        for document in documents(path, field):
            for part, text, end in _split(document, size, val):
                waiting[part].append((text, end))
                if sum(len(text) for text, _ in waiting[part]) >= BATCH:
                    yield part, *_columns(waiting[part])
                    waiting[part] = []
            on_read(before + document.done)
        for part, rows in waiting.items():
            if rows:
                yield part, *_columns(rows)
        before += size
        on_read(before)


def _columns(rows: list[tuple[str, bool]]) -> tuple[list[str], list[bool]]:
    return [text for text, _ in rows], [end for _, end in rows]


def _split(document: Document, size: int, val: float) -> Iterable[tuple[Part, str, bool]]:
    """Cut a document into its parts; `size` is that of its file."""
    if document.whole:
        digest = hashlib.blake2b(document.text.encode(), digest_size=8).digest()
        part: Part = "val" if int.from_bytes(digest, "little") < val * 2**64 else "train"
        return [(part, document.text, True)]
    data = document.text.encode()
    cut = int((1 - val) * size) - (document.done - len(data))
    if cut >= len(data):
        return [("train", document.text, document.complete or cut == len(data))]
    while cut > 0 and data[cut] & 0xC0 == 0x80:  # within a character
        cut -= 1
    if cut <= 0:
        return [("val", document.text, document.complete)]
    return [("train", data[:cut].decode(), True), ("val", data[cut:].decode(), document.complete)]


class _Shards:
    """Writes the tokens of a part, into files of so many at most."""

    def __init__(self, folder: pathlib.Path, part: str, dtype: str, most: int):
        self.folder, self.part, self.dtype, self.most = folder, part, np.dtype(dtype), most
        self.shards: list[Shard] = []
        self.file: BinaryIO | None = None
        self.count, self.fresh = 0, True

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, *_: Any) -> None:
        self._close()

    def write(self, ids: np.ndarray, end: bool, separator: int | None, place: Place) -> None:
        """Append a document, or a piece of one, and the separator where it belongs."""
        mark = np.array([] if separator is None else [separator], self.dtype)
        before = mark[: place == "starts" and self.fresh]
        after = mark[: place == "ends" and end]
        self._append(np.concatenate([before, ids.astype(self.dtype), after]))
        self.fresh = end

    def _append(self, ids: np.ndarray) -> None:
        while ids.size:
            if self.file is None:
                name = f"{self.part}-{len(self.shards):05d}.bin"
                self.file = (self.folder / name).open("wb")
                self.file.write(header(0, self.dtype.itemsize))
            room = self.most - self.count
            self.file.write(ids[:room].tobytes())
            self.count += min(room, ids.size)
            ids = ids[room:]
            if self.count == self.most:
                self._close()

    def _close(self) -> None:
        if self.file is None:
            return
        self.file.seek(0)
        self.file.write(header(self.count, self.dtype.itemsize))
        self.shards.append(Shard(pathlib.Path(self.file.name).name, self.count))
        self.file.close()
        self.file, self.count = None, 0


def _flush(folder: pathlib.Path) -> None:
    """Make sure that the files are on the disk before the folder gets its name."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
