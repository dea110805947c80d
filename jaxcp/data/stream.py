# SPDX-License-Identifier: Apache-2.0
"""One stream of tokens, cut into rows: at random to train on, one after the other to evaluate."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from jaxcp.data.batch import Batch
from jaxcp.data.prepared import Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """Tokens of several arrays, end to end and around.

    With `separator` documents do not see each other: they get `segment_ids`. Where it ends a
    document, it predicts nothing: the next document's first token is not its to tell. Where it
    starts one, the last token of the document before predicts it, and so learns to end.
    """

    pieces: list[np.ndarray]
    separator: int | None = None
    separator_at: Place = "ends"
    seed: int = 0

    @functools.cached_property
    def total(self) -> int:
        return sum(piece.size for piece in self.pieces)

    def batch(self, step: int, rows: int, length: int, only: Sequence[int]) -> Batch:
        """The rows `only` of random windows `[rows, length]`: the same for a seed and a step."""
        starts = self.starts(step, rows, length)[list(only)]
        return self._apart(np.stack([self.read(int(start), length + 1) for start in starts]))

    def starts(self, step: int, rows: int, length: int) -> np.ndarray:
        """The places `[rows]` in the stream at which the rows of a batch begin."""
        self._check(length + 1)
        windows = self.total // length
        numbers = step * rows + np.arange(rows)
        starts = np.empty(rows, np.int64)
        for epoch in np.unique(numbers // windows):
            offset, order = _epoch(self.seed, int(epoch), self.total, windows)
            here = numbers // windows == epoch
            starts[here] = (offset + order[numbers[here] % windows] * length) % self.total
        return starts

    def rows_of_all(self, length: int) -> int:
        """Count the rows in which every token but the first is a target, once."""
        self._check(2)
        return -(-(self.total - 1) // length)

    def part_of_all(self, first: int, rows: int, length: int) -> Batch:
        """Rows `first` and on of those; where the stream has ended there are no targets."""
        text = np.zeros((rows, length + 1), np.int64)
        real = np.zeros((rows, length), bool)
        for row in range(rows):
            start = (first + row) * length
            count = min(length + 1, self.total - start)
            if count > 1:
                text[row, :count] = self.read(start, count)
                real[row, : count - 1] = True
        batch = self._apart(text)
        return batch | {"targets": np.where(real, batch["targets"], -1)}

    def read(self, start: int, count: int) -> np.ndarray:
        """Read `count` tokens from `start`, the pieces end to end and around, as int32.

        As int64 where the files hold wider ids: one outside the vocabulary must still be outside of
        it when it is checked.
        """
        out: list[np.ndarray] = []
        while count:
            offset = start % self.total
            for piece in self.pieces:
                if offset < piece.size:
                    out.append(np.asarray(piece[offset : offset + count]))
                    break
                offset -= piece.size
            start, count = start + out[-1].size, count - out[-1].size
        ids = np.concatenate(out)
        if np.can_cast(ids.dtype, np.int32):
            return ids.astype(np.int32)
        if ids.dtype == np.uint64:  # the largest int64 is outside every vocabulary too
            ids = np.minimum(ids, np.uint64(np.iinfo(np.int64).max))
        return ids.astype(np.int64)

    def _apart(self, text: np.ndarray) -> Batch:
        batch = {"tokens": text[:, :-1], "targets": text[:, 1:].copy()}
        if self.separator is None:
            return batch
        separators = batch["tokens"] == self.separator
        segments = np.cumsum(separators, axis=1)
        if self.separator_at == "ends":
            segments = segments - separators
            batch["targets"][separators] = -1
        return batch | {"segment_ids": segments.astype(np.int32)}

    def _check(self, needed: int) -> None:
        if self.total < needed:
            raise ValueError(
                f"a row needs {needed} tokens (one more for the target); the data has {self.total}"
            )


@functools.lru_cache(maxsize=8)
def _epoch(seed: int, epoch: int, total: int, windows: int) -> tuple[int, np.ndarray]:
    rng = np.random.default_rng((seed, epoch))
    return int(rng.integers(total)), rng.permutation(windows)
