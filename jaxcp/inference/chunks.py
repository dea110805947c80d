# SPDX-License-Identifier: Apache-2.0
"""The budget of a step: chunks of few sizes, no longer than rows that decode may wait."""

from jaxcp.inference.limits import ChunkLimits


class ChunkBudget:
    """The tokens and seconds that are left to the chunks of one step.

    Args:
      bounded: whether rows that decode wait for them.
    """

    def __init__(self, limits: ChunkLimits, *, bounded: bool):
        self._limits, self._tokens = limits, limits.sizes[-1]
        self._seconds = limits.max_wait if bounded else float("inf")
        self._first = True

    def most(self, left: int, context: int, *, before: float = 0.0) -> int:
        """The tokens that a prompt with `left` to go behind `context` may compute now, where other
        work of so many seconds comes before."""
        counts = [min(size, left) for size in self._limits.sizes]
        seconds = self._seconds - before
        fitting = [
            count
            for count in counts
            if count <= self._tokens and self._limits.seconds(count, context) <= seconds
        ]
        return max(fitting, default=counts[0] if self._first else 0)

    def wait(self, seconds: float) -> None:
        """Take away the time of work that is no chunk."""
        self._seconds -= seconds

    def spend(self, count: int, context: int) -> None:
        self._first = False
        self._tokens -= count
        self._seconds -= self._limits.seconds(count, context)
