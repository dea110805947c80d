# SPDX-License-Identifier: Apache-2.0
"""Runs plans on devices: owns the pool, and the few programs that there are.

| program | how many |
|---|---|
| copies of pages and states, and what a row has said, for its penalties | 1 |
| copies to the host and back, see `HostCopies` | 2, where there is memory for them |
| a step of decoding | one for each of `Geometry.row_sizes` |
| a step that looks at guesses | as many, where there are guesses |
| a chunk of a prompt | one for each of `sizes` |
| chunks of several prompts | 1, where there are several rows |

Steps donate the pool. One that fails may have taken it along: `reset` makes a new one.

What a step samples stays on the device, where the next step finds it (`Seats`); `Tokens.read` waits
for it. So a step can be made and sent while the one before runs.
"""

import itertools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxcp.attention.pool import Pool
from jaxcp.context_parallel import Strategy
from jaxcp.inference import programs
from jaxcp.inference.batch import (
    Chunk,
    chunk_batch,
    copies,
    decode_batch,
    few_batch,
    is_late,
    lines_of,
    padded_lines,
    resting_chunk,
)
from jaxcp.inference.geometry import FEW, Geometry
from jaxcp.inference.host_copies import HostCopies
from jaxcp.inference.logprobs import LogProbs, TokenLogProbs
from jaxcp.inference.masks import words
from jaxcp.inference.penalties import Said, said_by
from jaxcp.inference.plan import Plan, Row
from jaxcp.inference.programs import LINES, Seats, no_seats
from jaxcp.inference.request import Seat
from jaxcp.inference.sampling import NOT_FINITE, Sampling
from jaxcp.inference.turns import layout_of
from jaxcp.inference.verify import Verified
from jaxcp.processes import everywhere

Lines = list[Row | None]
"""The row in each line of a batch; None rests."""


class Sampled(NamedTuple):
    """Tokens of a plan, row by row."""

    tokens: list[list[int]]
    """Tokens that each row samples, for `Scheduler.advance`."""
    logprobs: list[list[TokenLogProbs]]
    """One for each of them, or none."""
    finite: list[bool]
    """False where a row had `NOT_FINITE`, in a chunk that samples nothing too."""
    drafts: list[list[int]]
    """Tokens that the model's own layer drafts behind those of each row."""


class Tokens:
    """Tokens that a plan samples, on their way to the host.

    Args:
      plans: one a group of devices.
      steps: the row in each line of each program that runs, and what they sample.
    """

    def __init__(self, plans: list[Plan], steps: list[tuple[Lines, Verified]]):
        self.plans, self._steps, self.sent = plans, steps, time.monotonic()

    def read(self) -> list[Sampled]:
        """Wait for the tokens, and for the log-probabilities where they are wanted."""
        tokens: dict[int, list[int]] = {}
        logprobs: dict[int, list[TokenLogProbs]] = {}
        finite: dict[int, bool] = {}
        drafted: dict[int, list[int]] = {}
        for rows, found in self._steps:
            arrays = found.tokens, found.accepted, found.drafts
            lists = (np.asarray(x).T.tolist() for x in arrays)  # a jax.Array would compile its T
            for row, own, right, behind in zip(rows, *lists, strict=True):
                if row is not None:
                    finite[id(row)] = NOT_FINITE not in own[: 1 + right]
                    tokens[id(row)] = own[: 1 + right] if row.samples else []
                    drafted[id(row)] = list(itertools.takewhile(lambda token: token >= 0, behind))
            logprobs |= _log_probs(rows, found, tokens)
        return [
            Sampled(
                [tokens[id(row)] for row in plan.rows],
                [logprobs.get(id(row), []) for row in plan.rows],
                [finite[id(row)] for row in plan.rows],
                [drafted[id(row)] for row in plan.rows],
            )
            for plan in self.plans
        ]


