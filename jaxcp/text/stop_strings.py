# SPDX-License-Identifier: Apache-2.0
"""Ends a text that comes in pieces before the first of some strings.

For each string it knows how many of its characters the text ends with (Knuth, Morris and Pratt,
"Fast pattern matching in strings", 1977), so that a character is looked at once.
"""

from collections.abc import Sequence


class UntilStop:
    """A text up to the first place where one of `stops` begins.

    Raises:
      ValueError: a stop string is empty, or none.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = [(stop, _borders(stop)) for stop in check_stops(stops)]
        self._matched = [0] * len(self._stops)
        self._kept = ""
        self._first: int | None = None  # where in `_kept` the first complete one begins
        self.stopped = False

    def push(self, text: str) -> str:
        """Take a piece, and give out what no stop string can begin in any more."""
        if self.stopped:
            return ""
        begin = len(self._kept)
        self._kept += text
        for end, character in enumerate(text, begin + 1):
            self._match(character, end)
            if self._first is not None and self._first <= end - max(self._matched):
                return self.finish()
        return self._give(len(self._kept) - max(self._matched, default=0))

    def finish(self) -> str:
        """Give out the rest: no more text comes."""
        self.stopped = self.stopped or self._first is not None
        text, self._kept = self._kept[: self._first], ""
        return text

    def _match(self, character: str, end: int) -> None:
        """Move every string on by one character of the text, behind which is `end`."""
        for i, (stop, borders) in enumerate(self._stops):
            count = self._matched[i]
            while count and stop[count] != character:
                count = borders[count]
            count += stop[count] == character
            if count == len(stop):
                if self._first is None or end - count < self._first:
                    self._first = end - count
                count = borders[count]
            self._matched[i] = count

    def _give(self, count: int) -> str:
        text, self._kept = self._kept[:count], self._kept[count:]
        if self._first is not None:
            self._first -= count
        return text


def check_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """`stops`, which must be strings with a character each.

    Raises:
      ValueError: they are not; a string alone is one too, and would be read as its characters.
    """
    if isinstance(stops, str | bytes) or not isinstance(stops, Sequence):
        raise ValueError(
            f'stop must be a list of strings; got {stops!r:.100}. Give ["one"] for one'
        )
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise ValueError(f"a stop string must have a character at least; got {stop!r:.100}")
    return tuple(stops)


def _borders(stop: str) -> list[int]:
    """Find for each number of characters the longest proper beginning that is also their end."""
    borders = [0, 0]
    for character in stop[1:]:
        count = borders[-1]
        while count and stop[count] != character:
            count = borders[count]
        borders.append(count + (stop[count] == character))
    return borders
