# SPDX-License-Identifier: Apache-2.0
"""Times steps of decoding by rows and context, and the host's part of them."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any
from unittest import mock

import numpy as np

import jaxcp
from jaxcp.data.haystack import corpus
from jaxcp.inference import runner


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A step of decoding, and its median seconds."""

    rows: int
    padded: int
    """Rows of the program that runs it."""
    context: int
    seconds: float


@contextlib.contextmanager
def decoding(engine, *, rows: int, context: int, steps: int):
    """Have so many rows decode after `context` tokens, all of which but the last they share."""
    text = (corpus() * (1 + context // len(corpus())))[: context - 1]
    room = steps + 8 * rows + 8  # the first decode while the others compute their last tokens
    sampling, requests = jaxcp.Sampling(max_new_tokens=room), []
    for row in range(rows):  # one by one: who comes at once computes the beginning at once, too
        requests.append(engine.add([*text, row], sampling))
        while not requests[-1].stats.token_times:
            engine.step()
    engine.step()  # nothing of a prompt is in flight
    try:
        yield
        assert not any(request.done for request in requests), "rows ended before their last step"
    finally:
        for request in requests:
            engine.cancel(request)


def measure(engine, *, rows: Sequence[int], contexts: Sequence[int], steps: int) -> Iterable[Step]:
    """Time every number of rows at every context."""
    for context in sorted(contexts):
        for count in rows:
            padded = min(size for size in engine.geometry.row_sizes if size >= count)
            with decoding(engine, rows=count, context=context, steps=steps):
                seconds = statistics.median(taken(engine.step) for _ in range(steps))
            yield Step(rows=count, padded=padded, context=context, seconds=seconds)


def taken(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class Fit:
    """Seconds of a step: `fixed + row * padded rows + token * rows * context`."""

    fixed: float
    row: float
    token: float
    worst: float
    """The largest distance from a measurement, as a part of that."""

    def __str__(self) -> str:
        return (
            f"{1e3 * self.fixed:.2f} ms + {1e3 * self.row:.3f} ms a padded row + "
            f"{1e9 * self.token:.1f} µs a row and 1,000 tokens of its context, "
            f"within {100 * self.worst:.0f} %"
        )


def fit(measured: Sequence[Step]) -> Fit:
    """Fit the seconds by least squares of relative distances."""
    seconds = np.array([step.seconds for step in measured])
    terms = np.array([[1, step.padded, step.rows * step.context] for step in measured])
    relative = terms / seconds[:, None]
    found, *_ = np.linalg.lstsq(relative, np.ones(len(seconds)), rcond=None)
    worst = np.abs(relative @ found - 1).max()
    return Fit(*found.tolist(), float(worst))


@contextlib.contextmanager
def clocked(seconds: dict[str, float], name: str, owner: Any, method: str):
    """Add up under `name` the seconds that calls of this method take."""
    inner = getattr(owner, method)

    def outer(*args, **kwargs):
        start = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            seconds[name] += time.perf_counter() - start

    seconds[name] = 0.0
    with mock.patch.object(owner, method, outer):
        yield


def host_seconds(engine, *, rows: int, context: int, steps: int) -> dict[str, float]:
    """Mean seconds a step of what the host does, and of the whole step."""
    seconds: dict[str, float] = {}
    parts = (
        ("schedule", engine.scheduler, "schedule"),
        ("make the batch", runner, "decode_batch"),
        ("advance", engine.scheduler, "advance"),
        ("send", engine.runner, "run"),
    )
    with decoding(engine, rows=rows, context=context, steps=steps), contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(clocked(seconds, *part))
        whole = sum(taken(engine.step) for _ in range(steps))
    seconds["send"] -= seconds["make the batch"]
    return {name: spent / steps for name, spent in (seconds | {"whole step": whole}).items()}


def step_rows(measured: Sequence[Step]) -> Iterable[tuple[str, ...]]:
    """Lines of milliseconds: a context each, a column for every number of rows."""
    for context in sorted({step.context for step in measured}):
        of_context = [step for step in measured if step.context == context]
        yield f"{context:,}", *(f"{1e3 * step.seconds:.2f}" for step in of_context)


def host_rows(seconds: dict[str, float]) -> Iterable[tuple[str, ...]]:
    """Lines of milliseconds and shares of the step."""
    together = "schedule, make the batch and advance"
    own = sum(seconds[name] for name in ("schedule", "make the batch", "advance"))
    for name, spent in ({together: own} | seconds).items():
        yield name, f"{1e3 * spent:.3f}", f"{100 * spent / seconds['whole step']:.1f} %"