def _log_probs(rows, found, tokens) -> dict[int, list[TokenLogProbs]]:
    """The log-probabilities of these tokens, by `id` of the rows that want them."""
    wanted = {
        i: row for i, row in enumerate(rows) if row and row.request.sampling.logprobs is not None
    }
    if not wanted:
        return {}
    arrays = jax.device_get(found.logprobs)
    return {
        id(row): [
            LogProbs(*(x[place, i] for x in arrays)).read(token, row.request.sampling.logprobs)
            for place, token in enumerate(tokens[id(row)])
        ]
        for i, row in wanted.items()
    }


class Runner:
    """The pool of an engine, and what computes on it. Make and use it under the engine's mesh."""

    def __init__(self, model: Any, geometry: Geometry, *, strategy: Strategy | None = None):
        self.model, self.geometry, self.strategy = model, geometry, strategy
        self.sizes, self.together = geometry.chunk_sizes, geometry.together
        self.pool: Pool
        self.seats: Seats
        self.host = HostCopies(geometry)
        nobody = said_by([], [], Sampling(), model.config.vocab_size), np.int32(geometry.seats)
        self._nothing = _put(nobody, P())
        self.reset()
        self.pool = self.host.begin(self.pool)

    def reset(self) -> None:
        """Make the pool anew: whatever was in it is lost."""
        g = self.geometry
        self.pool = self.host.settled(self.model.init_pool(**g.room()))
        seats = _put(no_seats(g, self.model.config.vocab_size), LINES)
        self.seats = self.host.settled(seats)
        self._written: dict[int, Seat] = {}  # by line of `said`: whose tokens are there

    def run(self, plans: list[Plan]) -> Tokens:
        """Send a plan of each group to the devices."""
        g, steps = self.geometry, []
        self.host.save(self.pool, plans)
        self._copy([plan.page_copies for plan in plans], [plan.state_copies for plan in plans])
        self.pool = self.host.load(self.pool, plans)
        self._prepare(plans)
        guessing = any(_guesses(row) for plan in plans for row in plan.rows)
        few = [[row for row in plan.rows if guessing and _is_few(row)] for plan in plans]
        rest = [[row for row in plan.rows if not (guessing and _is_few(row))] for plan in plans]
        if any(few):
            lines = lines_of(few, g)
            steps.append((lines, self._few(*few_batch(lines, g))))
        single = [[row for row in rows if row.count == 1] for rows in rest]
        if any(single):
            lines = lines_of(single, g)
            steps.append((lines, self._decode(decode_batch(lines, g))))
        chunks = [[row for row in rows if row.count > 1] for rows in rest]
        steps += self._chunks([[row for row in rows if not row.together] for rows in chunks])
        beside = [[row for row in rows if row.together] for rows in chunks]
        if self.together is not None and any(beside):
            steps.append(self._chunks_of(beside, *self.together))
        self._copy([[]] * g.groups, [_snapshots(plan) for plan in plans])
        return Tokens(plans, [(rows, everywhere(found)) for rows, found in steps])

    def _chunks(self, groups: list[list[Row]]) -> Iterator[tuple[Lines, Verified]]:
        """Run a program for the first row of each group, one for the second, and so on."""
        for lines in map(list, itertools.zip_longest(*groups)):
            chunk = chunk_batch(lines, self.geometry, self.sizes, layout_of(self.strategy))
            yield lines, self._chunk(chunk, self.geometry)

    def _chunks_of(self, groups, rows, tokens, geometry) -> tuple[Lines, Verified]:
        """Run one program for the chunks of all rows."""
        lines = padded_lines(groups, rows)
        chunk = chunk_batch(lines, geometry, (tokens,), layout_of(self.strategy))
        return lines, self._chunk(chunk, geometry)

    def warm_up(self) -> list[tuple[int, int, float]]:
        """Compile every program: no request compiles anything afterwards.

        Returns:
          Size, rows, and seconds of chunks that are all pads.
        """
        groups = self.geometry.groups
        self._arrange()
        for rows in self.geometry.row_sizes:
            lines: Lines = [None] * (groups * rows)
            self._decode(decode_batch(lines, self.geometry))
            if self.geometry.drafts:
                self._few(*few_batch(lines, self.geometry))
        programs = [(1, size, self.geometry) for size in self.sizes]
        programs += [self.together] if self.together else []
        return [(size, rows, self._timed(size, rows, g)) for rows, size, g in programs]

    def _timed(self, size, rows, geometry) -> float:
        """Seconds of chunks that are all pads."""
        for _ in range(2):  # the second does not compile
            start = time.monotonic()
            self._chunk(resting_chunk(size, geometry.groups * rows, geometry), geometry)
            jax.block_until_ready(self.pool)
        return time.monotonic() - start

    def _copy(self, pages, states) -> None:
        """Copy pages and states of each group, if there are any to copy."""
        if any(pages) or any(states):
            self._arrange(pages=pages, states=states)

    def _arrange(self, *, pages=None, states=None, said: tuple[Said, int] | None = None) -> None:
        """Copy pages and states, and write what the row in a line has said."""
        none: list[list] = [[]] * self.geometry.groups
        pairs = tuple(copies(x or none, self.geometry.max_rows) for x in (pages, states))
        row, line = self._nothing if said is None else _put((said[0], np.int32(said[1])), P())
        self.pool, said_after = programs.program(programs.arranged)(
            self.pool, self.seats.said, *_put(pairs, LINES), row, line
        )
        self.seats = self.seats._replace(said=said_after)

    def _prepare(self, plans: list[Plan]) -> None:
        """Send what rows are sampled by, beside their numbers: what they have said when they take a
        seat, and what their grammars allow next."""
        rows = {
            group * self.geometry.max_rows + row.seat.row: row
            for group, plan in enumerate(plans)
            for row in plan.rows
            if row.samples
        }
        for line, row in rows.items():
            if row.request.sampling.penalizes and self._written.get(line) is not row.seat:
                self._arrange(said=(_said(row, self.model.config.vocab_size), line))
                self._written[line] = row.seat
        rows = {line: row for line, row in rows.items() if row.request.output.constraint}
        if rows:
            allowed = self.host.settled(_put(self._bits(rows), LINES))
            self.seats = self.seats._replace(allowed=allowed)

    def _bits(self, rows: dict[int, Row]) -> np.ndarray:
        """Bits of what the grammars of these rows, by line, allow next."""
        seats = self.geometry.seats
        bits = np.zeros((seats, words(self.model.config.vocab_size)), np.int32)
        for line, row in rows.items():
            bits[line] = row.request.output.constraint.allowed()
        return bits

    def _decode(self, numbers: np.ndarray) -> Verified:
        return self._step(programs.decode, _put(numbers, LINES), self.geometry)

    def _few(self, ids: np.ndarray, numbers: np.ndarray) -> Verified:
        return self._step(programs.few, *_put((ids, numbers), LINES), self.geometry)

    def _chunk(self, chunk: Chunk, geometry: Geometry) -> Verified:
        spec = P("data", "seq" if chunk.sharded else None)
        arrays = _put((chunk.ids, chunk.positions, chunk.following), spec)
        static = geometry, chunk.sharded, self.strategy if chunk.sharded else None
        return self._step(programs.chunk, *arrays, _put(chunk.numbers, LINES), *static)

    def _step(self, function, *arguments) -> Verified:
        """Run a step, which has the pool and the seats of the one before."""
        found, self.pool, self.seats = programs.program(function)(
            self.model, self.pool, self.seats, *arguments
        )
        return found


def _said(row: Row, vocab_size: int) -> Said:
    tokens, begin = row.request.tokens, row.request.prompt_len
    return said_by(tokens[:begin], tokens[begin:], row.request.sampling, vocab_size)


def _guesses(row) -> bool:
    """Tell whether a row has guesses, or wants some behind what it samples."""
    guesses = row.request.guesses
    return row.drafts > 0 or (row.samples and guesses is not None and guesses.wants_drafts)


def _is_few(row) -> bool:
    """Tell whether a step that looks at guesses can take the row."""
    return row.count <= FEW and not is_late(row)


def _snapshots(plan) -> list[tuple[int, int]]:
    return [(row.seat.state, row.snapshot) for row in plan.rows if row.snapshot is not None]


def _put(arrays, spec):
    empty = jax.sharding.get_abstract_mesh().empty
    return jax.tree.map(jnp.asarray, arrays) if empty else jax.device_put(arrays, spec)
