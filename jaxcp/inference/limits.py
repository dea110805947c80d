# SPDX-License-Identifier: Apache-2.0
"""Bounds of what a scheduler gives out."""

import dataclasses
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class TogetherLimits:
    """Chunks of several rows that one program computes.

    Args:
      rows: so many at most.
      tokens: of each row at most.
      context: tokens of a row at most, those before its chunk and those that come after it too.
      seconds: predicts the seconds of the program from the tokens before each row's.
    """

    rows: int
    tokens: int
    context: int
    seconds: Callable[[Sequence[int]], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkLimits:
    """Sizes of chunks, and how long the chunks of one step may take.

    Args:
      sizes: ascending. The smallest is computed however long it takes, so that a prompt always gets
        on; the largest bounds the prompt tokens of a step.
      seconds: predicts the seconds of a chunk from its tokens and the tokens before it.
      max_wait: the seconds that chunks may add to a step in which rows decode. Where that is
        infinite nothing depends on seconds.
      together: chunks of several rows in one program; None: each is one of its own.
    """

    sizes: tuple[int, ...]
    seconds: Callable[[int, int], float]
    max_wait: float = float("inf")
    together: TogetherLimits | None = None

    def total(self, count: int, context: int) -> float:
        """Predict the seconds of `count` tokens behind `context`, in the largest chunks."""
        seconds, most = 0.0, self.sizes[-1]
        while count:
            now = min(count, most)
            seconds += self.seconds(now, context)
            count, context = count - now, context + now
        return seconds

    def padded(self, count: int) -> int:
        """Count the tokens of `count`, in the largest chunks, with their pads."""
        full, rest = divmod(count, self.sizes[-1])
        return full * self.sizes[-1] + next((s for s in self.sizes if s >= rest > 0), 0)

    def __post_init__(self):
        if not self.sizes or self.sizes[0] < 1 or list(self.sizes) != sorted({*self.sizes}):
            raise ValueError(f"sizes must be positive and ascending; got sizes={self.sizes}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostLimits:
    """Room on the host for pages and snapshots that are evicted, and what it costs to use it.

    Args:
      size: bytes of all blocks together.
      page_bytes, state_bytes: of a block with the content of a page, or of a state.
      seconds: predicts the seconds of copying in so many pages on each shard, and so many states.
    Raises:
      ValueError: `size` has no room for a page and a state.
    """

    size: int
    page_bytes: int
    state_bytes: int
    seconds: Callable[[int, int], float] = lambda pages, states: 0.0

    def __post_init__(self):
        needed = self.page_bytes + self.state_bytes
        if self.size < needed:
            raise ValueError(
                f"host_memory must hold a page and a state at least, {needed:,} bytes for each "
                f"group of devices along `data`; got {self.size:,}. Give more, or none"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that a scheduler gives out.

    Args:
      max_rows: requests that run at a time. A pool with states has more of them than rows: what
        is left over holds snapshots.
      max_len: tokens of a request, prompt and answer.
      chunks: see `ChunkLimits`.
      overcommit: a factor on the size of the pool, 1 or more: running requests may come to hold so
        much together. At 1 nobody is ever preempted; above, more run at a time, since most
        answers stop early.
      snapshot_pages: take a snapshot at the end of the step in which a row has filled so many more
        pages. Others are taken at the end of a prompt, and where two prompts part.
      host: room for what is evicted; None drops it.
    """

    max_rows: int
    max_len: int
    chunks: ChunkLimits
    overcommit: float = 1.0
    snapshot_pages: int = 64
    host: HostLimits | None = None

    def __post_init__(self):
        for name in ("max_rows", "max_len", "overcommit", "snapshot_pages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {name}={getattr(self, name)}")
