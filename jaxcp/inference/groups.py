# SPDX-License-Identifier: Apache-2.0
"""Schedulers of groups of devices that share no page: those along the mesh's `data`."""

from collections.abc import Sequence

from jaxcp.inference.request import Request
from jaxcp.inference.scheduler import Scheduler


class Groups:
    """One scheduler a group. A request stays in the group that it is given to."""

    def __init__(self, schedulers: Sequence[Scheduler]):
        self.schedulers = list(schedulers)

    @property
    def running(self) -> list[Request]:
        return [request for one in self.schedulers for request in one.running]

    def of(self, request: Request) -> Scheduler:
        return self.schedulers[request.group]

    def add(self, request: Request, now: float) -> None:
        """Queue a request where the fewest tokens come before its answer: of its own prompt those
        that are not known there, and those of the requests that wait.

        Raises:
          ValueError: it could not run even if it were alone, or was added before.
        """
        if request.arrival < 0:
            request.group, request.unknown = self._choose(request)
        self.of(request).add(request, now)

    def check_size(self, request: Request) -> None:
        """Raise ValueError where a request could not run even if it were alone."""
        self.schedulers[0].check_size(request)

    def cancel(self, request: Request, now: float) -> None:
        """End a request wherever it is; see `Scheduler.cancel`."""
        self.of(request).cancel(request, now)

    def _choose(self, request) -> tuple[int, int]:
        """The group for a request, and how many of its tokens are not known there."""
        if len(self.schedulers) == 1:
            return 0, 0
        if request.after is not None:  # they share what it computes
            return request.after.group, 0
        costs = []
        for number, one in enumerate(self.schedulers):
            unknown = len(request.tokens) - one.tree.known(request.tokens)
            before = sum(other.unknown + other.max_new_tokens for other in one.waiting)
            load = len(one.waiting) + len(one.running)
            waits = request.max_new_tokens if load >= one.limits.max_rows else 0
            costs.append((unknown + before + waits, load, number, unknown))
        *_, number, unknown = min(costs)
        return number, unknown
