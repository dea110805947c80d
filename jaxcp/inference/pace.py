# SPDX-License-Identifier: Apache-2.0
"""Predicts how long a chunk of a prompt takes, from how long others took.

A step with a chunk of n tokens behind c others takes longer than one without by

    fixed + by_token * n + by_pair * n * (c + n)

of which none is negative; n is that of all rows where a program has the chunks of several. The
three are fitted to the latest chunks; where those tell nothing else, all is by token. A size is
tried when the next smaller one has been measured.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxcp.inference.geometry import Together
from jaxcp.inference.limits import TogetherLimits

LATEST = 48
"""Chunks that are remembered."""
TERMS = [(1,), (0, 1), (1, 2), (0, 1, 2), (0,), (2,), (0, 2)]
"""Costs that are not zero, the likeliest first: a later choice must fit clearly better."""
CLEARLY = 0.9


class Work(NamedTuple):
    """The chunks of a program."""

    tokens: int
    """Tokens of the longest."""
    context: float
    """Tokens before, of a row that is the mean of all."""
    rows: int = 1


class Pace:
    """Seconds of chunks and of steps without one, as they were measured.

    The first step with a size is not counted: it may compile.

    Args:
      sizes: those to which chunks are padded, ascending.
    """

    def __init__(self, sizes: Sequence[int]):
        self._sizes = tuple(sizes)
        self._seen: set[tuple[int, int]] = set()  # (size, rows) of programs
        self._measured = {0}
        self._without: float | None = None
        self._terms: deque[np.ndarray] = deque(maxlen=LATEST)
        self._seconds: deque[float] = deque(maxlen=LATEST)
        self._costs: np.ndarray | None = None

    def learn(self, chunks: Sequence[Work], seconds: float) -> None:
        """Take note of how long a step took, with these chunks."""
        programs = [(self._padded(x.tokens, x.rows), x.rows) for x in chunks] or [(0, 1)]
        new = {*programs} - self._seen
        self._seen |= new
        if new:
            return
        if not chunks:
            self._without = seconds if self._without is None else (self._without + seconds) / 2
            return
        self._terms.append(np.sum([self._of(*chunk) for chunk in chunks], axis=0))
        self._measured |= {size for size, rows in programs if rows == 1}
        self._seconds.append(max(1e-6, seconds - (self._without or 0.0)))
        self._fit()

    def know(self, size: int, rows: int, seconds: float) -> None:
        """Take it that chunks of this size, of so many rows, add so much, before any were
        measured."""
        self._seen |= {(size, rows)}
        self._measured |= {size} if rows == 1 else set()
        self._terms.append(self._of(size, 0, rows))
        self._seconds.append(max(1e-6, seconds))
        self._fit()

    def seconds(self, count: int, context: float, rows: int = 1) -> float:
        """The seconds that chunks of `count` tokens will add to a step; inf if nobody knows.

        Args:
          context: the tokens before, of a row that is the mean of all.
        """
        if self._costs is None or self._smaller(count) not in self._measured:
            return float("inf")
        return float(self._of(count, context, rows) @ self._costs)

    def together(self, sizes: Together | None) -> TogetherLimits | None:
        """Limits of a program for chunks of several rows."""
        if sizes is None:
            return None

        def seconds(contexts: Sequence[int]) -> float:
            return self.seconds(sizes.tokens, sum(contexts) / sizes.rows, sizes.rows)

        return TogetherLimits(
            rows=sizes.rows, tokens=sizes.tokens, context=sizes.geometry.longest, seconds=seconds
        )

    def _smaller(self, count) -> int:
        """The size before that of a chunk; 0 for the first."""
        return max((size for size in self._sizes if size < self._padded(count)), default=0)

    def _of(self, count, context, rows) -> np.ndarray:
        size = self._padded(count, rows)
        return np.array([1.0, rows * size, rows * size * (context + size)])

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

    def _padded(self, count: int, rows: int = 1) -> int:
        if rows > 1:  # there is one size
            return count
        return next((size for size in self._sizes if size >= count), self._sizes[-1])
