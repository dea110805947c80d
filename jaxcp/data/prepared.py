# SPDX-License-Identifier: Apache-2.0
"""The folder that `prepare` writes: shards of tokens, `tokenizer.json`, and `prepared.json`.

`prepared.json` names every shard and its tokens; it is written last, and a folder without it is
none. No file is a pickle.
"""

import dataclasses
import json
import os
import pathlib
from typing import Literal, NamedTuple

from jaxcp.input_files import read_json

INDEX, TOKENIZER = "prepared.json", "tokenizer.json"
FORMAT = "jaxcp tokens 1"

Part = Literal["train", "val"]
Place = Literal["ends", "starts"]


class Shard(NamedTuple):
    """A file of a prepared folder, and how many tokens it holds."""

    file: str
    tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """The contents of a prepared folder."""

    vocab_size: int
    separator: int | None
    """The token between documents; None where there is none."""
    separator_at: Place
    """The separator ends a document (nanoGPT) or starts one (llm.c)."""
    documents: int
    """Documents of both parts; a text file that is in both counts twice."""
    train: tuple[Shard, ...]
    val: tuple[Shard, ...]

    def tokens(self, part: Part) -> int:
        """Count the tokens of a part."""
        return sum(shard.tokens for shard in getattr(self, part))

    def write(self, folder: pathlib.Path) -> None:
        """Write `prepared.json`."""
        fields = {"format": FORMAT} | dataclasses.asdict(self)
        for part in ("train", "val"):
            fields[part] = [shard._asdict() for shard in getattr(self, part)]
        (folder / INDEX).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")


def is_prepared(path: str | os.PathLike) -> bool:
    """Tell whether a path is a folder that `prepare` finished."""
    return pathlib.Path(path, INDEX).is_file()


def read_prepared(folder: str | os.PathLike) -> Prepared:
    """Read `prepared.json`.

    Raises:
      ValueError: it is not what `prepare` writes.
    """
    path = pathlib.Path(folder, INDEX)
    fields = read_json(path)
    kind = fields.pop("format", None)
    if kind != FORMAT:
        raise ValueError(f"needed the format {FORMAT!r}; got {path} with {kind!r}")
    try:
        for part in ("train", "val"):
            fields[part] = tuple(_shard(**shard) for shard in fields[part])
        return Prepared(**fields)
    except (KeyError, TypeError) as error:
        raise ValueError(f"needed what `jaxcp prepare` writes; got {path}: {error}") from error


def _shard(file: str, tokens: int) -> Shard:
    if pathlib.PurePath(file).name != file:  # of this folder, whatever the JSON says
        raise TypeError(f"a shard must be a file of the folder; got {file!r}")
    return Shard(file, int(tokens))
