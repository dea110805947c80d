# SPDX-License-Identifier: Apache-2.0
"""Requests that come, share, wait and go: pages of 4 tokens, and a device on paper."""

import pytest
from paper_device import PaperDevice, right_answer

from jaxcp.inference.limits import ChunkLimits, Limits
from jaxcp.inference.pages import Pages
from jaxcp.inference.request import Request, Status
from jaxcp.inference.scheduler import Scheduler

PROMPT = list(range(1, 11))


class Bench:
    """A scheduler and a paper device, with a clock that ticks once a step."""

    def __init__(
        self, *, shards=1, pages=16, states=0, sizes=(64,), max_wait=1e9, max_rows=4,
        overcommit=1.0, host=None,
    ):  # fmt: skip
        chunks = ChunkLimits(sizes=sizes, seconds=lambda new, context: new, max_wait=max_wait)
        limits = Limits(
            max_rows=max_rows, max_len=256, chunks=chunks, overcommit=overcommit, snapshot_pages=3,
            host=host,
        )  # fmt: skip
        self.pages = Pages(shards=shards, pages_per_shard=pages, page_size=4, states=states)
        self.scheduler = Scheduler(self.pages, limits)
        self.device, self.now = PaperDevice(self.pages), 0.0

    def add(self, prompt, new=5, **options):
        request = Request(prompt, max_new_tokens=new, **options)
        self.scheduler.add(request, self.now)
        return request

    def plan(self, drafts=0):
        self.now += 1
        plan = self.scheduler.schedule(self.now, lambda request: drafts)
        self.scheduler.check()
        return plan

    def read(self, plan, sampled):
        kept = self.scheduler.advance(plan, sampled, self.now)
        self.scheduler.check()
        return kept

    def step(self, drafts=0, right=0):
        plan = self.plan(drafts)
        self.read(plan, self.device.run(plan, lambda row: right))
        return plan

    def finish(self, *requests):
        for _ in range(500):
            if all(request.done for request in requests):
                return
            assert self.step().rows, "nothing goes on"
        raise AssertionError("some request never ends")

    @property
    def counts(self):
        return [(pool.free, pool.evictable, pool.held) for pool in self.pages.pools]


def work(plan):
    """(arrival, start, count) of every row."""
    return [(row.request.arrival, row.start, row.count) for row in plan.rows]


def test_the_life_of_a_request():
    bench = Bench()
    request = bench.add(PROMPT, new=3)
    assert request.status is Status.WAITING
    assert work(bench.step()) == [(0, 0, 10)], "the prompt, which gives the first token"
    assert request.status is Status.RUNNING and len(request.answer) == 1
    assert work(bench.step()) == [(0, 10, 1)]
    assert work(bench.step()) == [(0, 11, 1)], "the third token is not computed"
    assert request.status is Status.FINISHED and request.finish_reason == "length"
    assert request.answer == right_answer(request)
    assert bench.counts == [(13, 3, 0)], "12 tokens stay for the next turn"
    assert not bench.plan().rows
    stats = request.stats
    assert (stats.queue_seconds, stats.time_to_first_token) == (1, 1)
    assert stats.seconds_between_tokens == [1, 1] and stats.finished == 3
    assert (stats.computed, stats.reused, stats.preempted) == (12, 0, 0)


@pytest.mark.parametrize("shards", [1, 3, 8])
def test_the_next_turn_computes_what_is_new(shards):
    bench = Bench(shards=shards)
    first = bench.add(PROMPT)
    bench.finish(first)
    second = bench.add([*first.tokens, 3, 4])
    assert work(bench.plan()) == [(1, 14, 3)], "the last token of an answer is not computed"
    assert second.stats.reused == 14


def test_a_fork_copies_at_most_one_page():
    bench = Bench()
    first = bench.add(PROMPT, new=1)
    bench.finish(first)
    left, right = bench.add([*PROMPT, 1]), bench.add([*PROMPT, 2])
    plan = bench.step()
    assert work(plan) == [(1, 10, 1), (2, 10, 1)]
    assert len(plan.page_copies) == 2
    assert left.seat.table[:2] == right.seat.table[:2] and left.seat.table[2] != right.seat.table[2]
    bench.finish(left, right)
    assert [left.answer, right.answer] == [right_answer(left), right_answer(right)]


