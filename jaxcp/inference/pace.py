# SPDX-License-Identifier: Apache-2.0
"""Predicts how long a chunk of a prompt takes, from how long others took.

A step with a chunk of n tokens behind c others takes longer than one without by

    fixed + by_token * n + by_pair * n * (c + n)

of which none is negative. The three are fitted to the latest chunks; where those tell nothing else,
all is by token. A size is tried when the next smaller one has been measured.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

LATEST = 48
"""Chunks that are remembered."""
TERMS = [(1,), (0, 1), (1, 2), (0, 1, 2), (0,), (2,), (0, 2)]
"""Costs that are not zero, the likeliest first: a later choice must fit clearly better."""
CLEARLY = 0.9


class Pace:
    """Seconds of chunks and of steps without one, as they were measured.

    The first step with a size is not counted: it may compile.

    Args:
      sizes: those to which chunks are padded, ascending.
    """

    def __init__(self, sizes: Sequence[int]):
        self._sizes = tuple(sizes)
        self._seen: set[int] = set()
        self._measured = {0}
        self._without: float | None = None
        self._terms: deque[np.ndarray] = deque(maxlen=LATEST)
        self._seconds: deque[float] = deque(maxlen=LATEST)
        self._costs: np.ndarray | None = None

    def learn(self, chunks: Sequence[tuple[int, int]], seconds: float) -> None:
        """Take note of how long a step took, with chunks of `(tokens, tokens before)`."""
        sizes = [self._padded(count) for count, _ in chunks] or [0]
        new = {*sizes} - self._seen
        self._seen |= new
        if new:
            return
        if not chunks:
            self._without = seconds if self._without is None else (self._without + seconds) / 2
            return
        self._terms.append(np.sum([self._of(*chunk) for chunk in chunks], axis=0))
        self._measured |= {*sizes}
        self._seconds.append(max(1e-6, seconds - (self._without or 0.0)))
        self._fit()

    def know(self, size: int, seconds: float) -> None:
        """Take it that a chunk of this size adds so much, before one has been measured."""
        self._seen |= {size}
        self._measured |= {size}
        self._terms.append(self._of(size, 0))
        self._seconds.append(max(1e-6, seconds))
        self._fit()

    def seconds(self, count: int, context: int) -> float:
        """The seconds that a chunk of `count` tokens will add to a step; inf if nobody knows."""
        if self._costs is None or self._smaller(count) not in self._measured:
            return float("inf")
        return float(self._of(count, context) @ self._costs)

    def _smaller(self, count) -> int:
        """The size before that of a chunk; 0 for the first."""
        return max((size for size in self._sizes if size < self._padded(count)), default=0)

    def _of(self, count, context) -> np.ndarray:
        size = self._padded(count)
        return np.array([1.0, size, size * (context + size)])

    def _fit(self) -> None:
        """Minimize the squares of relative errors over costs that are not negative."""
        terms = np.array(self._terms) / np.array(self._seconds)[:, None]
        least = float("inf")
        for chosen in map(list, TERMS):
            costs = np.zeros(3)
            costs[chosen] = np.linalg.lstsq(terms[:, chosen], np.ones(len(terms)))[0]
            error = float(((terms @ costs - 1) ** 2).sum()) + 1e-6
            if (costs >= 0).all() and error < CLEARLY * least:
                least, self._costs = error, costs

    def _padded(self, count: int) -> int:
        return next((size for size in self._sizes if size >= count), self._sizes[-1])
