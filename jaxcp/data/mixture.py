# SPDX-License-Identifier: Apache-2.0
"""Several sources in one, each with its share of the rows."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcp.data.batch import Batch
from jaxcp.data.sources import Streamed, as_source

BLOCK = 1024
"""Rows after which every source has had its share, to a row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Rows of several sources, `weights` of each, in an order that is shuffled by the seed.

    Of every 1024 rows a source gives its share, to a row; each goes through its own tokens as it
    does alone. A batch stays a pure function of the step.

    Raises:
      ValueError: no sources, weights that are not as many, or one that gives a source no row.

    >>> Mixture(sources=("books", "code/*.bin"), weights=(0.7, 0.3))
    """

    sources: tuple[Any, ...]
    """Sources, prepared folders or globs of token files."""
    weights: tuple[float, ...]
    seed: int = 0

    def __post_init__(self):
        if not self.sources or len(self.sources) != len(self.weights):
            raise ValueError(
                f"a mixture needs a weight for each source; got {len(self.sources)} sources and "
                f"{len(self.weights)} weights"
            )
        if not all(np.isfinite(w) and w > 0 for w in self.weights) or 0 in self.shares:
            raise ValueError(
                f"each source must have a row of {BLOCK} at least; got weights={self.weights}"
            )

    @functools.cached_property
    def shares(self) -> tuple[int, ...]:
        """Rows of each source among `BLOCK`."""
        edges = np.rint(BLOCK * np.cumsum(self.weights) / sum(self.weights)).astype(int)
        return tuple(int(x) for x in np.diff(edges, prepend=0))

    @functools.cached_property
    def parts(self) -> tuple[Any, ...]:
        """The sources themselves."""
        return tuple(as_source(source, self.seed) for source in self.sources)

    def batch(self, step: int, rows: int, length: int) -> Batch:
        """Rows of several sources `[rows, length]`, the same for the same seed and step."""
        picked = [self._row(step * rows + row, length) for row in range(rows)]
        return _joined(picked, {name for leaves in picked for name in leaves})

    @property
    def by_rows(self) -> bool:
        """All sources are streams, of which `some_rows` can read a part."""
        own = type(self).batch is Mixture.batch
        return own and all(isinstance(part, Streamed) and part.by_rows for part in self.parts)

    def some_rows(self, step: int, rows: int, length: int, only: Sequence[int]) -> Batch:
        """The rows `only` of a batch, with the leaves of it; nothing is read of the others."""
        picked = [self._row(step * rows + row, length) for row in only]
        numbers = {self.choose(step * rows + row)[0] for row in range(rows)}
        apart = any(self.parts[number].stream.separator is not None for number in numbers)
        return _joined(picked, {"tokens", "targets", *["segment_ids"] * apart})

    def choose(self, number: int) -> tuple[int, int]:
        """Say which source gives row `number` of the run, and its how many-th that is."""
        order = _order(self.seed, number // BLOCK, self.shares)
        place = number % BLOCK
        source = int(order[place])
        before = int(np.count_nonzero(order[:place] == source))
        return source, number // BLOCK * self.shares[source] + before

    def _row(self, number: int, length: int) -> Batch:
        source, own = self.choose(number)
        return self.parts[source].batch(own, 1, length)


@functools.lru_cache(maxsize=8)
def _order(seed: int, block: int, shares: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng((seed, block))
    return rng.permutation(np.repeat(np.arange(len(shares)), shares))


def _joined(rows: Sequence[Batch], names: set[str]) -> Batch:
    full = [leaves | _filled(leaves, names - leaves.keys()) for leaves in rows]
    return {name: np.concatenate([leaves[name] for leaves in full]) for name in names}


def _filled(leaves: Batch, names: set[str]) -> Batch:
    """Leaves that a row lacks and another has."""
    tokens, targets = leaves["tokens"], leaves["targets"]
    defaults = {
        "segment_ids": np.zeros(tokens.shape, np.int32),
        "positions": np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
        "weights": (targets >= 0).astype(np.float32),
    }
    return {name: defaults[name] for name in names}
