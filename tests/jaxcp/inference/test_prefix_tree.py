# SPDX-License-Identifier: Apache-2.0
"""The prefix tree: what was computed once is found again, to the token; pages of 4 tokens here."""

import pytest

from jaxcp.inference.pages import Pages
from jaxcp.inference.prefix_tree import PrefixTree

HISTORY = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


@pytest.fixture
def pages():
    return Pages(shards=1, pages_per_shard=8, page_size=4)


@pytest.fixture
def tree(pages):
    return PrefixTree(pages)


def compute(tree, ids, *, shared=(), state=None):
    """A row that computes `ids`, behind pages that it shares, puts them in and ends; its table."""
    pages = tree.pool
    for page in shared:
        pages.hold(page)
    table = [*shared]
    while len(table) < pages.places(len(ids)):
        table.append(pages.take(len(table)))
    tree.insert(ids, table, state)
    for page in table:
        pages.release(page)
    if state is not None:
        pages.states.release(state)
    check(tree)
    return table


def check(tree):
    tree.check()
    tree.pool.check([], tree.pages())


def test_an_empty_tree_knows_nothing(tree):
    assert tree.match(HISTORY, 10)[:4] == (0, [], None, None)


def test_a_history_is_found_to_the_token(tree):
    table = compute(tree, HISTORY)
    assert tree.match([*HISTORY, 11, 12], 11)[:4] == (10, table[:2], table[2], None)


def test_a_page_that_is_full_need_not_be_copied(tree):
    table = compute(tree, HISTORY)
    assert tree.match([*HISTORY[:8], 77], 8)[:4] == (8, table[:2], None, None)


def test_an_edited_history_keeps_what_comes_before_the_edit(tree):
    table = compute(tree, HISTORY)
    assert tree.match([1, 2, 3, 4, 5, 77, 7], 6)[:4] == (5, table[:1], table[1], None)


def test_the_last_token_of_a_prompt_can_be_left_to_compute(tree):
    table = compute(tree, HISTORY)
    assert tree.match(HISTORY, len(HISTORY) - 1)[:4] == (9, table[:2], table[2], None)


def test_branches_that_part_inside_a_page_have_a_page_each(tree, pages):
    first = compute(tree, HISTORY)
    second = compute(tree, [1, 2, 3, 4, 5, 77, 78], shared=first[:1])
    assert second[0] == first[0] and second[1] != first[1]
    assert sorted(tree.pages()) == sorted({*first, *second}), "every page once"
    assert tree.match([*HISTORY, 0], 10).pages == first[:2]
    assert tree.match([1, 2, 3, 4, 5, 77, 78], 7)[:4] == (7, second[:1], second[1], None)
    assert tree.match([1, 2, 3, 4, 5], 5).source in (first[1], second[1]), "both have token 5"


def test_to_look_at_a_table_is_no_use_of_it(tree, pages):
    first, second = compute(tree, HISTORY), compute(tree, [70, 71, 72, 73, 74])
    assert tree.table([*HISTORY, 11]) == (first, 10)
    assert tree.table(HISTORY[:6]) == (first[:2], 6)
    assert tree.table([9]) == ([], 0)
    while pages.take(0) is not None:
        pass
    assert tree.evict(0)  # the one that was used longest ago, looked at or not
    assert tree.known(HISTORY) < 10 and tree.table([70, 71, 72, 73, 74]) == (second, 5)


def test_a_row_may_go_on_in_the_page_that_it_has_put_in(tree, pages):
    table = [pages.take(place) for place in range(2)]
    tree.insert(HISTORY[:5], table)  # the prompt
    tree.insert(HISTORY[:8], table)  # the answer
    assert tree.pages() == table
    assert tree.match(HISTORY, 9)[:4] == (8, table, None, None)


def test_tokens_that_are_there_keep_their_pages(tree, pages):
    first = compute(tree, HISTORY)
    compute(tree, HISTORY)  # by somebody who started at the same time
    assert tree.match([*HISTORY, 0], 10).pages == first[:2]
    assert pages.pools[0].free == 8 - 3, "the others are free again"


def test_the_longest_unused_goes_first_and_from_its_end(tree, pages):
    old, new = compute(tree, HISTORY), compute(tree, [0, *HISTORY])
    tree.match(HISTORY, 10)  # the old one is used again
    for _ in range(2):
        pages.take(0)
    assert pages.pools[0].free == 0 and tree.evict(0)
    assert tree.match([0, *HISTORY], 11)[:4] == (8, new[:2], None, None)
    assert tree.match([*HISTORY, 0], 10)[:4] == (10, old[:2], old[2], None)
    pool = pages.pools[0]
    assert (pool.free, pool.evictable, pool.held) == (1, 5, 2)


