# SPDX-License-Identifier: Apache-2.0
"""Shows a search on the terminal: a progress bar, and its result as a table."""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jaxcp.tune.search import Result, Tried

LONGEST = 12  # rows of the table; JSON has them all


@contextlib.contextmanager
def progress() -> Iterator[Callable[[int, int, Tried | None], None]]:
    """Draw a bar on stderr; yields the `progress` argument of `search`."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("compiling the shipped row", total=None)

        def step(done: int, total: int, last: Tried | None) -> None:
            said = sizes(last.blocks) if last else "the shipped row"
            bar.update(task, completed=done, total=total, description=said)

        yield step


def sizes(blocks) -> str:
    return " ".join(f"{name}={value}" for name, value in dataclasses.asdict(blocks).items())


def show(result: Result, console: Console | None = None) -> None:
    """Print the best candidates, what was refused, what was not tried, and the row."""
    console = console or Console()
    problem, searched = result.problem, tuple(result.problem.about.values)
    shape = ", ".join(f"{name} {size:,}" for name, size in problem.shape.items())
    source = (
        f"measured on {result.device}" if result.by == "time" else f"compiled for {result.device}"
    )
    console.print(
        f"{problem.part} for {problem.target}, {problem.dtype}; {shape}\n"
        f"Cost: {result.unit}, {source}",
        highlight=False,
    )
    table = Table()
    for name in (*searched, "cost"):
        table.add_column(name, justify="right")
    table.add_column("")
    for tried in result.ranked[:LONGEST]:
        chosen = tried is result.best
        named = ["chosen"] * chosen + ["ships"] * (tried is result.shipped)
        cells = [str(getattr(tried.blocks, name)) for name in searched]
        note = "; ".join([*named, tried.detail])
        cost = f"{tried.cost:,.0f}" if result.by == "code" else f"{tried.cost:.4g}"
        table.add_row(*cells, cost, note, style="bold" if chosen else "")
    console.print(table)
    reasons = collections.Counter(x.refused.split(" ")[0] for x in result.tried if x.refused)
    refused = ", ".join(f"{count} {reason.rstrip(':')}" for reason, count in reasons.most_common())
    console.print(
        f"{len(result.tried)} candidates in {result.seconds:.0f} s; refused: {refused or 'none'}",
        highlight=False,
    )
    if result.not_tried:
        console.print(
            f"[bold]The time limit left {len(result.not_tried)} candidates untried[/bold]: "
            "with more --max-seconds another may be best."
        )
    same = " as it ships" if result.best is result.shipped else ""
    console.print(f"\nThe row{same}, for {result.row.path}:", highlight=False, soft_wrap=True)
    console.print(result.row.text, highlight=False, markup=False, soft_wrap=True)
