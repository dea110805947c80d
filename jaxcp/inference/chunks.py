# SPDX-License-Identifier: Apache-2.0
"""Bounds the prompt tokens of a step: chunks of few sizes, no longer than others may wait."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkLimits:
    """Sizes of chunks, and how long the chunks of one step may take.

    Args:
      sizes: ascending. The smallest is computed however long it takes, so that a prompt always gets
        on; the largest bounds the prompt tokens of a step.
      seconds: predicts the seconds of a chunk from its tokens and the tokens before it.
      max_wait: the seconds that chunks may add to a step in which rows decode.
    """

    sizes: tuple[int, ...]
    seconds: Callable[[int, int], float]
    max_wait: float = float("inf")

    def __post_init__(self):
        if not self.sizes or self.sizes[0] < 1 or list(self.sizes) != sorted({*self.sizes}):
            raise ValueError(f"sizes must be positive and ascending; got sizes={self.sizes}")


class ChunkBudget:
    """The tokens and seconds that are left to the chunks of one step.

    Args:
      bounded: whether rows that decode wait for them.
    """

    def __init__(self, limits: ChunkLimits, *, bounded: bool):
        self._limits, self._tokens = limits, limits.sizes[-1]
        self._seconds = limits.max_wait if bounded else float("inf")
        self._first = True

    def most(self, left: int, context: int) -> int:
        """The tokens that a prompt with `left` to go behind `context` may compute now."""
        counts = [min(size, left) for size in self._limits.sizes]
        fitting = [
            count
            for count in counts
            if count <= self._tokens and self._limits.seconds(count, context) <= self._seconds
        ]
        return max(fitting, default=counts[0] if self._first else 0)

    def spend(self, count: int, context: int) -> None:
        self._first = False
        self._tokens -= count
        self._seconds -= self._limits.seconds(count, context)
