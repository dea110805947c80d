# SPDX-License-Identifier: Apache-2.0
"""Reads what a checkpoint says of generation: how to sample, and which tokens end an answer.

The tokens are `eos_token_id`: one id, a list or null. It is read from generation_config.json first,
and from config.json where that has no such field; there from the `text_config` of a model that is
more than a language model, where the field is not beside it.
"""

import dataclasses
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxcp.input_files import read_json

log = logging.getLogger(__name__)

CONFIG, GENERATION = "config.json", "generation_config.json"
FIELD = "eos_token_id"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
    """Sampling as a checkpoint's authors advise it; None for what they say nothing of."""

    temperature: float | None = None
    """0 where they say that answers are not sampled."""
    top_k: int | None = None
    top_p: float | None = None


def read_defaults(path: str | os.PathLike) -> Defaults:
    """Read the advice of generation_config.json in a checkpoint folder.

    A field with a number out of range is passed over with a warning.

    Raises:
      ValueError: the file is no JSON object.
    """
    file = Path(path, GENERATION)
    fields = read_json(file) if file.exists() else {}
    if fields.get("do_sample") is False:
        return Defaults(temperature=0.0)
    temperature = _number(file, fields, "temperature", 0, math.inf)
    if temperature is None and fields.get("do_sample") is True:
        temperature = 1.0
    top_k = _number(file, fields, "top_k", 0, math.inf)
    return Defaults(
        temperature=temperature,
        top_k=int(top_k) if top_k else None,  # 0 keeps all
        top_p=_number(file, fields, "top_p", 0, 1),
    )


def _number(
    file: Path, fields: dict[str, Any], name: str, least: float, most: float
) -> float | None:
    value: Any = fields.get(name)
    if type(value) in (int, float) and least <= value <= most and math.isfinite(value):
        return value
    if value is not None:
        log.warning("%s: %s is %r, which is no such number", file, name, value)
    return None


def read_stop_tokens(path: str | os.PathLike, vocab_size: int) -> tuple[int, ...]:
    """Read the ids that end an answer from a checkpoint folder; none where its files name none.

    An id beyond the vocabulary is dropped with a warning: it can never be sampled.

    Raises:
      ValueError: a file says something else than ids; the message names it.
    """
    for name in (GENERATION, CONFIG):
        file = Path(path, name)
        if file.exists() and FIELD in (fields := _of_text(read_json(file))):
            return _within(file, _ids(file, fields[FIELD]), vocab_size)
    return ()


def read_generation(path: str | os.PathLike) -> str:
    """Read generation_config.json of a checkpoint folder as the text of a JSON object, or nothing.

    Raises:
      ValueError: the file is no JSON object.
    """
    file = Path(path, GENERATION)
    return json.dumps(read_json(file)) if file.exists() else ""


def generation_config(
    path: str | os.PathLike, stop_tokens: Sequence[int], vocab_size: int, kept: str = ""
) -> dict[str, Any] | None:
    """The generation_config.json that names these ids; None where the folder needs no other one.

    Args:
      kept: what `read_generation` gave of the checkpoint that was loaded. It goes before the fields
        of a file that is in the folder, of which the others stay.
    """
    file = Path(path, GENERATION)
    there = read_json(file) if file.exists() else {}
    loaded = json.loads(kept or "{}")
    if not _name(loaded, file, stop_tokens, vocab_size):
        loaded.pop(FIELD, None)  # others were given to the model since
    fields = there | loaded
    named = _name(fields, file, stop_tokens, vocab_size)
    if FIELD not in fields:
        named = set(read_stop_tokens(path, vocab_size)) == set(stop_tokens)
    if not named:
        ids = [int(i) for i in stop_tokens]
        fields |= {FIELD: ids if len(ids) > 1 else next(iter(ids), None)}
    return None if fields == there else fields


def _name(fields: dict[str, Any], file: Path, stop_tokens: Sequence[int], vocab_size: int) -> bool:
    """Tell whether these fields name these ids, and no others that the model has."""
    named = {i for i in _ids(file, fields.get(FIELD)) if i < vocab_size}
    return FIELD in fields and named == set(stop_tokens)


def _of_text(fields: dict[str, Any]) -> dict[str, Any]:
    nested = fields.get("text_config")
    return fields if FIELD in fields or not isinstance(nested, dict) else nested


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
