# SPDX-License-Identifier: Apache-2.0
"""Pages that the pool has no room for go to the host and come back: 4 tokens each, on paper."""

import logging
import math

import pytest
from paper_device import right_answer
from test_scheduler import PROMPT, Bench, work

from jaxcp.inference.groups import Groups
from jaxcp.inference.host_store import HostStore
from jaxcp.inference.limits import ChunkLimits, HostLimits
from jaxcp.inference.request import Request, Status

OTHERS = [9, *PROMPT]


def bench_with_host(*, blocks=100, price=0.0, **options):
    """A pool that has room for one conversation, and a host with room for so many blocks."""
    limits = HostLimits(
        size=5 * blocks, page_bytes=5, state_bytes=5, seconds=lambda pages, states: price * pages
    )
    return Bench(**({"pages": 6, "max_rows": 1, "host": limits} | options))


def blocks(bench):
    """Tokens of the blocks on the host, whose contents are what they should be."""
    bench.device.has(bench.scheduler.tree.host)
    found = bench.scheduler.tree.host.blocks()
    return [memoryview(block.run).cast("i").tolist() for block in found]


def evict(bench):
    """Give up all that is idle, and run a step that copies it out."""
    bench.scheduler.tree.clear()
    bench.finish(bench.add([7], new=1))
    bench.scheduler.check()


def evicted(bench, prompt=PROMPT, **options):
    """A request that has ended, and that is on the host alone."""
    request = bench.add(prompt, **options)
    bench.finish(request)
    evict(bench)
    return request


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("states", [0, 4])
def test_the_next_turn_of_an_evicted_conversation_computes_what_is_new(shards, states):
    bench = bench_with_host(shards=shards, states=states)
    first = evicted(bench)
    second = bench.add([*first.tokens, 3, 4])
    plan = bench.step()
    assert work(plan) == [(2, 14, 3)], "the last token of an answer is not computed"
    assert len(plan.pages_in) == 4 and len(plan.states_in) == (states > 0)
    assert (second.stats.reused, second.stats.restored) == (14, 14)
    bench.finish(second)
    assert second.answer == right_answer(second)


def test_conversations_take_turns_in_a_pool_that_holds_one():
    bench = bench_with_host(pages=5)
    said = [PROMPT, OTHERS]
    for turn in range(6):
        request = bench.add([*said[turn % 2], turn], new=2)
        bench.finish(request)
        assert request.answer == right_answer(request)
        known = len(said[turn % 2]) - 1 if turn > 1 else 0
        assert request.stats.reused == known and (request.stats.restored > 0) == (turn > 1)
        said[turn % 2] = request.tokens.tolist()
    free, evictable, held = bench.counts[0]
    assert (free + evictable, held) == (5, 0)


def test_a_history_that_is_edited_inside_a_page_comes_back_up_to_the_edit():
    bench = bench_with_host()
    evicted(bench)
    edited = bench.add([*PROMPT[:6], 77, 78, 79])
    (block, page), *_ = reversed(bench.step().pages_in)
    assert block.content[:2] == [(4, 5), (5, 6)] and page == edited.seat.table[1]
    bench.finish(edited)
    assert edited.stats.restored == 6 and edited.answer == right_answer(edited)


def test_what_is_in_the_pool_is_not_fetched():
    """Two of the pages are still there: the host has the others."""
    bench = bench_with_host(pages=5)
    first = bench.add(PROMPT)
    bench.finish(first)
    other = bench.add([7] * 10, new=2)
    bench.finish(other)
    assert bench.scheduler.tree.match(first.tokens, 14, host=False).length == 8
    second = bench.add([*first.tokens, 3])
    plan = bench.step()
    assert (second.stats.reused, second.stats.restored) == (14, 6) and len(plan.pages_in) == 2
    bench.finish(second)
    assert second.answer == right_answer(second)


def test_what_is_on_the_host_is_not_copied_there_again():
    bench = bench_with_host()
    first = evicted(bench)
    assert sorted(blocks(bench)) == sorted(
        [PROMPT[:4], PROMPT[4:8], first.tokens[8:12].tolist(), first.tokens[12:14].tolist()]
    )
    second = bench.add([*first.tokens, 3, 4], new=1)
    bench.finish(second)
    bench.scheduler.tree.clear()
    bench.add([6], new=1)
    copied = [memoryview(block.run).cast("i").tolist() for _, block in bench.step().pages_out]
    ends = [second.tokens[16:17].tolist(), second.tokens[12:16].tolist()]
    assert copied == [[7], *ends], "of another, and what the turn has added"
    assert first.tokens[12:14].tolist() not in blocks(bench), "the longer run is in its place"


def test_the_least_recently_used_block_makes_room():
    bench = bench_with_host(blocks=4)
    first = evicted(bench, new=3)  # 12 tokens
    assert len(blocks(bench)) == 3
    evicted(bench, OTHERS, new=2)
    assert len(blocks(bench)) == 4 and bench.scheduler.tree.host.used == 20
    again = bench.add([*first.tokens, 3])
    bench.finish(again)
    assert again.stats.restored == 0 and again.answer == right_answer(again)


@pytest.mark.parametrize(("price", "restored"), [(1.0, 14), (9.0, 0)])
def test_what_takes_longer_to_fetch_is_computed(price, restored, caplog):
    """A token takes a second to compute, and four pages have 14; the log says so once."""
    bench = bench_with_host(price=price)
    first = evicted(bench)
    with caplog.at_level(logging.INFO, "jaxcp"):
        for end in (77, 78):
            second = bench.add([*first.tokens[:14], end], new=1)
            bench.finish(second)
            assert second.stats.restored == second.stats.reused == restored
            evict(bench)
    (message,) = (record.getMessage() for record in caplog.records)
    assert "14 tokens come back" in message
    assert message.endswith("fetching them pays" if restored else "fetching them does not pay")


