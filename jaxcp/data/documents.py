# SPDX-License-Identifier: Apache-2.0
"""Documents of files that people have: text, JSON lines (also gzipped), Parquet.

A text file is one document; a line of JSON, or a row of Parquet, is one.
"""

import gzip
import importlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxcp.data.sources import ARRAY, SHIPPED, not_text

PIECE = 1 << 24
"""Characters of a text file that are encoded at once; a longer one is cut after a line."""


class Document(NamedTuple):
    """A document, or a piece of one that others follow."""

    text: str
    complete: bool
    """The document ends here."""
    whole: bool
    """It is a record: text files are split in two parts, records are not."""
    done: int
    """Bytes of the file that were read up to here."""


def sizes(files: list[str]) -> dict[pathlib.Path, int]:
    """The files by path, with their bytes.

    Raises:
      ValueError: none, one twice, one that is no file or is empty, or one that this cannot read.
    """
    paths = [SHIPPED.get(name, pathlib.Path(name)) for name in files]
    if not paths or len(set(paths)) != len(paths):
        raise ValueError(f"needed files, each once; got {[str(path) for path in paths]}")
    for path in paths:
        if not path.is_file() or path.stat().st_size == 0:
            raise ValueError(f"needed a file with text in it; got {path}")
        if path.suffix in (".bin", ".idx", ".pkl", ".npy", ".zip", ".zst", ".xz"):
            raise ValueError(f"needed text, JSON lines or Parquet; got {path}")
        with path.open("rb") as file:
            if not_text(str(path), file.read(1 << 16)) == ARRAY:
                raise ValueError(f"needed text, JSON lines or Parquet; {path} {ARRAY}")
    return {path: path.stat().st_size for path in paths}


def is_records(path: pathlib.Path) -> bool:
    """Tell whether the documents of a file are records, by its name or its first lines."""
    with path.open("rb") as file:
        return _is_zipped(path) or not_text(str(path), file.read(1 << 16)) is not None


def _is_zipped(path: pathlib.Path) -> bool:
    return path.name.lower().endswith((".jsonl.gz", ".ndjson.gz"))


def documents(path: pathlib.Path, field: str) -> Iterator[Document]:
    """Read the documents of a file.

    Args:
      field: the field, or column, that has the text of a record.
    Raises:
      ValueError: the file is not UTF-8, a line is no JSON object, or the field is not there or no
        text; with file and line.
      ModuleNotFoundError: Parquet without pyarrow, which is an extra.
    """
    with path.open("rb") as file:
        if file.read(4) == b"PAR1":
            return _parquet(path, field)
    return _json_lines(path, field) if is_records(path) else _text(path)


def _text(path: pathlib.Path) -> Iterator[Document]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            piece, done = file.read(PIECE), 0
            while piece:
                piece += file.readline()
                done += len(piece.encode())
                after = file.read(PIECE)
                yield Document(piece, not after, False, done)
                piece = after
    except UnicodeDecodeError as error:
        raise ValueError(
            f"needed UTF-8 text; got {path} ({error.reason}). Convert it first: iconv -f LATIN1 "
            "-t UTF-8 (name the encoding that the file has)"
        ) from error


def _json_lines(path: pathlib.Path, field: str) -> Iterator[Document]:
    with path.open("rb") as raw, gzip.open(raw) if _is_zipped(path) else raw as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            text = _field(record, field, f"{path}, line {number}")
            yield Document(text, True, True, raw.tell())


def _parquet(path: pathlib.Path, field: str) -> Iterator[Document]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} is Parquet, which needs pyarrow: pip install jaxcp[parquet]"
        ) from error
    with parquet.ParquetFile(path) as file:
        columns = file.schema_arrow.names
        if field not in columns:
            raise ValueError(f"{path} has no column {field!r}; it has {columns}: name one by field")
        rows, total, size = 0, max(1, file.metadata.num_rows), path.stat().st_size
        for batch in file.iter_batches(batch_size=1000, columns=[field]):
            for text in batch.column(0).to_pylist():
                rows += 1
                if not isinstance(text, str):
                    raise ValueError(f"{path}, row {rows}: needed text in {field!r}; got {text!r}")
                yield Document(text, True, True, size * rows // total)


def _field(record: Any, field: str, at: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"{at}: needed a JSON object; got {type(record).__name__}")
    if not isinstance(record.get(field), str):
        raise ValueError(
            f"{at}: needed text in the field {field!r}; its fields are {sorted(record)}: name one"
        )
    try:
        record[field].encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{at}: half of a surrogate pair in {field!r} is no text") from error
    return record[field]
