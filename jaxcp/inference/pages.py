# SPDX-License-Identifier: Apache-2.0
"""Counts who uses which page and which state; knows neither tokens nor devices.

The pool is `shards * pages_per_shard` pages of `page_size` token slots. A row keeps its tokens in
natural order: those from `j * page_size` on lie in its page number j, which is on shard
`j % shards`. So the table of a row is a plain list of pages, a position tells its page and slot,
no two shards of a row differ by more than a page, and rows share a common prefix page by page.

A layer with a window or a recurrence keeps one state of constant size a row, not pages. States
are numbered too: one for each running row, and one for each snapshot.

| who | has | from | until |
|---|---|---|---|
| a running row | a hold on every page of its table, and on one state | `take`, `hold` | `release` |
| a plan in flight | a hold on the states that its snapshots go to | `take` | `release` |
| a node of the tree | its pages, which no other node has, and its snapshot | `keep` | `drop` |

| holds | kept | it is |
|---|---|---|
| none | no | free |
| none | yes | evictable: kept by the tree alone, and free once that drops it |
| some | yes or no | held |
"""

from collections import Counter
from collections.abc import Iterable


class Stock:
    """`size` numbered things, each of them free, evictable or held; all counts are kept up."""

    def __init__(self, size: int):
        self.size = size
        self.held = self.evictable = 0
        self._free = list(range(size))[::-1]
        self._holds = [0] * size
        self._kept = [False] * size

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int | None:
        """A free one, held once; None where there is none."""
        if not self._free:
            return None
        number = self._free.pop()
        self._become(number, 1, False)
        return number

    def hold(self, number: int) -> None:
        """Hold once more what is held or kept already."""
        self._refuse(number, not self._holds[number] and not self._kept[number], "free")
        self._become(number, self._holds[number] + 1, self._kept[number])

    def release(self, number: int) -> None:
        self._refuse(number, not self._holds[number], "not held")
        self._become(number, self._holds[number] - 1, self._kept[number])

    def keep(self, number: int) -> None:
        """Enter into the tree what is held."""
        self._refuse(number, not self._holds[number], "not held")
        self._refuse(number, self._kept[number], "in the tree already")
        self._become(number, self._holds[number], True)

    def drop(self, number: int) -> None:
        self._refuse(number, not self._kept[number], "not in the tree")
        self._become(number, self._holds[number], False)

    def check(self, holders: Iterable[int], keepers: Iterable[int]) -> None:
        """Compare with those who should have what: one entry for each hold, one for each keep."""
        holds, kept = Counter(holders), Counter(keepers)
        assert all(count == 1 for count in kept.values()), f"kept twice: {kept}"
        for number in range(self.size):
            got = self._holds[number], self._kept[number]
            assert got == (holds[number], kept[number] == 1), f"number {number}: {got}"
        used = holds.keys() | kept.keys()
        assert sorted(self._free) == sorted(set(range(self.size)) - used), "the free list is wrong"
        assert self.held == len(holds), f"held={self.held}, not {len(holds)}"
        assert self.free + self.evictable + self.held == self.size, "the sum is wrong"

    def _become(self, number, holds, kept):
        held, evictable = self._holds[number] > 0, self._kept[number] and not self._holds[number]
        self.held += (holds > 0) - held
        self.evictable += (kept and not holds) - evictable
        self._holds[number], self._kept[number] = holds, kept
        if not holds and not kept:
            self._free.append(number)

    def _refuse(self, number, wrong, state):
        if wrong:
            raise ValueError(f"number {number} of this pool is {state}: its owners miscount")


class Pages:
    """The pages of all shards, and the states.

    A page is named by `shard * pages_per_shard + its number there`.
    """

    def __init__(self, *, shards: int, pages_per_shard: int, page_size: int, states: int = 0):
        for name, value in [
            ("shards", shards), ("pages_per_shard", pages_per_shard), ("page_size", page_size),
        ]:  # fmt: skip
            if value < 1:
                raise ValueError(f"{name} must be positive; got {name}={value}")
        if states < 0:
            raise ValueError(f"states must be 0 or more; got states={states}")
        self.shards, self.pages_per_shard, self.page_size = shards, pages_per_shard, page_size
        self.pools = [Stock(pages_per_shard) for _ in range(shards)]
        self.states = Stock(states)

    def places(self, tokens: int) -> int:
        """Count the pages of a row of so many tokens."""
        return -(-tokens // self.page_size)

    def on_shard(self, places: int, shard: int) -> int:
        """Count those of a row's first `places` pages that lie on this shard."""
        return (places - shard + self.shards - 1) // self.shards

    def check_size(self, tokens: int, asked: str) -> None:
        """Raise ValueError where a row of so many tokens, for what is `asked`, could not lie here
        even if it were alone."""
        needed = self.on_shard(self.places(tokens), 0)
        if needed > self.pages_per_shard:
            raise ValueError(
                f"{asked} need {needed} pages of {self.page_size} tokens on a shard, which has "
                f"{self.pages_per_shard}; ask for fewer, or make the pool larger"
            )

    def fit(self, rows: Iterable[tuple[int, int]], factor: float) -> bool:
        """Tell whether rows with `(places they have, places they may come to have)` fit together
        into the pools, so many times as large."""
        rows = list(rows)
        for shard, pool in enumerate(self.pools):
            coming = sum(self.on_shard(b, shard) - self.on_shard(a, shard) for a, b in rows)
            if pool.held + coming > factor * pool.size:
                return False
        return True

    def take(self, place: int) -> int | None:
        """A page for this place of a row, held once; None where its shard has none free."""
        shard = place % self.shards
        local = self.pools[shard].take()
        return None if local is None else shard * self.pages_per_shard + local

    def hold(self, page: int) -> None:
        self._pool(page).hold(page % self.pages_per_shard)

    def release(self, page: int) -> None:
        self._pool(page).release(page % self.pages_per_shard)

    def keep(self, page: int) -> None:
        self._pool(page).keep(page % self.pages_per_shard)

    def drop(self, page: int) -> None:
        self._pool(page).drop(page % self.pages_per_shard)

    def check(self, holders: Iterable[int], keepers: Iterable[int]) -> None:
        """See `Stock.check`; the pages of every table, and those of every node."""
        holders, keepers, size = list(holders), list(keepers), self.pages_per_shard
        for shard, pool in enumerate(self.pools):
            pool.check(
                [page % size for page in holders if page // size == shard],
                [page % size for page in keepers if page // size == shard],
            )

    def _pool(self, page):
        return self.pools[page // self.pages_per_shard]
