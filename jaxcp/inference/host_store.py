# SPDX-License-Identifier: Apache-2.0
"""Remembers which pages and snapshots, evicted from the pool, lie in the memory of the host.

A block is the content of one page, or of one state, over all layers. It never changes, and it is
found by the tokens that it follows from: a digest of those before its page, and its run, the tokens
of its page up to its end. Blocks need neither the tree nor each other, and the least recently used
go when the bytes are used up.

A plan copies pages out when the tree gives them up, and copies blocks in when a request that
begins with their tokens is admitted. A block whose copy was in a plan that failed is dropped; every
other is of a finished computation, and stays valid whatever happens to the pool.
"""

import hashlib
import logging
import math
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from jaxcp.inference.limits import HostLimits

log = logging.getLogger(__name__)


class Block:
    """The content of a page or a state, and what it is found by."""

    __slots__ = ("content", "digest", "run", "shelf")

    def __init__(self, shelf: "Shelf", digest: bytes, run: bytes):
        self.shelf, self.digest, self.run = shelf, digest, run
        self.content: Any = None
        """Set, and read, by whoever runs plans; None until the plan that copies it out runs."""


class Shelf:
    """Blocks of one size: those of pages, or those of states."""

    def __init__(self, size: int):
        self.size = size
        self.runs: dict[bytes, dict[bytes, Block]] = {}
        """By digest and run."""
        self.leaving: list[tuple[int, Block]] = []
        """Copies of the next plan: the number of the page or state, and where to."""

    def of(self, digest: bytes) -> dict[bytes, Block]:
        return self.runs.get(digest, {})


def nobodys_block() -> Block:
    """A block that no store has, to measure with."""
    return Block(Shelf(0), b"", b"")


class HostStore:
    """Blocks on the host, as many as their bytes allow."""

    def __init__(self, limits: HostLimits, page_size: int):
        self.limits, self._size = limits, page_size
        self.pages, self.states = Shelf(limits.page_bytes), Shelf(limits.state_bytes)
        self.used = 0
        self._blocks: OrderedDict[Block, None] = OrderedDict()  # the least recently used first
        self._told = False

    def save_page(self, page: int, digest: bytes, run: bytes) -> None:
        """Have the next plan copy out a page, unless a block with these tokens is here."""
        for known, block in list(self.pages.of(digest).items()):
            if known.startswith(run):
                return self._use([block])
            if run.startswith(known):
                self._drop(block)
        self._put(self.pages, page, digest, run)

    def save_state(self, state: int, digest: bytes, run: bytes) -> None:
        """Have the next plan copy out a snapshot, unless it is here."""
        block = self.states.of(digest).get(run)
        if block is None:
            self._put(self.states, state, digest, run)
        else:
            self._use([block])

    def take_leaving(self) -> tuple[list[tuple[int, Block]], list[tuple[int, Block]]]:
        """The pages, and the states, that the next plan copies out."""
        # blocks that were dropped since, too: a row that is admitted may begin with them
        of_pages, of_states = self.pages.leaving, self.states.leaving
        self.pages.leaving, self.states.leaving = [], []
        return of_pages, of_states

    def lose(self, blocks: Iterable[Block]) -> None:
        """Drop blocks whose copies may never have been made."""
        for block in blocks:
            if block in self._blocks:
                self._drop(block)

    def reach(self, ids: array, known: int) -> tuple[int, list[Block]]:
        """Count the first tokens of a sequence that are here, or among the `known` of the pool;
        with the blocks for the places behind those that the pool knows wholly."""
        blocks: list[Block] = []
        if not self._blocks:
            return known, blocks
        starts = digests(ids, self._size)
        for place in range(known // self._size, len(starts)):
            start = place * self._size
            part = ids[start : start + self._size].tobytes()
            runs = self.pages.of(starts[place])
            block = runs.get(part) or max(
                runs.values(), key=lambda block: _tokens(block.run, part), default=None
            )
            end = start if block is None else start + _tokens(block.run, part)
            if block is None or end <= known:
                break
            known = end
            blocks.append(block)
            if end < start + self._size:
                break
        return known, blocks

    def snapshot(self, ids: array, least: int, most: int) -> tuple[int, Block | None]:
        """The longest of the prefixes of more than `least` and up to `most` tokens that has a
        snapshot here, and that; or `least` and None."""
        if not self.states.runs:
            return least, None
        ids = ids[:most]
        starts = digests(ids, self._size)
        for place in reversed(range(least // self._size, len(starts))):
            start = place * self._size
            part = ids[start : start + self._size].tobytes()
            ends = {
                start + len(run) // ids.itemsize: block
                for run, block in self.states.of(starts[place]).items()
                if part.startswith(run)
            }
            if ends and max(ends) > least:
                return max(ends), ends[max(ends)]
        return least, None

    def use(self, blocks: Iterable[Block]) -> None:
        """Count as used what a request begins with; the last block goes before the first."""
        self._use(reversed([*blocks]))

    def pays(self, tokens: int, fetch: float, compute: float) -> bool:
        """Tell whether fetching so many tokens takes no more seconds than computing them, as far as
        these are known; the log says so once."""
        if not self._told and math.isfinite(compute):
            self._told = True
            log.info(
                "host memory: %d tokens come back in %.4f s (%.1f us a token), or are computed in "
                "%.4f s (%.1f us a token): fetching them %s",
                tokens, fetch, 1e6 * fetch / tokens, compute, 1e6 * compute / tokens,
                "does not pay" if fetch > compute else "pays",
            )  # fmt: skip
        return not fetch > compute  # nan: sizes that were not measured yet

    def blocks(self) -> list[Block]:
        return list(self._blocks)

    def check(self) -> None:
        """Raise AssertionError where the store contradicts itself."""
        kept = [
            block
            for shelf in (self.pages, self.states)
            for digest, runs in shelf.runs.items()
            for run, block in runs.items()
            if (block.shelf, block.digest, block.run) == (shelf, digest, run)
        ]
        assert len(kept) == len(self._blocks) and {*kept} == {*self._blocks}
        assert self.used == sum(block.shelf.size for block in kept) <= self.limits.size

    def _put(self, shelf, number, digest, run):
        while self.used + shelf.size > self.limits.size:
            self._drop(next(iter(self._blocks)))
        block = Block(shelf, digest, run)
        shelf.runs.setdefault(digest, {})[run] = block
        shelf.leaving.append((number, block))
        self._blocks[block] = None
        self.used += shelf.size

    def _drop(self, block):
        runs = block.shelf.runs[block.digest]
        del runs[block.run], self._blocks[block]
        if not runs:
            del block.shelf.runs[block.digest]
        self.used -= block.shelf.size

    def _use(self, blocks):
        for block in blocks:
            self._blocks.move_to_end(block)


def digests(ids: array, size: int) -> list[bytes]:
    """Digests of the tokens before each page: of none, of one page, of two, ..."""
    running, tokens = hashlib.blake2b(digest_size=16), memoryview(ids)
    found = [running.digest()]
    for end in range(size, len(ids) + 1, size):
        running.update(tokens[end - size : end])
        found.append(running.digest())
    return found


def common(run: Any, other: Any) -> int:
    """Count the items that two sequences, of one type, have in common at their beginning."""
    if run == other:
        return len(run)
    low, high = 0, min(len(run), len(other))
    while low < high:  # slices are compared in C, items one by one are not
        middle = (low + high + 1) // 2
        if run[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _tokens(run: bytes, part: bytes) -> int:
    """Count the tokens that two runs have in common at their beginning."""
    return common(run, part) // array("i").itemsize
