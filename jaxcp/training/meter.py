# SPDX-License-Identifier: Apache-2.0
"""Clocks of a run: tokens and FLOPs a second, and what the time until the first step went to."""

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

from jaxcp import processes
from jaxcp.training.metrics import Record


class Work(NamedTuple):
    """The tokens of a batch, and the FLOPs of those rows of it that this process counts."""

    tokens: int
    flops: float | None
    """None where the model's are not counted."""
    mask: str
    """Parts of attention that `flops` leave out, as "causal+packed"."""


class Meter:
    """Counts tokens and FLOPs, and how many a second since the last mark.

    Args:
      tokens: those of the steps before.
      peak: FLOPs a second of all devices, by their vendor; None where not known.
    """

    def __init__(self, *, peak: float | None):
        self.began = time.perf_counter()
        self.tokens, self.flops, self.mask = 0, 0.0, ""
        self.peak = peak
        self.marked: tuple[float, int, float] | None = None
        self.startup: Record = {}

    def seconds(self) -> float:
        """Seconds since the run of this process began."""
        return time.perf_counter() - self.began

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Put the seconds that something takes into the record of the start."""
        began = time.perf_counter()
        yield
        self.startup[name] = time.perf_counter() - began

    def add(self, work: Work) -> None:
        """Count a step."""
        self.tokens += work.tokens
        self.flops += work.flops or 0.0
        self.mask = work.mask

    def mark(self) -> None:
        """Measure speed from here on."""
        self.marked = time.perf_counter(), self.tokens, processes.total(self.flops)

    def read(self) -> Record:
        """Give the tokens and the speed of a record; the seconds of the start, once.

        All processes of a run call it at the same step.
        """
        every = processes.total(self.flops)
        record: Record = {
            "tokens": self.tokens,
            "tokens_per_second": None,
            "seconds": self.seconds(),
        }
        if self.marked is not None:
            at, tokens, flops = self.marked
            elapsed = time.perf_counter() - at
            record["tokens_per_second"] = (self.tokens - tokens) / elapsed
            record |= self._flops((every - flops) / elapsed)
        if self.startup:
            record["startup"], self.startup = self.startup, {}
        return record

    def _flops(self, rate: float) -> Record:
        if not rate:
            return {}
        known = {} if self.peak is None else {"mfu": rate / self.peak}
        return {"flops_per_second": rate, "mfu_mask": self.mask} | known
