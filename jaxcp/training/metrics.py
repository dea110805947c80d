# SPDX-License-Identifier: Apache-2.0
"""Reports of a run: a line of JSON for each logged step, a progress bar."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from jaxcp.input_files import open_regular

Record = dict[str, Any]
"""A logged step: `step, loss` (nats), `lr, grad_norm, tokens` (since step 0), `tokens_per_second`
(None until there are two steps to time), `seconds` (of this process), `skipped` (steps since step 0
whose gradients were not finite; at such a step `loss` or `grad_norm` is NaN or Infinity).

The first record of a process has `startup`: the seconds of `init`, `restore` and `compile`, and of
all until the `first_step` was done. A step that was evaluated has `eval_loss, eval_tokens,
eval_seconds`, one at which the model wrote `sample`. Where the model's FLOPs are counted
(`training/flops.py`) there are `flops_per_second` of all devices and `mfu_mask`, and where the
devices' peak is known `mfu`. Where the context grows in stages there is `context`, the tokens of a
row, and where the model has one base of rotary positions `rope_theta`.

A model with experts also has `router_load` (per cent of an even load, by MoE layer and expert, the
MTP layer's last), `router_load_max, router_entropy, router_idle, router_flips`
(`training.step.routing_health`); where they are minimised, `mtp_loss, router_balance_loss,
router_z_loss` without their weights. A `router_load` of more than `LOADS` numbers is only in
records of steps that save."""

LOADS = 4096
"""Numbers of `router_load` that any record may hold: about 16 KB."""


def as_json(out: Mapping[str, jax.Array], *, whole: bool) -> Record:
    """Convert what a step returned to numbers and lists; `whole`: `router_load` of any size too."""
    record: Record = {name: float(x) for name, x in out.items() if x.ndim == 0}
    load = out.get("router_load")
    if load is not None and (whole or load.size <= LOADS):
        record["router_load"] = np.rint(100 * np.asarray(load)).astype(int).tolist()
    return record


class Callback(Protocol):
    """An observer of `train`, which calls it before, after and at each step that it logs."""

    def start(self, *, step: int, steps: int) -> None: ...

    def log(self, record: Record) -> None: ...

    def stop(self) -> None: ...


def read_metrics(path: str | pathlib.Path) -> list[Record]:
    """Read the records of a metrics file; a torn last line, left by a killed process, is skipped.

    Raises:
      ValueError: another line is no JSON object; or the file is no regular one.
    """
    with open_regular(path) as (file, _):
        lines = file.read().decode("utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            records.append(_record(line))
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
    return records


def _record(line: str) -> Record:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("no object")
    return record


class MetricsFile:
    """Appends records to a JSONL file, after deleting those of steps after `resumed_at`."""

    def __init__(self, path: pathlib.Path, *, resumed_at: int):
        self.path = path
        kept = read_metrics(path) if path.exists() else []
        steps = [record.get("step") for record in kept]
        if not all(isinstance(step, int) for step in steps):
            raise ValueError(f"needed a step in each record; {path} has records without one")
        self.records = [record for record in kept if record["step"] <= resumed_at]
        fresh = path.with_name(path.name + ".new")
        fresh.write_text(
            "".join(json.dumps(record) + "\n" for record in self.records), encoding="utf-8"
        )
        os.replace(fresh, path)

    def write(self, record: Record) -> None:
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class ProgressBar:
    """A rich progress bar: steps, loss, tokens/s, time left."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self.bar = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )

    def start(self, *, step: int, steps: int) -> None:
        self.bar.start()
        self.task = self.bar.add_task("compiling", total=steps, completed=step)

    def log(self, record: Record) -> None:
        speed = record["tokens_per_second"]
        text = f"loss {record['loss']:.3f}" + (f"  {speed:,.0f} tok/s" if speed else "")
        self.bar.update(self.task, completed=record["step"], description=text)

    def stop(self) -> None:
        self.bar.stop()
