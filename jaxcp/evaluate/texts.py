# SPDX-License-Identifier: Apache-2.0
"""Texts to score, as ids: documents of files, or those of a folder that `jaxcp prepare` wrote."""

import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from jaxcp.data.documents import documents, sizes
from jaxcp.data.prepared import TOKENIZER, Part, is_prepared
from jaxcp.data.sources import TokenFiles
from jaxcp.data.stream import Stream
from jaxcp.text.tokenizer import Tokenizer

BLOCK = 1 << 20
"""Tokens that are searched for separators at a time."""


@dataclasses.dataclass(frozen=True)
class Text:
    """A document as ids `[N]`; those from `first` on are predicted."""

    ids: np.ndarray
    first: int
    bytes: int
    """UTF-8 bytes of the ids that are predicted. A character that several tokens share belongs to
    the last of them."""

    @property
    def predicted(self) -> int:
        """Ids that are predicted."""
        return len(self.ids) - self.first


def read_texts(
    names: Sequence[str],
    tokenizer: Tokenizer,
    *,
    field: str = "text",
    part: Part = "val",
    max_tokens: int | None = None,
) -> list[Text]:
    """Read documents that have a token to predict at least.

    A text file is a document, and so is a line of JSON or a row of Parquet: its ids stand behind
    those with which the checkpoint begins a text (BOS). Without such a one nothing predicts a
    document's first token. A prepared folder has the ids of its `part`, divided at its separators,
    which are predicted where they end a document; where they start one, that of the next is.

    Args:
      field: of records, the field that has the text.
      max_tokens: ids to predict at most; the document that reaches it is cut.
    Raises:
      ValueError: no files, one that is no text, or a folder of another tokenizer; the message
        names it. Or nothing to predict.
    """
    files = [name for name in names if not is_prepared(name)]
    if files or not names:
        sizes(files)
    left = sys.maxsize if max_tokens is None else max_tokens
    texts: list[Text] = []
    each = (_of(name, tokenizer, field, part, left) for name in names)
    for text in itertools.chain.from_iterable(each):
        if left <= 0:
            break
        if text.predicted > left:
            text = _cut(text, left, tokenizer)
        if text.predicted > 0:
            texts.append(text)
            left -= text.predicted
    if not texts:
        raise ValueError(f"needed two tokens in a document of {', '.join(names)}; none has them")
    return texts


def _of(name: str, tokenizer: Tokenizer, field: str, part: Part, most: int) -> Iterator[Text]:
    if is_prepared(name):
        yield from _prepared(name, tokenizer, part, most)
        return
    pieces: list[str] = []
    for document in documents(_path(name), field):
        pieces.append(document.text)
        if document.complete:
            yield _encoded("".join(pieces), tokenizer)
            pieces = []


def _path(name: str) -> pathlib.Path:
    return next(iter(sizes([name])))


def _encoded(text: str, tokenizer: Tokenizer) -> Text:
    begin = np.asarray(tokenizer.begin, np.int32)
    ids = np.concatenate([begin, tokenizer.encode(text)])
    first = max(1, len(begin))
    unpredicted = _whole_characters(tokenizer, ids[len(begin) : first])
    return Text(ids, first, len(text.encode()) - unpredicted)


def _prepared(folder: str, tokenizer: Tokenizer, part: Part, most: int) -> Iterator[Text]:
    theirs = Tokenizer.from_file(pathlib.Path(folder, TOKENIZER)).backend.get_vocab()
    ours = tokenizer.backend.get_vocab()
    if other := [token for token, i in theirs.items() if ours.get(token) != i]:
        raise ValueError(
            f"{folder} was prepared with another tokenizer than the checkpoint's: {other[0]!r} is "
            f"{theirs[other[0]]} there and {ours.get(other[0])} here. Prepare it with the "
            "checkpoint's tokenizer.json, or name the text itself"
        )
    for ids in _divided(TokenFiles(pattern=folder, part=part).stream, most):
        size = len(tokenizer.decode(ids).encode())
        yield Text(ids, 1, size - _whole_characters(tokenizer, ids[:1]))


def _divided(stream: Stream, most: int) -> Iterator[np.ndarray]:
    """Yield the documents of a stream, each with the separators that it predicts or begins with.

    Args:
      most: ids of a document after which it may end.
    """
    starts = stream.separator_at == "starts"
    held: list[np.ndarray] = []
    for begin in range(0, stream.total, BLOCK):
        block = stream.read(begin, min(BLOCK, stream.total - begin))
        ends = np.empty(0, np.int64)
        if stream.separator is not None:
            ends = np.flatnonzero(block == stream.separator) + 1
        for piece in np.split(block, ends)[:-1]:
            yield np.concatenate([*held, piece])
            held = [piece[-1:]] if starts else []
        held.append(block[ends[-1] if len(ends) else 0 :])
        if sum(map(len, held)) > most:
            break
    yield np.concatenate(held)


def _cut(text: Text, predicted: int, tokenizer: Tokenizer) -> Text:
    ids = text.ids[: text.first + predicted]
    size = _whole_characters(tokenizer, ids) - _whole_characters(tokenizer, ids[: text.first])
    return Text(ids, text.first, size)


def _whole_characters(tokenizer: Tokenizer, ids: np.ndarray) -> int:
    """Count the bytes of the characters that are complete in a text of these ids."""
    text = tokenizer.detokenizer()
    return sum(len(text.push(int(i)).encode()) for i in ids)
