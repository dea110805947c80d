# SPDX-License-Identifier: Apache-2.0
"""Pages are free, held by rows or kept by the tree, and the counts say how many of each."""

import pytest

from jaxcp.inference.pages import Pages, Stock


def counts(pool):
    return pool.free, pool.evictable, pool.held


def test_a_page_lives_until_nobody_has_it():
    pool = Stock(2)
    number = pool.take()
    assert counts(pool) == (1, 0, 1)
    pool.hold(number)  # a second row shares it
    pool.release(number)
    assert counts(pool) == (1, 0, 1)
    pool.keep(number)  # a row has put it into the tree
    assert counts(pool) == (1, 0, 1)
    pool.release(number)
    assert counts(pool) == (1, 1, 0)
    pool.hold(number)  # the next turn finds it there
    assert counts(pool) == (1, 0, 1)
    pool.drop(number)  # evicted under a row: the row still has it
    assert counts(pool) == (1, 0, 1)
    pool.release(number)
    assert counts(pool) == (2, 0, 0)


def test_an_empty_pool_gives_nothing():
    pool = Stock(1)
    assert pool.take() == 0
    assert pool.take() is None


@pytest.mark.parametrize("wrong", ["hold", "release", "keep", "drop"])
def test_what_is_free_cannot_be_given_back_or_shared(wrong):
    pool = Stock(1)
    pool.release(pool.take())
    with pytest.raises(ValueError, match="number 0 of this pool is"):
        getattr(pool, wrong)(0)
    assert counts(pool) == (1, 0, 0)


def test_a_page_is_kept_once():
    pool = Stock(1)
    pool.keep(pool.take())
    with pytest.raises(ValueError, match="in the tree already"):
        pool.keep(0)


def test_the_places_of_a_row_go_round_the_shards():
    pages = Pages(shards=3, pages_per_shard=4, page_size=8)
    table = [pages.take(place) for place in range(7)]
    assert [page // 4 for page in table] == [0, 1, 2, 0, 1, 2, 0]
    assert [pool.held for pool in pages.pools] == [3, 2, 2]
    assert [pages.on_shard(7, shard) for shard in range(3)] == [3, 2, 2]
    pages.check(table, [])


def test_a_full_shard_says_so_though_others_have_room():
    pages = Pages(shards=2, pages_per_shard=1, page_size=8)
    assert pages.take(0) is not None
    assert pages.take(2) is None
    assert pages.take(1) is not None


@pytest.mark.parametrize("tokens, places", [(0, 0), (1, 1), (8, 1), (9, 2)])
def test_a_page_is_begun_with_its_first_token(tokens, places):
    assert Pages(shards=2, pages_per_shard=1, page_size=8).places(tokens) == places


@pytest.mark.parametrize("holders, keepers", [([], []), ([0, 0], []), ([0], [0]), ([0, 1], [])])
def test_check_finds_who_miscounts(holders, keepers):
    pages = Pages(shards=1, pages_per_shard=2, page_size=8)
    page = pages.take(0)
    pages.check([page], [])
    with pytest.raises(AssertionError):
        pages.check(holders, keepers)


@pytest.mark.parametrize("name", ["shards", "pages_per_shard", "page_size", "states"])
def test_a_pool_of_nothing_is_refused(name):
    sizes = {"shards": 1, "pages_per_shard": 1, "page_size": 1, "states": 0}
    with pytest.raises(ValueError, match=f"{name}=-1"):
        Pages(**(sizes | {name: -1}))
