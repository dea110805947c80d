# SPDX-License-Identifier: Apache-2.0
"""However a request ends, what it held is given back; and snapshots of layers that keep a state."""

import pytest
from paper_device import right_answer
from test_scheduler import PROMPT, Bench, work

from jaxcp.inference.chunks import ChunkBudget, ChunkLimits
from jaxcp.inference.limits import Limits
from jaxcp.inference.request import Request, Status


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize("states", [0, 3])
def test_cancel_gives_everything_back(steps, in_flight, states):
    bench = Bench(sizes=(4,), states=states)
    request = bench.add(PROMPT)
    for _ in range(steps):
        bench.step()
    plan = bench.plan() if in_flight else None
    bench.scheduler.cancel(request, bench.now)
    bench.scheduler.check()
    assert request.status is Status.CANCELLED and request.seat is None
    assert bench.counts[0][2] == 0, "no page is held"
    if plan:
        assert bench.read(plan, bench.device.run(plan)) == [0]
    bench.scheduler.cancel(request, bench.now)
    assert not bench.plan().rows and bench.pages.states.held == 0


def test_a_cancelled_request_leaves_its_work_to_the_next():
    bench = Bench(sizes=(4,))
    first = bench.add(PROMPT)
    bench.step(), bench.step()
    bench.scheduler.cancel(first, bench.now)
    second = bench.add(PROMPT)
    bench.finish(second)
    assert second.stats.reused == 8 and second.answer == right_answer(second)


def test_a_step_that_raises_ends_its_requests_alone():
    bench = Bench(max_rows=1)
    first, second = bench.add(PROMPT), bench.add([0, *PROMPT])
    error = RuntimeError("out of memory")
    bench.scheduler.fail(bench.plan(), error, bench.now)
    bench.scheduler.check()
    assert first.status is Status.FAILED and first.error is error
    assert bench.counts == [(16, 0, 0)], "nothing that it computed is kept"
    bench.finish(second)
    assert second.answer == right_answer(second)


def test_a_step_that_raises_adds_nothing_to_the_tree():
    bench = Bench()
    request = bench.add(PROMPT)
    bench.step(), bench.step()
    bench.scheduler.fail(bench.plan(), RuntimeError(), bench.now)
    assert bench.scheduler.tree.match(request.tokens, 12).length == 10, "the prompt was there"


def test_a_device_that_lost_its_pages_costs_time_alone():
    bench = Bench()
    first, second = bench.add(PROMPT, new=9), bench.add([0, *PROMPT], new=9)
    bench.step(), bench.step()
    bench.scheduler.forget()
    bench.device.erase()
    assert bench.counts == [(16, 0, 0)]
    bench.finish(first, second)
    assert [first.answer, second.answer] == [right_answer(first), right_answer(second)]


@pytest.mark.parametrize("states", [0, 8])
def test_a_device_that_is_lost_under_a_step_takes_the_step_along(states):
    bench = Bench(states=states)
    request = bench.add(PROMPT)
    bench.step()
    lost = bench.plan()
    assert bench.scheduler.in_flight == (lost,)
    bench.scheduler.forget()
    bench.device.erase()
    bench.scheduler.check()
    assert bench.scheduler.in_flight == () and bench.pages.states.held == 0
    bench.finish(request)
    assert request.answer == right_answer(request)


def test_finish_cuts_the_answer_at_a_stop_string():
    bench = Bench()
    request = bench.add(PROMPT, new=20)
    for _ in range(6):
        bench.step()
    bench.scheduler.finish(request, 2, bench.now)
    bench.scheduler.check()
    assert request.answer == right_answer(request)[:2] and request.finish_reason == "stop"
    assert request.status is Status.FINISHED and len(request.stats.token_times) == 2
    assert bench.scheduler.tree.match([*request.tokens, 0], 12).length == 12
    with pytest.raises(ValueError, match="finished and has 2"):
        bench.scheduler.finish(request, 1, bench.now)


