# SPDX-License-Identifier: Apache-2.0
"""Reads which tokens end an answer, `eos_token_id`: one id, a list or null.

Reads generation_config.json first, and config.json where that has no such field.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxcp.weights.files import CONFIG, read_json

log = logging.getLogger(__name__)

GENERATION = "generation_config.json"
FIELD = "eos_token_id"


def read_stop_tokens(path: str | os.PathLike, vocab_size: int) -> tuple[int, ...]:
    """Read the ids that end an answer from a checkpoint folder; none where its files name none.

    An id beyond the vocabulary is dropped with a warning: it can never be sampled.

    Raises:
      ValueError: a file says something else than ids; the message names it.
    """
    for name in (GENERATION, CONFIG):
        file = Path(path, name)
        if file.exists() and FIELD in (fields := read_json(file)):
            return _within(file, _ids(file, fields[FIELD]), vocab_size)
    return ()


def generation_config(
    path: str | os.PathLike, stop_tokens: Sequence[int], vocab_size: int
) -> dict[str, Any] | None:
    """The generation_config.json that names these ids; None where the folder already does.

    Keeps the other fields of a file that is there.
    """
    if set(read_stop_tokens(path, vocab_size)) == set(stop_tokens):
        return None
    file = Path(path, GENERATION)
    fields = read_json(file) if file.exists() else {}
    ids = [int(i) for i in stop_tokens]
    return fields | {FIELD: ids if len(ids) > 1 else next(iter(ids), None)}


def _ids(file: Path, value: Any) -> list[int]:
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):  # a bool is no id
        raise ValueError(
            f"needed a token id, a list of ids or null as {FIELD}; {file} has {value!r:.100}. "
            "Correct it, or take the field out"
        )
    return ids


def _within(file: Path, ids: list[int], vocab_size: int) -> tuple[int, ...]:
    beyond = [i for i in ids if i >= vocab_size]
    if beyond:
        log.warning(
            "%s: %s %s cannot end an answer: the model has %d tokens",
            file, FIELD, beyond[:9], vocab_size,
        )  # fmt: skip
    return tuple(dict.fromkeys(i for i in ids if i < vocab_size))
