# SPDX-License-Identifier: Apache-2.0
"""Numbers, a table and a picture of a load."""

import collections
import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxcp.evaluate.load import LoadResult
from jaxcp.evaluate.pictures import new_figure

PARTS = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
TIMES = {
    "to_first": "to first token",
    "to_first_of_later_turns": "... of later turns",
    "per_token": "a token, of an answer",
    "between_pieces": "between pieces",
    "whole": "whole answer",
}
"""Kinds of seconds by their names in JSON, and as a table has them."""


def summary(result: LoadResult) -> dict[str, Any]:
    """Count and measure: requests, errors by kind, tokens, and the percentiles of `TIMES`.

    Seconds are those of complete answers; tokens a second are over the whole load.
    """
    complete = [answer for answer in result.answers if answer.error is None]
    wanted = result.workload.requests * result.workload.turns
    errors = collections.Counter(x.error for x in result.answers if x.error is not None)
    tokens = {
        name: sum(getattr(answer, f"{name}_tokens") for answer in complete)
        for name in ("prompt", "cached", "answer")
    }
    took = result.seconds or float("inf")
    return {
        "url": result.url,
        "model": result.model,
        "endpoint": result.endpoint,
        "workload": dataclasses.asdict(result.workload),
        "seconds": result.seconds,
        "requests": {
            "wanted": wanted,
            "complete": len(complete),
            "failed": errors.total(),
            "never_sent": wanted - len(result.answers),
            "per_second": len(complete) / took,
        },
        "errors": dict(errors.most_common()),
        "tokens": {
            **tokens,
            "cached_share": tokens["cached"] / tokens["prompt"] if tokens["prompt"] else 0.0,
            "prompt_per_second": tokens["prompt"] / took,
            "answer_per_second": tokens["answer"] / took,
        },
        "times": {name: spread(values) for name, values in times(result).items() if values},
    }


def times(result: LoadResult) -> dict[str, list[float]]:
    """Seconds of each kind of `TIMES`, of all complete answers."""
    complete = [answer for answer in result.answers if answer.error is None]
    first = [(x.turn, x.to_first) for x in complete if x.to_first is not None]
    return {
        "to_first": [seconds for _, seconds in first],
        "to_first_of_later_turns": [seconds for turn, seconds in first if turn],
        "per_token": [x.per_token for x in complete if x.per_token is not None],
        "between_pieces": [gap for x in complete for gap in x.gaps],
        "whole": [x.end for x in complete],
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """The mean, the percentiles and the largest of some values."""
    parts = {name: percentile(values, part) for name, part in PARTS.items()}
    return {"mean": sum(values) / len(values), **parts, "max": max(values)}


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest value that at least this part of all do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


def each(result: LoadResult) -> list[dict[str, Any]]:
    """The numbers of every request, without texts."""
    names = ("conversation", "turn", "due", "to_first", "end", "error")
    counts = ("prompt_tokens", "cached_tokens", "answer_tokens")
    return [{name: getattr(x, name) for name in names + counts} for x in result.answers]


def table(numbers: dict[str, Any]) -> Any:
    """A rich table of the seconds, with the counts above it."""
    from rich.table import Table

    requests, tokens = numbers["requests"], numbers["tokens"]
    title = (
        f"{requests['complete']:,} of {requests['wanted']:,} requests in {numbers['seconds']:.1f} s"
        f" ({requests['per_second']:.2f}/s)\n"
        f"{tokens['prompt_per_second']:,.1f} tokens/s in, {tokens['answer_per_second']:,.1f} out; "
        f"{tokens['prompt']:,} in, {tokens['answer']:,} out\n"
        f"{tokens['cached']:,} cached ({100 * tokens['cached_share']:.1f} % of those in)"
    )
    if numbers["errors"]:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in numbers["errors"].items())
        title += f"\nerrors: {kinds}; {requests['never_sent']} more never sent"
    grid = Table(title=title, title_justify="left")
    grid.add_column("seconds")
    for name in ("mean", *PARTS, "max"):
        grid.add_column(name, justify="right")
    for name, values in numbers["times"].items():
        grid.add_row(TIMES[name], *(f"{x:.4f}" for x in values.values()))
    return grid


def plot_load(result: LoadResult, path: str | pathlib.Path) -> None:
    """Draw how many of the answers took at most so long, for each kind of seconds, as a PNG.

    Raises:
      ImportError: matplotlib is missing, which is an extra.
    """
    figure = new_figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, names in ((left, ("to_first", "whole")), (right, ("per_token", "between_pieces"))):
        for name in names:
            if values := sorted(times(result)[name]):
                shares = [100 * (i + 1) / len(values) for i in range(len(values))]
                axes.plot(values, shares, label=TIMES[name], drawstyle="steps-post")
        axes.set(xlabel="seconds", ylabel="% at most so long", ylim=(0, 101), xlim=(0, None))
        if axes.lines:
            axes.legend(loc="lower right")
    workload = result.workload
    pace = "" if workload.rate is None else f", {workload.rate:g} a second"
    figure.suptitle(
        f"{workload.requests} x {workload.turns} requests, "
        f"{workload.concurrency or 'any number'} at a time{pace}"
    )
    figure.savefig(path, dpi=150)