def test_a_parent_takes_over_the_page_in_which_it_ends(tree, pages):
    first = compute(tree, HISTORY[:6])
    branch = compute(tree, HISTORY[:8], shared=first[:1])
    assert sorted(tree.pages()) == sorted(branch), "the page of the branch has the parent's tokens"
    other = compute(tree, [0, 0, 0, 0])
    tree.match(HISTORY[:6], 6)
    while pages.take(0) is not None:
        pass
    assert tree.evict(0), "the branch goes, which frees nothing, and then the other"
    assert tree.match([0, 0, 0, 0], 4).length == 0 and other[0] not in tree.pages()
    assert tree.match(HISTORY, 9)[:4] == (6, branch[:1], branch[1], None)


def test_what_is_locked_stays(tree, pages):
    table = compute(tree, HISTORY)
    match = tree.match([*HISTORY, 0], 10)
    lock = tree.lock(HISTORY, 8)
    for page in match.pages:
        pages.hold(page)
    tree.clear()
    assert tree.match(HISTORY, 10)[:4] == (8, table[:2], None, None)
    tree.unlock(lock)
    for page in match.pages:
        pages.release(page)
    tree.clear()
    assert tree.match(HISTORY, 10).length == 0
    assert pages.pools[0].free == 8


def test_a_lock_is_for_whole_pages_that_are_there(tree):
    compute(tree, HISTORY)
    for length in (5, 12):
        with pytest.raises(ValueError, match="whole pages"):
            tree.lock([*HISTORY, 11, 12], length)


def test_a_lock_survives_that_others_branch_off(tree, pages):
    table = compute(tree, HISTORY)
    lock = tree.lock(HISTORY, 8)
    compute(tree, [1, 2, 77])
    tree.check()
    tree.unlock(lock)
    tree.check()
    assert tree.match(HISTORY, 10).pages == table[:2]


class TestWithStates:
    """Layers that keep a state can start at a snapshot alone."""

    @pytest.fixture
    def pages(self):
        return Pages(shards=1, pages_per_shard=8, page_size=4, states=2)

    def test_a_history_is_found_to_its_snapshot(self, tree, pages):
        state = pages.states.take()
        table = compute(tree, HISTORY[:6], state=state)
        compute(tree, HISTORY, shared=table[:1])
        assert tree.match(HISTORY, 9)[:4] == (6, table[:1], tree.match(HISTORY, 9).source, state)
        assert tree.match(HISTORY, 5)[:4] == (0, [], None, None), "before its snapshot"

    def test_a_snapshot_inside_a_run_splits_it(self, tree, pages):
        first = compute(tree, HISTORY, state=pages.states.take())
        state = pages.states.take()
        compute(tree, HISTORY[:5], shared=first[:1], state=state)
        assert tree.match(HISTORY, 9)[:4] == (5, first[:1], first[1], state)

    def test_a_second_snapshot_of_the_same_tokens_is_not_kept(self, tree, pages):
        first = pages.states.take()
        compute(tree, HISTORY, state=first)
        compute(tree, HISTORY, state=pages.states.take())
        assert tree.snapshots() == [first] and pages.states.free == 1

    def test_the_longest_unused_snapshot_goes_first(self, tree, pages):
        old, new = pages.states.take(), pages.states.take()
        compute(tree, HISTORY[:4], state=old)
        compute(tree, [0, *HISTORY], state=new)
        assert tree.evict_state()
        assert tree.snapshots() == [new] and pages.states.free == 1
        assert tree.match(HISTORY[:5], 4).length == 0

    def test_a_conversation_loses_its_oldest_snapshot(self, tree, pages):
        compute(tree, HISTORY[:4], state=pages.states.take())
        compute(tree, HISTORY, state=pages.states.take())
        assert tree.evict_state()
        assert tree.match([*HISTORY, 0], 10).length == 10

    def test_a_snapshot_that_is_used_stays(self, tree, pages):
        compute(tree, HISTORY[:4], state=pages.states.take())
        compute(tree, HISTORY, state=pages.states.take())
        tree.match([*HISTORY[:4], 0], 4)
        assert tree.evict_state()
        assert tree.match([*HISTORY, 0], 10).length == 4

    def test_snapshots_go_with_their_tokens(self, tree, pages):
        compute(tree, HISTORY, state=pages.states.take())
        tree.clear()
        assert pages.states.free == 2 and tree.snapshots() == []
