# SPDX-License-Identifier: Apache-2.0
"""The files of a run's data, which must be those it began with: others give other batches."""

import json
import pathlib
from typing import Any

from jaxcp.data.mixture import Mixture
from jaxcp.data.sources import TextSource, TokenFiles
from jaxcp.input_files import LARGE_JSON_BYTES, read_json


def tokens_of(source: Any) -> dict[str, int]:
    """Count the tokens of each file of a source, by its path; nothing of a source of one's own."""
    if isinstance(source, TokenFiles):
        return {p: piece.size for p, piece in zip(source.paths, source.pieces, strict=True)}
    if isinstance(source, TextSource):
        return {source.path or "the topics of pydoc_data": source.stream.total}
    if isinstance(source, Mixture):
        return {name: count for part in source.parts for name, count in tokens_of(part).items()}
    return {}


def claim(path: pathlib.Path, source: Any, *, began: bool) -> None:
    """Write into a file how many tokens each file of the data has, or check that they still have.

    Args:
      began: the run has checkpoints; runs from before there was such a file may go on.
    Raises:
      ValueError: a file is gone, new or of another length, naming it.
    """
    now = tokens_of(source)
    if began and path.exists():
        before = read_json(path, LARGE_JSON_BYTES)
        if lines := _differences(before, now):
            raise ValueError(
                f"the data of a run must stay what it was; {'; '.join(lines)}. Put it back, or "
                "start anew in another out_dir"
            )
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(now, indent=1))
    fresh.replace(path)


def _differences(before: dict[str, int], now: dict[str, int]) -> list[str]:
    gone = [f"{name} is gone" for name in before.keys() - now.keys()]
    new = [f"{name} is new" for name in now.keys() - before.keys()]
    other = [
        f"{name} had {before[name]:,} tokens and has {now[name]:,}"
        for name in before.keys() & now.keys()
        if before[name] != now[name]
    ]
    return sorted([*gone, *new, *other])
