# SPDX-License-Identifier: Apache-2.0
"""The steps of an engine: schedule, run, read what the step before has sampled, and hand it out."""

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from jaxcp.inference.groups import Groups
from jaxcp.inference.interrupts import deferred
from jaxcp.inference.pace import Pace, Work
from jaxcp.inference.plan import Plan, Row
from jaxcp.inference.request import Request, Status
from jaxcp.inference.runner import Runner, Sampled, Tokens
from jaxcp.inference.sampling import NO_TOKEN, not_finite
from jaxcp.inference.scheduler import Scheduler


class Loop:
    """Goes on with the requests of schedulers, whose plans a runner runs.

    Args:
      on_mesh: the mesh of the engine, as a context.
    """

    def __init__(
        self,
        groups: Groups,
        runner: Runner,
        pace: Pace,
        on_mesh: Callable[[], contextlib.AbstractContextManager],
    ):
        self.groups, self.runner, self.pace, self.on_mesh = groups, runner, pace, on_mesh
        self._sampled: deque[Tokens] = deque()  # of plans in flight
        self._latest_read = 0.0

    def step(self) -> list[Request]:
        """Send a step, and take what the one before has sampled; see `Engine.step`."""
        with deferred() as allowed:
            ended = []
            if any(request.in_turn for request in self.groups.running):
                ended = self._read_late(0, allowed)
            plans = [one.schedule(time.monotonic(), _guess) for one in self.groups.schedulers]
            goes_on = any(plan.rows for plan in plans)
            with self._failing(), allowed(), self.on_mesh():
                if goes_on:
                    self._sampled.append(self.runner.run(plans))
            return ended + self._read_late(goes_on, allowed)

    def _read_late(self, late: int, allowed: Any) -> list[Request]:
        """Take what plans have sampled but for the latest, so many; the requests that ended."""
        if len(self._sampled) <= late:
            return []
        with self._failing(), allowed(), self.on_mesh():
            sampled = self._sampled[0].read()
        plans, sent = self._sampled[0].plans, self._sampled.popleft().sent
        began, self._latest_read = max(sent, self._latest_read), time.monotonic()
        if not any(plan.pages_in or plan.states_in for plan in plans):  # which take time, too
            self.pace.learn(self._work(plans), self._latest_read - began)
        rows: list[Row] = []
        for scheduler, plan, of_plan in zip(self.groups.schedulers, plans, sampled, strict=True):
            rows += self._take(scheduler, plan, of_plan) if plan.rows else []
        if not all(all(of_plan.finite) for of_plan in sampled):  # whoever it was for
            self._start_anew()
        return [row.request for row in rows if row.request.done]

    def _work(self, plans: list[Plan]) -> list[Work]:
        """The chunks of plans, as programs had them."""
        groups = [[row for row in plan.rows if _is_chunk(row)] for plan in plans]
        alone = [
            [Work(row.count, row.start) for row in rows if not row.together] for rows in groups
        ]
        work = [max(filter(None, side)) for side in itertools.zip_longest(*alone)]  # side by side
        beside = [[row.start for row in rows if row.together] for rows in groups]
        if self.runner.together is not None and any(beside):
            rows, tokens, _ = self.runner.together
            work.append(Work(tokens, max(map(sum, beside)) / rows, rows))
        return work

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Should what is inside fail, the requests of plans in flight do, and others start anew."""
        try:
            yield
        except BaseException as error:
            for scheduler in self.groups.schedulers:
                for plan in scheduler.in_flight:
                    scheduler.fail(plan, error, time.monotonic())
            self._start_anew()
            raise

    def _take(self, scheduler: Scheduler, plan: Plan, sampled: Sampled) -> list[Row]:
        """Hand out the tokens of a plan; the rows that wanted them."""
        meant = [i for i, row in enumerate(plan.rows) if row.meant]
        kept = scheduler.advance(plan, sampled.tokens, time.monotonic())
        for i in meant:
            own = (of_plan[i] for of_plan in (sampled.logprobs, sampled.drafts))
            self._read(scheduler, plan.rows[i], sampled.tokens[i][: kept[i]], *own)
        self._end_spoiled(scheduler, [plan.rows[i] for i in meant if _spoiled(sampled, i)])
        return [plan.rows[i] for i in meant]

    def _read(self, scheduler, row, tokens, logprobs, drafts) -> None:
        """Make text of the tokens that an answer keeps, and end it where that ends."""
        request, length = row.request, len(row.request.tokens) - row.request.prompt_len
        if request.guesses is not None and row.samples:
            request.guesses.learn(row.drafts, max(0, len(tokens) - 1), len(tokens))
            request.guesses.drafted = drafts
        ends = request.output.take([t for t in tokens if t >= 0], logprobs)
        if ends is not None and not request.done:
            scheduler.finish(request, length - len(tokens) + ends, time.monotonic())
        elif ends is not None:
            request.cut(len(tokens) - ends)
        if request.status is Status.FINISHED and request.output.finish():
            request.finish_reason = "stop"

    def _end_spoiled(self, scheduler, rows: list[Row]) -> None:
        """End the requests of rows with no token to choose, but for answers that end before."""
        for row in rows:
            request = row.request
            none = request.tokens[-1] < 0
            if none or not request.done:
                length = len(request.tokens) - 1 if none else row.start + row.count
                error = request.output.error() or not_finite(length)
                scheduler.spoil(request, error, time.monotonic())

    def _start_anew(self) -> None:
        """Forget what was computed: the pool may have gone with a step that failed."""
        self._sampled.clear()
        for scheduler in self.groups.schedulers:
            scheduler.forget()
        with self.on_mesh():
            self.runner.reset()

    def warm_up(self) -> None:
        """Compile all that requests need, and see how long chunks take."""
        with deferred() as allowed:
            with self._failing(), allowed(), self.on_mesh():
                seconds = self.runner.warm_up()
            for size, rows, taken in seconds:
                self.pace.know(size, rows, taken)


def _spoiled(sampled, number) -> bool:
    """Tell whether a row of a plan had no token to choose."""
    return not sampled.finite[number] or NO_TOKEN in sampled.tokens[number]


def _is_chunk(row) -> bool:
    return row.count > 1 + row.drafts


def _guess(request: Request) -> int:
    """Guess the next tokens of a request, where it wants that; how many there are."""
    return 0 if request.guesses is None else request.guesses.make(request.tokens)
