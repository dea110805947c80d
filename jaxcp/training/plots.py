# SPDX-License-Identifier: Apache-2.0
"""Draws the losses of runs from their metrics files."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxcp.evaluate.pictures import new_figure
from jaxcp.training.metrics import Record, read_metrics

METRICS = "metrics.jsonl"


def plot_loss(metrics_path: str | os.PathLike, out_png: str | os.PathLike) -> None:
    """Draw the loss of one run against tokens as a PNG, as `plot_losses` does."""
    plot_losses([metrics_path], out_png)


def plot_losses(runs: Sequence[str | os.PathLike], out_png: str | os.PathLike) -> None:
    """Draw the losses of runs against tokens as a PNG, and those of evaluations as dots.

    Args:
      runs: metrics files, or folders of runs.
    Raises:
      ValueError: no runs, a file that holds no record, or a record without numbers.
      ImportError: matplotlib is missing, which is an extra.
    """
    files = [path / METRICS if path.is_dir() else path for path in map(pathlib.Path, runs)]
    if not files:
        raise ValueError("needed runs to draw; got none. Name folders of runs")
    read = {path: _records(path) for path in files}
    figure = new_figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for path, records in read.items():
        _draw(axes, path, records, alone=len(read) == 1)
    axes.set(xlabel="tokens", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    if len(read) > 1 or any("eval_loss" in r for records in read.values() for r in records):
        axes.legend()
    figure.savefig(out_png, dpi=120)


def _records(path: pathlib.Path) -> list[Record]:
    records = read_metrics(path)
    if not records:
        raise ValueError(f"{path} holds no record yet; train for more than log_every steps")
    for number, record in enumerate(records, 1):
        if not all(isinstance(record.get(key), int | float) for key in ("tokens", "loss")):
            raise ValueError(f"needed tokens and loss as numbers; {path}, record {number}")
    return records


def _draw(axes: Any, path: pathlib.Path, records: list[Record], *, alone: bool) -> None:
    last = f"{records[-1]['loss']:.3f}"
    name = "training" if alone else path.parent.name or str(path)
    [line] = axes.plot(
        [r["tokens"] for r in records],
        [r["loss"] for r in records],
        marker="." * (len(records) < 30),
        alpha=0.7,
        label=f"{name}: {last}",
    )
    if alone:
        axes.set(title=f"{last} at the end")
    evaluated = [r for r in records if isinstance(r.get("eval_loss"), int | float)]
    if evaluated:
        axes.plot(
            [r["tokens"] for r in evaluated],
            [r["eval_loss"] for r in evaluated],
            marker="o",
            linestyle="--",
            color="black" if alone else line.get_color(),
            label=f"{'' if alone else name + ', '}evaluated: {evaluated[-1]['eval_loss']:.3f}",
        )
