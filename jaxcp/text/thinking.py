# SPDX-License-Identifier: Apache-2.0
"""Levels of thinking: which a checkpoint has, and what its template is told for each.

A level is "no_think" or a name of the model's own ("low", "high", ...), a budget a number of tokens
after which the thinking is closed. OpenAI's `reasoning_effort` maps to the nearest level.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

NO_THINK = "no_think"
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""OpenAI's values of `reasoning_effort`, least thinking first."""
USUAL = ("low", "medium", "high")
TAKEN = re.compile(r"reasoning_effort\s+not\s+in\s*[\[({]([^\])}]*)")

Levels = Mapping[str, Mapping[str, Any]]
"""Variables of the template for each level, least thinking first."""


def levels_of(variables: frozenset[str], source: str) -> Levels:
    """Find the levels of a template from the variables that it reads.

    Templates that refuse an effort, or pass it over, have a list of those that they take.
    """
    levels: dict[str, dict[str, Any]] = {}
    if "reasoning_effort" in variables:
        listed = TAKEN.search(source)
        names = re.findall(r"\w+", listed[1]) if listed else []
        known = [name for name in (NO_THINK, *EFFORTS) if name in names]
        levels = {name: {"reasoning_effort": name} for name in known or USUAL}
    if switch := next((x for x in ("enable_thinking", "thinking") if x in variables), None):
        levels = levels or {"high": {}}
        levels = {NO_THINK: {}} | {name: {**told, switch: True} for name, told in levels.items()}
        levels[NO_THINK] = {switch: False}
    return levels


def chosen(thinking: str | int | None, levels: Levels) -> tuple[Mapping[str, Any], int | None]:
    """Give the variables of the template for a level or a budget, and the budget.

    Raises:
      ValueError: the checkpoint has no such level, or none at all.
    """
    if thinking is None:
        return {}, None
    offered = f"one of {', '.join(levels)} or a number of tokens"
    if not levels:
        raise ValueError(
            f"needed a checkpoint whose chat template has levels of thinking for {thinking!r:.50}; "
            "this one has none. Leave thinking out"
        )
    if isinstance(thinking, int) and not isinstance(thinking, bool) and thinking >= 0:
        return [*levels.values()][-1 if thinking else 0], thinking
    if not isinstance(thinking, str) or thinking not in levels:
        raise ValueError(f"thinking must be {offered}; got {thinking!r:.50}")
    return levels[thinking], None


def level_of_effort(effort: str, levels: Sequence[str]) -> str | None:
    """Map OpenAI's `reasoning_effort` to the nearest level that thinks no longer.

    "none" and "minimal" take the lowest level, which of some checkpoints thinks; None where there
    are no levels.

    Raises:
      ValueError: it is none of OpenAI's values, nor a level.
    """
    if effort in levels or not levels:
        return effort if effort in levels else None
    if effort not in EFFORTS:
        raise ValueError(f"reasoning_effort must be one of {', '.join(EFFORTS)}; got {effort!r}")
    if effort in ("none", "minimal"):
        return levels[0]
    thinking = [level for level in levels if level != NO_THINK]
    lower = [x for x in thinking if EFFORTS.index(x) <= EFFORTS.index(effort)]
    return (lower or thinking)[-1 if lower else 0]
