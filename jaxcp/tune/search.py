# SPDX-License-Identifier: Apache-2.0
"""Try candidates for the block sizes of one part of an operation, and name the best."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from jaxcp.tune import evaluate, rows
from jaxcp.tune.parts import TARGETS, part_of

MARGIN = 1.02
"""The factor by which a candidate must beat the row that ships."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tried:
    """One candidate: a cost in the result's unit, or why it was refused; `tie` decides a draw."""

    blocks: Any
    cost: float | None = None
    tie: float = 0.0
    detail: str = ""
    refused: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """`tried` in the order of trial, the shipped row first; `by` is "time" or "code".

    `not_tried`: candidates that the time limit cut off; another run may then name another best.
    """

    problem: evaluate.Problem
    by: str
    unit: str
    device: str
    versions: dict[str, str]
    tried: tuple[Tried, ...]
    not_tried: tuple[Any, ...]
    seconds: float

    @property
    def ranked(self) -> tuple[Tried, ...]:
        """Candidates with a cost, best first; draws to four digits go by `tie`, then by order."""
        good = [x for x in self.tried if x.cost is not None]
        return tuple(sorted(good, key=lambda x: (_round(x.cost or 0.0), x.tie)))

    @property
    def best(self) -> Tried:
        """The first of `ranked`, or the shipped row if it is within 2 %: a cost says no more."""
        first, shipped = self.ranked[0], self.shipped
        close = shipped.cost is not None and shipped.cost <= MARGIN * (first.cost or 0.0)
        return shipped if close else first

    @property
    def shipped(self) -> Tried:
        return self.tried[0]

    @property
    def complete(self) -> bool:
        return not self.not_tried

    @property
    def row(self) -> rows.Row:
        """The best candidate as a row of the operation's table."""
        kind = TARGETS[self.problem.target].kind if self.by == "code" else self.device
        return rows.Row(problem=self.problem, kind=kind, blocks=self.best.blocks)

    def as_json(self) -> dict:
        return {
            **dataclasses.asdict(self.problem),
            "by": self.by,
            "unit": self.unit,
            "device": self.device,
            "versions": self.versions,
            "complete": self.complete,
            "seconds": round(self.seconds, 1),
            "row": self.row.text,
            "best": dataclasses.asdict(self.best),
            "shipped": dataclasses.asdict(self.shipped),
            "tried": [dataclasses.asdict(x) for x in self.tried],
            "not_tried": [dataclasses.asdict(x) for x in self.not_tried],
        }


def search(
    op: str,
    target: str,
    *,
    part: str | None = None,
    shape: Mapping[str, int] | None = None,
    dtype: str = "bfloat16",
    max_seconds: float = 300,
    values: Mapping[str, tuple[int, ...]] | None = None,
    progress: Callable[[int, int, Tried | None], None] = lambda done, total, last: None,
) -> Result:
    """Search the best block sizes for one part of `op`.

    Compares times when the target's device is here, else the cost of the machine code (`tpu_cost`
    and `gpu_cost` say how far to trust it). Costs are the same in every search, so its answer is,
    unless the time limit cuts it short (`Result.complete`).

    Args:
      op: "flash_attention", "grouped_matmul" or "decode_attention".
      target: "sm_120", "h200", "v5e", "v5p", "v6e" or "tpu7x".
      part: a name in the first column of the op's table; default: its forward pass.
      shape: sizes to change, such as `{"head_dim": 64}`.
      max_seconds: no candidate is begun, and none is waited for, after so long.
      values: values to try for each field, in place of the part's own.
      progress: called before the first candidate and after each: done, all, the last one.
    Raises:
      ValueError: names or sizes that the op does not have; no candidate could be compiled.
      ImportError, FileNotFoundError: a compiler, ptxas or nvdisasm is not installed.

    >>> result = search("flash_attention", "sm_120", shape={"head_dim": 128})
    >>> print(result.row.text, result.complete)
    """
    about = part_of(op, target, part)
    if not 0 < max_seconds < math.inf:
        raise ValueError(f"max_seconds must be positive and finite; got {max_seconds}")
    problem = evaluate.Problem(
        op=op, target=target, part=about.name, shape=about.sized(shape or {}), dtype=_dtype(dtype)
    )
    if values is not None:
        about = dataclasses.replace(about, values=_fields(about, values))
    start = time.monotonic()
    deadline = start + max_seconds
    device = evaluate.present(target)
    try:
        cost = evaluate.Timed(problem) if device else evaluate.Coded(problem, deadline)
    except evaluate.OutOfTime:
        raise ValueError(f"the compiler was not ready within max_seconds={max_seconds:g}") from None
    tried: list[Tried] = []
    candidates = list(about.candidates(cost.shipped, problem.shape))
    progress(0, len(candidates), None)
    try:
        for blocks in candidates:
            tried.append(Tried(blocks=blocks, **cost(blocks, deadline)))
            progress(len(tried), len(candidates), tried[-1])
    except evaluate.OutOfTime:
        pass
    finally:
        cost.close()
    if not any(x.cost is not None for x in tried):
        reason = tried[0].refused if tried else f"max_seconds={max_seconds:g} is too short for one"
        raise ValueError(f"no candidate for {about.name} on {target} can be had: {reason}")
    return Result(
        problem=problem,
        by=cost.by,
        unit=cost.unit,
        device=device or TARGETS[target].chips[0],
        versions=cost.versions,
        tried=tuple(tried),
        not_tried=tuple(candidates[len(tried) :]),
        seconds=time.monotonic() - start,
    )


def _round(cost: float) -> float:
    return round(cost, 3 - math.floor(math.log10(cost))) if cost > 0 else cost


def _dtype(name: str) -> str:
    if name not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"dtype must be bfloat16, float16 or float32; got {name!r}")
    return jnp.dtype(name).name


def _fields(about, values):
    if unknown := values.keys() - about.values.keys():
        raise ValueError(
            f"{about.name} searches {', '.join(about.values)}; got {', '.join(sorted(unknown))}"
        )
    return {name: tuple(values.get(name, ())) or kept for name, kept in about.values.items()}
