# SPDX-License-Identifier: Apache-2.0
"""Guesses the next tokens of an answer by what followed the same words before, or by a draft.

Text that an agent writes repeats what it has read: names, lines of code, the tool's output. The
latest place where the last few tokens stand already says what may come; where there is none, the
model's own layer may have drafted something (`drafts.py`). A step computes the guesses beside the
latest token, and keeps those that it would have sampled itself.

Source: prompt lookup decoding; the idea of n-gram drafts is in arXiv 2304.04487.
"""

from array import array

RUNS = (4, 3, 2)
"""Numbers of tokens that must stand there alike, tried in this order."""
LONGEST_REST = 256
"""Tokens. A step with guesses takes as long as three without where arithmetic is the limit: so
seldom, they cost a few per cent where none is ever right."""


def followers(tokens: array, most: int) -> list[int]:
    """At most `most` tokens that followed, at their latest place, the last ones of `tokens`."""
    data, item = tokens.tobytes(), tokens.itemsize
    for run in RUNS:
        pattern, end = data[-run * item :], len(data) - item
        if len(pattern) < run * item or end < len(pattern):
            continue
        at = data.rfind(pattern, 0, end)
        while at % item and at > 0:  # in the middle of a token: none
            at = data.rfind(pattern, 0, at + len(pattern) - 1)
        if at >= 0 and at % item == 0:
            first = at // item + run
            return tokens[first : first + most].tolist()
    return []


class Guesses:
    """Guesses for one request, as many as have been worth it.

    After guesses that were all wrong, or none, it rests for a few tokens, and longer each time.

    Args:
      most: tokens guessed at a time.
      drafting: the model has a layer that drafts.
    """

    def __init__(self, most: int, *, drafting: bool = False):
        self.most, self.drafting = most, drafting
        self.tokens: list[int] = []
        self.drafted: list[int] = []
        """Tokens that the step before has drafted behind its last."""
        self._count, self._rest, self._misses = min(2, most), 0, 0
        self._asked = False  # for the step that is read next

    @property
    def wanted(self) -> bool:
        """True if it would guess behind the next token, and so must see it."""
        return self._rest == 0

    @property
    def wants_drafts(self) -> bool:
        """True if the step that it was just asked for should draft."""
        return self.drafting and self._asked

    def make(self, tokens: array) -> int:
        """Guess what follows `tokens`; how many that are."""
        self._asked = self.wanted
        self.tokens = []
        if self._asked:
            self.tokens = followers(tokens, self._count) or self.drafted[: self._count]
        return len(self.tokens)

    def learn(self, guessed: int, right: int, read: int) -> None:
        """Take note of a step: how many were guessed and right, and how many tokens it gave."""
        asked, self._asked = self._asked, False
        if not asked:
            self._rest = max(0, self._rest - read)
        elif self.drafting and not guessed:
            pass  # that step has drafted some
        elif right:
            self._misses = 0
            self._count = min(self.most, 2 * self._count if right == guessed else right + 1)
        else:
            self._misses, self._count = min(self._misses + 1, 5), min(2, self.most)
            self._rest = min(LONGEST_REST, 2 ** (2 * self._misses - 1))