@pytest.mark.parametrize("states", [0, 9])
def test_answers_of_one_prompt_compute_it_once(states):
    """The others wait until the first one has it, in however many chunks; or is over."""
    bench = Bench(states=states, sizes=(4, 8), max_wait=8)
    first = bench.add(PROMPT)
    others = [bench.add(PROMPT, after=first) for _ in range(2)]
    while not first.answer:
        assert all(other.waits for other in others)
        assert {row.request for row in bench.step().rows} == {first}
    bench.finish(first, *others)
    assert all(other.answer == right_answer(other) for other in others)
    assert [other.stats.reused for other in others] == [len(PROMPT) - 1] * 2
    leader = bench.add(PROMPT[::-1])
    follower = bench.add(PROMPT[::-1], after=leader)
    bench.step()
    assert follower.waits and follower.status is Status.WAITING
    bench.scheduler.cancel(leader, bench.now)
    bench.finish(follower)
    assert follower.answer == right_answer(follower)


def test_a_copy_can_be_made_onto_its_source():
    """The pool is just large enough for the turn, so the page to copy from is evicted for it."""
    bench = Bench(pages=3)
    first = bench.add(PROMPT, new=1)
    bench.finish(first)
    second = bench.add([*PROMPT, 1], new=2)
    ((source, target),) = bench.step().page_copies
    assert source == target
    bench.finish(second)
    assert second.stats.reused == 10 and second.answer == right_answer(second)


def test_requests_that_compute_the_same_end_up_sharing_it():
    bench = Bench(sizes=(4, 8))
    first, second = bench.add(PROMPT, new=20), bench.add([*PROMPT[:9], 7, 7, 7], new=20)
    for _ in range(5):
        bench.step()
    assert first.seat.table[:2] == second.seat.table[:2]
    assert bench.counts[0][2] == 2 + 2 + 2, "two pages are shared"


def test_what_can_never_fit_is_refused_with_the_numbers():
    bench = Bench(shards=3, pages=2)
    bench.add(PROMPT, new=15)
    with pytest.raises(ValueError, match="10 tokens of the prompt and up to 16 new need 3 pages"):
        bench.add(PROMPT, new=16)
    with pytest.raises(ValueError, match="max_len=256"):
        bench.add(PROMPT, new=300)
    assert len(bench.scheduler.waiting) == 1


def test_a_request_is_added_once():
    bench = Bench()
    request = bench.add(PROMPT)
    with pytest.raises(ValueError, match="once"):
        bench.scheduler.add(request, 0.0)


@pytest.mark.parametrize("options", [{"pages": 8}, {"max_rows": 1}, {"states": 1}])
def test_what_does_not_fit_now_waits_its_turn(options):
    """Room is kept for all that a running request may come to hold, not for its prompt alone."""
    bench = Bench(**options)
    first, second = bench.add(PROMPT, new=10), bench.add([0, *PROMPT], new=10)
    bench.step()
    assert (first.status, second.status) == (Status.RUNNING, Status.WAITING)
    bench.finish(first)
    assert second.status is Status.WAITING
    bench.finish(second)
    assert second.stats.queue_seconds > 9 and second.answer == right_answer(second)


