# SPDX-License-Identifier: Apache-2.0
"""The budget of a step: chunks of few sizes, no longer than rows that decode may wait.

Short prompts share one program where that is expected to take less time than one for each.
"""

from collections.abc import Sequence

from jaxcp.inference.limits import ChunkLimits, TogetherLimits

ROUNDS = 4
"""Chunks beside others in which a short prompt is done."""


class ChunkBudget:
    """The tokens and seconds that are left to the chunks of one step.

    Args:
      bounded: whether rows that decode wait for them.
      prompts: `(tokens left, tokens before them)` of the prompts that may want chunks, the oldest
        first.
    """

    def __init__(
        self, limits: ChunkLimits, *, bounded: bool, prompts: Sequence[tuple[int, int]] = ()
    ):
        self._limits, self._tokens = limits, limits.sizes[-1]
        self._seconds = limits.max_wait if bounded else float("inf")
        self._first = True
        self._beside: list[int] = []  # tokens before the chunks of the program for several
        self._together = self._for_several(prompts)

    def most(self, left: int, context: int, *, before: float = 0.0) -> int:
        """The tokens that a prompt with `left` to go behind `context` may compute now, where other
        work of so many seconds comes before."""
        seconds = self._seconds - before
        if self._together is not None and _is_short(self._together, left, context):
            return (
                min(self._together.tokens, left) if self._has_line(self._together, seconds) else 0
            )
        counts = [min(size, left) for size in self._limits.sizes]
        fitting = [
            count
            for count in counts
            if count <= self._tokens and self._limits.seconds(count, context) <= seconds
        ]
        return max(fitting, default=counts[0] if self._first else 0)

    def joins(self, left: int, context: int) -> bool:
        """Tell whether the chunk of such a prompt is one of several in a program."""
        return self._together is not None and _is_short(self._together, left, context)

    def wait(self, seconds: float) -> None:
        """Take away the time of work that is no chunk."""
        self._seconds -= seconds

    def spend(self, left: int, count: int, context: int) -> None:
        """Take away a chunk of `count` tokens of a prompt with `left` to go behind `context`."""
        if self._together is None or not _is_short(self._together, left, context):
            self._first = False
            self._tokens -= count
            self._seconds -= self._limits.seconds(count, context)
            return
        if not self._beside:
            self._seconds -= self._together.seconds([context])
        self._beside.append(context)

    def _has_line(self, together, seconds) -> bool:
        """Tell whether the program for several has a line to spare, and is there or may come."""
        if self._beside or self._first:
            return len(self._beside) < together.rows
        return together.seconds([0]) <= seconds

    def _for_several(self, prompts) -> TogetherLimits | None:
        """The program for several rows, if short ones are sooner done by it than one by one."""
        together = self._limits.together
        if together is None:
            return None
        short = [one for one in prompts if _is_short(together, *one)]
        if len(short) < 2:
            return None
        chunks = [-(-left // together.tokens) for left, _ in short]
        rounds = max(*chunks, -(-sum(chunks) // together.rows))
        if self._limits.max_wait == float("inf"):
            alone = sum(self._limits.padded(left) for left, _ in short)
            return together if rounds * together.rows * together.tokens <= alone else None
        seconds = together.seconds([context for _, context in short[: together.rows]])
        sooner = rounds * seconds < sum(self._limits.total(*one) for one in short)
        return together if sooner and seconds <= self._seconds else None


def _is_short(together: TogetherLimits, left: int, context: int) -> bool:
    """Tell whether a prompt can have its chunks beside those of others."""
    return left <= ROUNDS * together.tokens and context + left <= together.context