class TestSnapshots:
    """After chunks and every three pages of an answer; where a prompt or a turn ends, and where two
    prompts part."""

    def test_where_they_are_taken(self):
        bench = Bench(states=8, sizes=(14,))
        prompt = list(range(30))
        bench.add(prompt, new=8)
        chunks = [bench.step() for _ in range(3)]
        assert [work(plan) for plan in chunks] == [[(0, 0, 14)], [(0, 14, 14)], [(0, 28, 2)]]
        assert all(plan.rows[0].snapshot is not None for plan in chunks)
        later = [bench.step() for _ in range(7)]
        with_snapshot = [plan.rows[0].start + 1 for plan in later if plan.rows[0].snapshot]
        assert with_snapshot == [36]
        assert len(bench.scheduler.tree.snapshots()) == 5 and bench.pages.states.held == 0

    def test_the_next_turn_starts_from_the_end_of_this_one(self):
        bench = Bench(states=8)
        first = bench.add(PROMPT)
        bench.finish(first)
        second = bench.add([*first.tokens, 3, 4])
        plan = bench.step()
        assert second.stats.reused == 14
        ((source, target),) = plan.state_copies
        assert source in bench.scheduler.tree.snapshots() and target == second.seat.state
        bench.finish(second)
        assert second.answer == right_answer(second)

    def test_an_edited_history_starts_from_the_snapshot_before_the_edit(self):
        """And takes one at the edit, for others that come by."""
        bench = Bench(states=8, sizes=(16,))
        first = bench.add(list(range(30)))
        bench.finish(first)
        for start, reused in [(18, 16), (30, 26), (22, 26)]:
            second = bench.add([*range(26), *range(start, start + 4)])
            bench.finish(second)
            assert second.stats.reused == reused and second.answer == right_answer(second)

    def test_a_prompt_that_comes_again_is_computed_to_its_last_token_once_more(self):
        bench = Bench(states=8)
        reused = []
        for _ in range(3):
            bench.finish(request := bench.add(PROMPT))
            reused.append(request.stats.reused)
            assert request.answer == right_answer(request)
        assert reused == [0, 0, len(PROMPT) - 1]

    def test_a_running_row_goes_before_a_snapshot(self):
        bench = Bench(states=2, max_rows=2)
        for prompt in (PROMPT, [9, *PROMPT]):
            bench.finish(bench.add(prompt))
        assert bench.pages.states.evictable == 2
        rows = bench.add([7, *PROMPT]), bench.add([8, *PROMPT])
        bench.step()
        assert [row.status for row in rows] == [Status.RUNNING] * 2
        assert bench.pages.states.held == 2
        bench.finish(*rows)
        assert [row.answer for row in rows] == [right_answer(row) for row in rows]

    @pytest.mark.parametrize("careful", [False, True])
    def test_drafts_behind_a_stop_token_cost_the_snapshot(self, careful):
        bench = Bench(states=8)
        bench.device.careful = careful
        stop = right_answer(Request(PROMPT, max_new_tokens=9))[1]
        request = bench.add(PROMPT, new=9, stop_tokens=[stop])
        bench.step(), bench.step(drafts=3, right=3)
        assert request.done and request.answer == right_answer(request)
        assert len(bench.scheduler.tree.snapshots()) == 1 + careful

    def test_a_row_with_drafts_takes_it_where_it_comes_by(self):
        bench = Bench(states=8)
        request = bench.add(PROMPT, new=9)
        bench.step()
        assert bench.step(drafts=3, right=0).rows[0].snapshot is not None, "might reach 12 of 14"
        assert len(bench.scheduler.tree.snapshots()) == 1, "but has not"
        bench.step(drafts=3, right=3)
        assert len(bench.scheduler.tree.snapshots()) == 2
        bench.finish(request)
        again = bench.add([*request.tokens[:15], 0, 0])
        bench.finish(again)
        assert again.stats.reused == 15 and again.answer == right_answer(again)

    def test_a_snapshot_behind_unread_tokens_is_not_kept(self):
        """The state of a row that is cancelled under a step is that of some other moment."""
        bench = Bench(states=8)
        request = bench.add(PROMPT)
        bench.step(), bench.step()
        plan = bench.plan()
        before = bench.scheduler.tree.snapshots()
        bench.scheduler.cancel(request, bench.now)
        bench.read(plan, bench.device.run(plan))
        assert bench.scheduler.tree.snapshots() == before


@pytest.mark.parametrize(
    "options, match",
    [({"prompt": []}, "empty"), ({"prompt": [1], "max_new_tokens": 0}, "max_new_tokens=0")],
)
def test_a_request_for_nothing_is_refused(options, match):
    options = {"max_new_tokens": 1} | options
    with pytest.raises(ValueError, match=match):
        Request(options.pop("prompt"), **options)


@pytest.mark.parametrize("name", ["max_rows", "max_len", "overcommit", "snapshot_pages"])
def test_limits_are_checked(name):
    chunks = ChunkLimits(sizes=(8,), seconds=lambda new, context: 0.0)
    with pytest.raises(ValueError, match=f"{name}=0.5"):
        Limits(**({"max_rows": 1, "max_len": 8, "chunks": chunks} | {name: 0.5}))


@pytest.mark.parametrize("sizes", [(), (0, 8), (8, 4), (8, 8)])
def test_sizes_of_chunks_ascend(sizes):
    with pytest.raises(ValueError, match="ascending"):
        ChunkLimits(sizes=sizes, seconds=lambda new, context: 0.0)


def test_chunks_shrink_as_the_context_grows():
    limits = ChunkLimits(
        sizes=(16, 64, 256), seconds=lambda new, context: new * (100 + context), max_wait=50_000
    )
    most = [ChunkBudget(limits, bounded=True).most(1000, n) for n in (0, 500, 1000, 10**6)]
    assert most == [256, 64, 16, 16]
    assert ChunkBudget(limits, bounded=False).most(1000, 10**6) == 256