def test_rows_decode_while_a_long_prompt_comes_in():
    bench = Bench(pages=64, sizes=(8, 16, 32, 64), max_wait=18)
    talker = bench.add(PROMPT, new=50)
    bench.step()
    long = bench.add([0] * 100)
    for start in range(0, 96, 16):
        assert work(bench.step()) == [(0, 10 + start // 16, 1), (1, start, 16)]
    assert work(bench.step()) == [(0, 16, 1), (1, 96, 4)]
    assert len(talker.answer) == 8 and len(long.answer) == 1
    assert set(talker.stats.seconds_between_tokens) == {1}


def test_a_prompt_gets_on_however_little_time_there_is():
    bench = Bench(pages=64, sizes=(8, 64), max_wait=0)
    bench.add(PROMPT, new=50)
    bench.step()
    bench.add([0] * 100)
    assert work(bench.step()) == [(0, 10, 1), (1, 0, 8)]


def test_short_prompts_share_a_step():
    bench = Bench(pages=64, sizes=(8, 16, 32))
    for start in (20, 30, 40):
        bench.add(range(start, start + 14))
    assert work(bench.step()) == [(0, 0, 14), (1, 0, 14)], "of 32 tokens 4 are left: too few"
    assert work(bench.step())[2:] == [(2, 0, 14)]


def test_the_youngest_is_preempted_and_nobody_notices():
    bench = Bench(pages=8, overcommit=2.0)
    old, young = bench.add(PROMPT, new=15), bench.add([0, *PROMPT], new=15)
    while not young.stats.preempted:
        bench.step()
        assert old.status is Status.RUNNING
    assert young.status is Status.WAITING and young.answer
    said = len(young.answer)
    bench.finish(old, young)
    assert old.stats.preempted == 0 and old.answer == right_answer(old)
    assert len(young.answer) > said and young.answer == right_answer(young)
    assert young.stats.reused > 0, "some of what it had computed was still there"


def test_nobody_is_preempted_again_and_again():
    bench = Bench(pages=12, overcommit=4.0)
    requests = [bench.add([n, *PROMPT], new=new) for n, new in enumerate([29, 11, 28, 21])]
    bench.finish(*requests)
    assert [request.stats.preempted for request in requests] == [0, 0, 1, 1]


def test_answers_end_at_a_stop_token_in_the_middle_of_a_page():
    bench = Bench()
    stop = right_answer(Request(PROMPT, max_new_tokens=20))[3]
    request = bench.add(PROMPT, new=20, stop_tokens=[stop])
    bench.finish(request)
    assert request.finish_reason == "stop"
    assert request.answer == right_answer(request) and stop not in request.answer
    computed = len(request.tokens)
    assert bench.scheduler.tree.match([*request.tokens, 0], computed).length == computed


def test_accepted_drafts_are_as_many_tokens():
    bench = Bench()
    request = bench.add(PROMPT, new=9)
    bench.step()
    assert work(bench.step(drafts=3, right=2)) == [(0, 10, 4)]
    assert len(request.answer) == 4, "one from the prompt, two accepted, one more"
    assert work(bench.step(drafts=9, right=9)) == [(0, 13, 5)], "no more than are asked for"
    assert request.done and request.answer == right_answer(request)
    assert (request.stats.drafted, request.stats.accepted) == (3 + 4, 2 + 4)


def test_drafts_take_no_page_from_anybody():
    bench = Bench(pages=3)
    bench.add(PROMPT, new=3)
    bench.step()
    assert work(bench.step(drafts=8)) == [(0, 10, 2)], "12 tokens are the row's, and the pool"


def test_tokens_may_be_read_a_step_late():
    bench = Bench()
    stop = right_answer(Request(PROMPT, max_new_tokens=20))[2]
    request = bench.add(PROMPT, new=20, stop_tokens=[stop])
    plan = bench.plan()
    sampled = bench.device.run(plan)
    while not request.done:
        later = bench.plan()
        later_sampled = bench.device.run(later)
        bench.read(plan, sampled)
        plan, sampled = later, later_sampled
    assert not plan.rows[0].meant, "computed behind the stop token, for nobody"
    assert bench.read(plan, sampled) == [0]
    assert request.answer == right_answer(request)
    assert bench.counts[0][2] == 0


def test_a_request_in_turn_is_planned_once_its_token_is_read():
    """Nobody else waits for it."""
    bench = Bench()
    strict, other = bench.add(PROMPT, in_turn=True), bench.add(PROMPT[::-1])
    plan, rows = bench.plan(), []
    while plan.rows:
        sampled = bench.device.run(plan)
        later = bench.plan()
        rows.append({row.request for row in later.rows})
        bench.read(plan, sampled)
        plan = later if later.rows else bench.plan()
    assert rows[:4] == [{other}, {strict, other}, {other}, {strict, other}]
    for request in (strict, other):
        assert request.answer == right_answer(request)


def test_a_step_of_a_former_seat_is_not_meant():
    """Preempted and admitted anew while a step was under way, a request forgets that step."""
    bench = Bench(pages=8, overcommit=2.0)
    old, young = bench.add(PROMPT, new=15), bench.add([0, *PROMPT], new=15)
    unread = []
    while not young.stats.preempted:
        for plan, sampled in unread[:-1]:
            bench.read(plan, sampled)
        plan = bench.plan()
        unread = [*unread[-1:], (plan, bench.device.run(plan))]
    assert [len(plan.rows) for plan, _ in unread] == [2, 1]
    bench.scheduler.cancel(old, bench.now)
    plan = bench.plan()
    assert young.seat is not None
    unread.append((plan, bench.device.run(plan)))
    said = list(young.answer)
    assert [bench.read(*step) for step in unread] == [[0, 0], [0], [1]]
    assert young.answer[:-1] == said
    bench.finish(young)
    assert young.answer == right_answer(young)


def test_plans_end_in_their_order():
    bench = Bench()
    bench.add(PROMPT)
    first, second = bench.plan(), bench.plan()
    with pytest.raises(ValueError, match="order"):
        bench.read(second, [[1]])
    with pytest.raises(ValueError, match="1 to 1 tokens, not 2"):
        bench.read(first, [[1, 1]])
    bench.read(first, [[1]])
    with pytest.raises(ValueError, match="order"):
        bench.read(first, [[1]])
