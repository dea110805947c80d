# SPDX-License-Identifier: Apache-2.0
"""Decides which tokens of which requests the next step computes; sees no array and no clock.

`schedule` makes a plan, the engine runs it, `advance` takes the tokens that it sampled, or `fail`
the exception that it raised. `request.py` tells the life of a request, `plan.py` what a step is.

- Who came first goes first: into a seat, to a chunk of its prompt, to a page that is free.
- Every row that has its prompt decodes in every step; chunks take the time that is left.
- The oldest request is never preempted and is in every plan, so everything comes to its end.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from jaxcp.inference.chunks import ChunkBudget
from jaxcp.inference.host_store import HostStore
from jaxcp.inference.limits import Limits
from jaxcp.inference.pages import Pages
from jaxcp.inference.plan import Plan, Row
from jaxcp.inference.prefix_tree import Match, PrefixTree
from jaxcp.inference.request import Request, Seat, Status


class Scheduler:
    """Requests that wait and requests that run, both in the order of their arrival."""

    def __init__(self, pages: Pages, limits: Limits):
        self.pages, self.limits = pages, limits
        host = None if limits.host is None else HostStore(limits.host, pages.page_size)
        self.tree = PrefixTree(pages, host)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._in_flight: deque[Plan] = deque()
        self._free_rows = list(range(limits.max_rows))[::-1]
        self._arrivals = 0
        self._too_large: Request | None = None  # until somebody gives something back

    def add(self, request: Request, now: float) -> None:
        """Queue a request.

        Raises:
          ValueError: it could not run even if it were alone, or was added before.
        """
        if request.arrival >= 0:
            raise ValueError(f"a request is added once; this one is {request.status.value}")
        self.check_size(request)
        request.arrival, self._arrivals = self._arrivals, self._arrivals + 1
        request.stats.queued = now
        self.waiting.append(request)

    def check_size(self, request: Request) -> None:
        """Raise ValueError where a request could not run even if it were alone."""
        most = request.max_computed
        asked = f"{request.prompt_len} tokens of the prompt and up to {request.max_new_tokens} new"
        if most > self.limits.max_len:
            raise ValueError(f"{asked} are more than max_len={self.limits.max_len}; ask for fewer")
        self.pages.check_size(most, asked)

    def schedule(self, now: float, drafts: Callable[[Request], int] = lambda request: 0) -> Plan:
        """The next step: every row that decodes, and chunks of prompts as far as time allows.

        A row whose drafts are in flight is left out until they are read.

        Args:
          drafts: how many guessed tokens a request has for the step to verify.
        """
        plan = Plan()
        seats = self._seats()
        decoding = any(len(request.tokens) - seat.scheduled <= 1 for request, seat in seats)
        prompts = list(self._prompts(seats))
        budget = ChunkBudget(self.limits.chunks, bounded=decoding, prompts=prompts)
        for request, seat in seats:  # the oldest first: whom it preempts is not in the plan yet
            if request.seat is seat:
                self._continue(plan, request, seat, budget, drafts)
        while self.waiting and self._admit(plan, self.waiting[0], budget, now):
            request = self.waiting.popleft()
            self._continue(plan, request, request.seat, budget, drafts)
        if plan.rows:
            self._in_flight.append(plan)
            plan.pages_out, plan.states_out = self.tree.take_leaving()
        return plan

    def advance(self, plan: Plan, sampled: Sequence[Sequence[int]], now: float) -> list[int]:
        """Take the tokens that a step sampled, and return how many of them each row's answer keeps.

        Args:
          sampled: for each row of the plan the accepted drafts and one more; nothing for a row
            that does not sample.
        """
        for row, tokens in zip(plan.rows, sampled, strict=True):
            least, most = (1, 1 + row.drafts) if row.samples else (0, 0)
            if not least <= len(tokens) <= most:
                raise ValueError(
                    f"a row with {row.drafts} drafts gives {least} to {most} tokens, not "
                    f"{len(tokens)}"
                )
        self._close(plan)
        kept = []
        for row, tokens in zip(plan.rows, sampled, strict=True):
            kept.append(self._advance_row(row, tokens, now) if row.meant else 0)
            self._release_snapshot(row)
        return kept

    @property
    def in_flight(self) -> tuple[Plan, ...]:
        """Plans that were made and neither advanced nor failed, in their order."""
        return tuple(self._in_flight)

    def fail(self, plan: Plan, error: BaseException, now: float) -> None:
        """End the requests of a plan whose step raised; none of what it computed is kept."""
        self._close(plan)
        self._lose(plan)
        for row in plan.rows:
            if row.meant:
                row.request.error = error
                self._leave(row.request, keep=False)
                self._end(row.request, Status.FAILED, now)

    def spoil(self, request: Request, error: BaseException, now: float) -> None:
        """End a request whose latest token, where one was just taken, is none; `forget` must
        follow."""
        if request.tokens[-1] < 0:
            del request.tokens[-1:], request.stats.token_times[-1:]
        request.finish_reason, request.error = None, error
        if request.seat is not None:
            self._leave(request, keep=False)
        self._end(request, Status.FAILED, now)

    def finish(self, request: Request, length: int, now: float) -> None:
        """End a running request with the first `length` tokens of its answer, at a stop string."""
        if request.seat is None or length > len(request.answer):
            raise ValueError(
                f"can finish a running request with the tokens it has; this one is "
                f"{request.status.value} and has {len(request.answer)}, not {length}"
            )
        del request.tokens[request.prompt_len + length :], request.stats.token_times[length:]
        request.finish_reason = "stop"
        self._leave(request)
        self._end(request, Status.FINISHED, now)

    def cancel(self, request: Request, now: float) -> None:
        """End a request wherever it is; one that is over stays as it is."""
        if request not in self.waiting and request not in self.running:
            if request.done:
                return
            raise ValueError("this request was not added here: cancel it where it was")
        if request.seat is None:
            self.waiting.remove(request)
        else:
            self._leave(request)
        self._end(request, Status.CANCELLED, now)

    def forget(self) -> None:
        """Compute everything anew, plans in flight too: the device has lost its pages, as when a
        step that raised had taken them along."""
        while self._in_flight:
            self._lose(self._in_flight.popleft())
        while self.running:
            self._preempt(self.running[-1], keep=False)
        self.tree.clear(lost=True)

    def check(self) -> None:
        """Raise AssertionError unless every page and state is held by whom it should be."""
        seats = [seat for _, seat in self._seats()]
        self.tree.check()
        self.pages.check([page for seat in seats for page in seat.table], self.tree.pages())
        states = [seat.state for seat in seats]
        states += [row.snapshot for plan in self._in_flight for row in plan.rows]
        self.pages.states.check([s for s in states if s is not None], self.tree.snapshots())
        arrivals = [request.arrival for request in (*self.running, *self.waiting)]
        assert arrivals == sorted(arrivals) and len(seats) == len(self.running)
        assert all(request.status is Status.RUNNING for request in self.running)
        assert all(request.status is Status.WAITING for request in self.waiting)
        rows = sorted([seat.row for seat in seats] + self._free_rows)
        assert rows == list(range(self.limits.max_rows))

    def _continue(self, plan, request, seat, budget, drafts):
        """Put the next tokens of a running request into the plan."""
        start, left = seat.scheduled, len(request.tokens) - seat.scheduled
        count = self._next_tokens(request, seat, left, budget, drafts)
        count = count and self._grow(request, seat, start + count) - start
        if not count:
            return
        guessed = 0 if left > 1 else count - 1
        if left > 1:
            budget.spend(left, count, start)
        wanted = self._snapshot_due(request, seat, start, start + count)
        plan.rows.append(
            Row(
                request=request, seat=seat, start=start, count=count, drafts=guessed,
                samples=count >= left, together=left > 1 and budget.joins(left, start),
                snapshot=self._take_snapshot() if wanted else None,
            )
        )  # fmt: skip
        seat.scheduled += count
        request.stats.computed += count
        request.stats.drafted += guessed

    def _prompts(self, seats) -> Iterator[tuple[int, int]]:
        """The prompts that may want chunks, see `ChunkBudget`, and may be admitted for them."""
        blocked = self.waiting and self.waiting[0] is self._too_large
        coming = [] if blocked else list(itertools.islice(self.waiting, len(self._free_rows)))
        known = [s.scheduled for _, s in seats] + [self.tree.known(r.tokens) for r in coming]
        for request, here in zip([*self.running, *coming], known, strict=True):
            if len(request.tokens) - here > 1:
                yield len(request.tokens) - here, here

    def _next_tokens(self, request, seat, left, budget, drafts) -> int:
        """Count the tokens to compute behind those scheduled, `left` of which are known."""
        start = seat.scheduled
        if left > 1:  # of a prompt; 1: the latest token; 0: that one is not read yet
            stops = [stop - start for stop in self._stops(request, seat) if stop > start]
            return min(budget.most(left, start), *stops, left)
        if left < 0 or start == request.max_computed or (not left and request.in_turn):
            return 0  # its drafts or its last token are in flight
        return 1 + min(drafts(request), request.max_computed - start - 1)

    def _admit(self, plan, request, budget, now) -> bool:
        """Give the request a seat, if it can have one by now."""
        blocked = not self._free_rows or request is self._too_large or request.waits
        if blocked or not budget.most(1, 0):
            return False
        match, fetch = self.tree.cheapest(request.tokens, self.limits.chunks)
        if not budget.most(len(request.tokens) - match.length, match.length, before=fetch):
            return False
        seat = Seat(computed=match.length, scheduled=match.length)
        if match.known >= match.length + self.pages.page_size:
            seat.parting = match.known
        self._share(seat, request.tokens, match)
        if not self._fits(request, seat) or not self._equip(seat, match.length):
            self._give_back(seat)
            self._too_large = request
            return False
        if match.source is not None:
            plan.page_copies.append((match.source, seat.table[-1]))
        if match.state is not None:
            plan.state_copies.append((match.state, seat.state))
        plan.pages_in += zip(match.blocks, seat.table[len(match.pages) :], strict=False)
        if match.state_block is not None:
            plan.states_in.append((match.state_block, seat.state))
        budget.wait(fetch)
        seat.row = self._free_rows.pop()
        request.seat, request.status = seat, Status.RUNNING
        self.running.append(request)
        request.stats.reused = match.length
        request.stats.restored = match.length - match.resident
        if request.stats.admitted is None:
            request.stats.admitted = now
        return True

    def _fits(self, request, seat) -> bool:
        """Compare the pool with all that this and the running requests may come to hold.

        One that was preempted comes back without overcommitment, or it would be preempted again.
        """
        factor = 1 if request.stats.preempted else self.limits.overcommit
        seats, places = [*self._seats(), (request, seat)], self.pages.places
        return self.pages.fit([(len(s.table), places(r.max_computed)) for r, s in seats], factor)

    def _equip(self, seat, length) -> bool:
        """Take pages up to that of the first token to compute, and a state.

        What is evicted for that may be the very page and snapshot to copy from. That is fine: the
        step makes its copies before anything is written.
        """
        while len(seat.table) <= length // self.pages.page_size:
            if (page := self.tree.take_page(len(seat.table))) is None:
                return False
            seat.table.append(page)
        seat.state = self.tree.take_state()
        return seat.state is not None or not self.pages.states.size

    def _share(self, seat, ids, match: Match):
        """Let a seat have the tree's pages wherever a whole page is there, and lock them."""
        count = len(match.pages)
        for page in match.pages:
            self.pages.hold(page)
        for page in seat.table[:count]:
            self.pages.release(page)
        seat.table[:count] = match.pages
        lock, seat.lock = seat.lock, self.tree.lock(ids, count * self.pages.page_size)
        if lock is not None:
            self.tree.unlock(lock)

    def _grow(self, request, seat, end) -> int:
        """Take pages up to position `end`; up to where there are some.

        Pages come from the free ones, then from the tree. A row that would stand still otherwise
        has them from the youngest request, and waits anew if that is itself.
        """
        size = self.pages.page_size
        while len(seat.table) * size < end:
            page = self.tree.take_page(len(seat.table))
            if page is not None:
                seat.table.append(page)
            elif len(seat.table) * size > seat.scheduled:
                return len(seat.table) * size
            else:
                assert len(self.running) > 1, "add() let in what cannot fit"
                self._preempt(youngest := self.running[-1])
                if youngest is request:
                    return seat.scheduled
        return end

    def _advance_row(self, row, tokens, now) -> int:
        request, seat = row.request, row.seat
        accepted = max(0, len(tokens) - 1)
        seat.computed = row.start + row.count - row.drafts + accepted
        if row.drafts:
            seat.scheduled = seat.computed
        request.stats.accepted += accepted
        kept = request.extend(tokens, now)
        if request.finish_reason is not None:
            self._leave(request, settled=True)
            self._end(request, Status.FINISHED, now)
        elif row.snapshot is not None:
            if self._snapshot_due(request, seat, row.start, seat.computed):  # drafts may be wrong
                self._publish(request, seat, row.snapshot)
        elif not self.pages.states.size and row.start < request.prompt_len <= seat.computed:
            self._publish(request, seat, None)
        return kept

    def _publish(self, request, seat, state):
        """Put what a running request has computed into the tree, and have the tree's pages."""
        ids = request.tokens[: seat.computed]
        self.tree.insert(ids, seat.table, state)
        self._share(seat, ids, self.tree.match(ids, len(ids)))
        self._too_large = None

    def _leave(self, request, *, keep=True, settled=False):
        """Take the seat; what was computed stays in the tree for as long as there is room.

        Args:
          settled: whether the state is that after the computed tokens though plans are in flight.
        """
        seat = request.seat
        length = min(seat.computed, len(request.tokens))
        settled = length == seat.computed and (settled or seat.scheduled == seat.computed)
        if keep and length and (settled or not self.pages.states.size):
            self.tree.insert(request.tokens[:length], seat.table, seat.state)
        self._give_back(seat)
        self._free_rows.append(seat.row)
        self.running.remove(request)
        request.seat, self._too_large = None, None

    def _give_back(self, seat):
        self.tree.unlock(seat.lock)
        for page in seat.table:
            self.pages.release(page)
        if seat.state is not None:
            self.pages.states.release(seat.state)

    def _preempt(self, request, *, keep=True):
        self._leave(request, keep=keep)
        request.status = Status.WAITING
        request.stats.preempted += 1
        self.waiting.appendleft(request)

    def _end(self, request, status, now):
        request.status, request.stats.finished = status, now

    def _lose(self, plan):
        """Give back what a plan was to fill, which it may not have."""
        self.tree.lose(block for _, block in (*plan.pages_out, *plan.states_out))
        for row in plan.rows:
            self._release_snapshot(row)

    def _release_snapshot(self, row):
        if row.snapshot is not None:
            self.pages.states.release(row.snapshot)
            self._too_large = None

    def _close(self, plan):
        if not self._in_flight or self._in_flight[0] is not plan:
            raise ValueError("plans end in the order in which they were made, each once")
        self._in_flight.popleft()

    def _seats(self) -> list[tuple[Request, Seat]]:
        return [(request, request.seat) for request in self.running if request.seat is not None]

    def _stops(self, request, seat) -> tuple[int, ...]:
        """Positions that no chunk crosses, for the sake of their snapshots."""
        if not self.pages.states.size:
            return ()
        # whoever shares a prompt computes its last token, which has the logits
        return (seat.parting, request.prompt_len - request.shared, request.prompt_len)

    def _snapshot_due(self, request, seat, start, end) -> bool:
        """Tell whether a step over positions `start..end - 1` ends where a snapshot is wanted."""
        if not self.pages.states.size:
            return False
        stride = self.limits.snapshot_pages * self.pages.page_size
        return end in self._stops(request, seat) or end // stride > start // stride

    def _take_snapshot(self) -> int | None:
        """A state for a snapshot, as long as enough are left for all rows."""
        states, free = self.pages.states, len(self._free_rows)
        return self.tree.take_state() if states.size - states.held > free else None