def test_what_nobody_can_predict_is_fetched():
    bench = bench_with_host(price=9.0)
    first = evicted(bench)
    tree = bench.scheduler.tree
    unknown = ChunkLimits(sizes=(64,), seconds=lambda new, context: math.inf)
    match, seconds = tree.cheapest([*first.tokens, 3], unknown)
    assert match.length == 14 and seconds == 36.0


def test_rows_that_decode_wait_for_what_is_fetched_as_for_a_chunk():
    """A request is admitted once the copies and its tokens fit into the time of a step."""
    bench = bench_with_host(price=2.0, pages=16, max_rows=3, sizes=(1, 4), max_wait=8.0)
    first = evicted(bench)
    talker = bench.add([8] * 3, new=9)
    bench.step()
    prompt, restored = bench.add([6] * 2, new=1), bench.add([*first.tokens, 3], new=1)
    assert work(bench.step()) == [(talker.arrival, 3, 1), (prompt.arrival, 0, 2)]
    assert restored.status is Status.WAITING, "8 seconds of copies and 3 of a chunk are left for it"
    assert work(bench.step())[1:] == [(restored.arrival, 14, 1)], "the first may take longer"


class TestFailures:
    def test_a_copy_of_a_step_that_failed_is_none(self):
        bench = bench_with_host()
        first = bench.add(PROMPT)
        bench.finish(first)
        bench.scheduler.tree.clear()
        bench.add([7], new=1)
        plan = bench.plan()
        assert len(plan.pages_out) == 4
        bench.scheduler.fail(plan, RuntimeError(), bench.now)
        bench.scheduler.check()
        assert blocks(bench) == []

    @pytest.mark.parametrize("states", [0, 4])
    def test_a_pool_that_is_lost_leaves_what_is_on_the_host(self, states):
        bench = bench_with_host(states=states, pages=16)
        first = evicted(bench)
        bench.finish(bench.add(OTHERS))
        bench.scheduler.tree.clear()
        bench.add([8], new=1)
        assert bench.plan().pages_out, "which is lost under way"
        bench.scheduler.forget()
        bench.device.erase()
        bench.scheduler.check()
        assert len(blocks(bench)) == 4 + 3 * (states > 0)
        for prompt, restored in [([*first.tokens, 3], 14), ([*OTHERS, 3], 0)]:
            request = bench.add(prompt)
            bench.finish(request)
            assert request.stats.restored == restored and request.answer == right_answer(request)

    def test_who_is_cancelled_under_the_copies_gives_everything_back(self):
        bench = bench_with_host()
        first = evicted(bench)
        second = bench.add([*first.tokens, 3])
        plan = bench.plan()
        sampled = bench.device.run(plan)
        bench.scheduler.cancel(second, bench.now)
        bench.read(plan, sampled)
        assert bench.counts[0][2] == 0
        third = bench.add([*first.tokens, 4])
        bench.finish(third)
        assert third.stats.reused == 14 and third.answer == right_answer(third)


class TestSnapshots:
    def test_one_that_is_evicted_alone_comes_back_alone(self):
        bench = bench_with_host(states=4)
        first = bench.add(PROMPT)
        bench.finish(first)
        taken = [bench.scheduler.tree.take_state() for _ in range(4)]  # by rows that run
        assert bench.scheduler.tree.snapshots() == []
        for state in taken:
            bench.pages.states.release(state)
        second = bench.add([*first.tokens, 3])
        plan = bench.step()
        assert plan.states_out and len(plan.states_in) == 1 and not plan.pages_in
        assert (second.stats.reused, second.stats.restored) == (14, 14)
        bench.finish(second)
        assert second.answer == right_answer(second)

    def test_pages_without_one_are_computed_up_to_it(self):
        """An edited history starts from the snapshot before the edit, and takes one there."""
        bench = bench_with_host(states=8, sizes=(16,), pages=20)
        first = evicted(bench, list(range(30)))
        assert first.answer == right_answer(first)
        for reused in (16, 26):
            second = bench.add([*range(26), 1, 2, reused])
            bench.finish(second)
            assert second.stats.restored == second.stats.reused == reused
            assert second.answer == right_answer(second)
            evict(bench)


def test_a_group_of_devices_knows_what_it_has_on_the_host():
    benches = [bench_with_host(), bench_with_host()]
    groups = Groups([bench.scheduler for bench in benches])
    first = evicted(benches[1])
    request = Request([*first.tokens, 3], max_new_tokens=1)
    groups.add(request, 0.0)
    assert request.group == 1 and request.unknown == 2


def test_the_host_has_room_for_a_page_and_a_state():
    with pytest.raises(ValueError, match="must hold a page and a state at least, 12 bytes"):
        HostLimits(size=11, page_bytes=5, state_bytes=7)


def test_a_block_that_was_dropped_before_its_copy_is_copied_all_the_same():
    """A row that was admitted meanwhile may begin with it."""
    store = HostStore(HostLimits(size=5, page_bytes=5, state_bytes=0), 4)
    store.save_page(0, b"", b"1234")
    (block,) = store.blocks()
    store.save_page(1, b"", b"5678")
    assert block not in store.blocks()
    assert (0, block) in store.take_leaving()[0]
