# SPDX-License-Identifier: Apache-2.0
"""Conversations: what is computed, what is kept, and what a mistake does not destroy."""

import jax
import numpy as np
import pytest
from talkative import talkative_gpt

import jaxcp
from jaxcp.text.tokenizer import byte_level
from jaxcp.weights.placement import place


@pytest.fixture(scope="module")
def model():
    return talkative_gpt(160)


@pytest.fixture
def engine(model):
    return jaxcp.Engine(model, None, max_len=160)


def pages_in_use(engine):
    return sum(pool.size - pool.free for pool in engine.scheduler.pages.pools)


def say(session, ids, count=4, **options):
    return list(session.send(ids, max_new_tokens=count, **options))


def say_anew(engine, ids, count=4, **options):
    """Give what a new session says of all of it at once, computed anew."""
    engine.scheduler.tree.clear()
    session = engine.session()
    answer = say(session, ids, count, **options)
    assert session.stats.reused == 0
    return answer


PROMPT = list(range(40, 110))


def test_only_the_new_turn_is_prefilled(engine):
    session = engine.session()
    first = say(session, PROMPT)
    assert len(first) == 4 and session.stats.prefilled == 70 and session.stats.reused == 0
    assert session.stats.tokens == 70 + 3  # the last token of an answer waits for the next turn
    second = say(session, [1, 2, 3])
    stats = session.stats
    assert (stats.prefilled, stats.reused, stats.turns, stats.generated) == (1 + 3, 73, 2, 4)
    assert stats.tokens == 73 + 4 + 3
    assert stats.prefill_tokens_per_second > 0 and stats.decode_tokens_per_second > 0
    page = engine.geometry.page_size
    pages = engine.runner.pool.bytes_per_device() // engine.geometry.pages_per_shard
    assert stats.cache_bytes_per_device == -(-80 // page) * pages > 0
    # and it is as if all had been said at once
    assert say_anew(engine, [*PROMPT, *first, 1, 2, 3]) == second


def test_a_fork_copies_nothing_and_goes_its_own_way(engine):
    parent = engine.session()
    first = say(parent, PROMPT)
    before = pages_in_use(engine)
    child = parent.fork()
    grandchild = child.fork()
    assert pages_in_use(engine) == before
    said = {name: say(s, ids) for name, s, ids in (
        ("parent", parent, [5]), ("child", child, [9, 9]), ("grandchild", grandchild, [7] * 5)
    )}  # fmt: skip
    # the first of them computes the last token of the answer, for all
    assert [s.stats.reused for s in (parent, child, grandchild)] == [73, 74, 74]
    assert (parent.stats.tokens, child.stats.tokens) == (73 + 2 + 3, 73 + 3 + 3)
    assert pages_in_use(engine) == before + 2  # each has the page in which they part
    for name, ids in (("parent", [5]), ("child", [9, 9]), ("grandchild", [7] * 5)):
        assert said[name] == say_anew(engine, [*PROMPT, *first, *ids]), name
    engine.scheduler.tree.clear()
    last = say(parent, [3])
    assert parent.stats.prefilled == 73 + 2 + 3 + 2, "its pages had to go"
    assert last == say_anew(engine, parent.tokens[: -len(last)])


def test_leaving_an_answer_early(engine):
    session = engine.session()
    answer = session.send(PROMPT, max_new_tokens=50)
    seen = [next(answer), next(answer)]
    more = say(session, [8])
    assert session.stats.reused == len(PROMPT) + 1  # the second was about to be computed
    assert more == say_anew(engine, [*PROMPT, *seen, 8])
    with pytest.raises(RuntimeError, match="an answer cannot go on after a later send"):
        next(answer)
    assert say(session, [6]) == say_anew(engine, [*PROMPT, *seen, 8, *more, 6])
    assert not engine.scheduler.running and not engine.scheduler.waiting


def test_an_answer_that_was_never_read(engine):
    session = engine.session()
    unread = session.send([1] * 70, max_new_tokens=4)
    assert say(session, PROMPT) == say_anew(engine, PROMPT)
    with pytest.raises(RuntimeError, match="after a later send"):
        next(unread)


def test_stop_tokens_end_an_answer_and_are_kept(model, engine):
    free = say(engine.session(), PROMPT, 8)
    stop = free[3]
    stopping = jaxcp.Engine(model, None, max_len=160, stop_tokens=(stop,)).session()
    end = free.index(stop)
    assert say(stopping, PROMPT, 8) == free[:end]
    again = say(stopping, [2], 1)
    assert again == [
        t for t in say(engine.session(), [*PROMPT, *free[: end + 1], 2], 1) if t != stop
    ]


def test_text(model):
    tokenizer = byte_level()
    engine = jaxcp.Engine(model, tokenizer, max_len=160)
    session = engine.session()
    pieces = list(session.send("x" * 60 + "Grüße", max_new_tokens=12))
    assert all(isinstance(piece, str) for piece in pieces) and session.stats.prefilled == 67
    ids = jaxcp.Engine(model, None, max_len=160).session()
    assert "".join(pieces) == tokenizer.decode(say(ids, tokenizer.encode("x" * 60 + "Grüße"), 12))


def test_seeds(engine):
    def sampled(seed):
        options = {"temperature": 2.0, "top_k": 50, "top_p": 0.95}
        session = engine.session(seed=seed)
        return say(session, PROMPT, 8, **options) + say(session, [1], 4, **options)

    assert sampled(3) == sampled(3) != sampled(4)


def test_a_session_remembers_its_mesh(model, mesh_of):
    devices = jax.devices()[:2]
    with jax.set_mesh(jaxcp.make_mesh(seq=2, devices=devices)):
        engine = jaxcp.Engine(place(model), None, max_len=160)
    session = engine.session()
    first = say(session, PROMPT)
    pool = jax.tree.leaves(engine.runner.pool.layers)
    assert pool[0].sharding.device_set == set(devices)
    alone = jaxcp.Engine(model, None, max_len=160).session()
    assert first == say(alone, PROMPT)
    assert say(session, [1, 2]) == say(alone, [1, 2])


# Bad input


@pytest.mark.parametrize(
    "ids, options, message",
    [
        ([], {}, "the prompt is empty; send at least one token"),
        (
            [1] * 100,
            {"max_new_tokens": 200},
            r"would hold 3\d\d tokens: 74 so far, 100 of th",
        ),
        ([1] * 88, {}, "up to 4 of the answer; max_len=160. Shorten the prompt"),
        ([256], {}, r"token ids must lie in 0\.\.255; got 256\.\.256"),
        ("text", {}, "this engine has no tokenizer: give token ids"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ([1], {"temperature": -1}, "temperature must be >= 0"),
    ],
)
def test_a_mistake_changes_nothing(ids, options, message, engine):
    session = engine.session()
    first = say(session, PROMPT)
    before = session.stats
    with pytest.raises(ValueError, match=message):  # at the call, not at the first piece
        session.send(ids, **({"max_new_tokens": 4} | options))
    assert session.stats == before
    assert say(session, [2]) == say_anew(engine, [*PROMPT, *first, 2])


def test_a_pool_that_is_too_small_is_said_at_the_call(model):
    engine = jaxcp.Engine(model, None, max_len=160, pool_tokens=64)
    session = engine.session()
    with pytest.raises(ValueError, match="3 pages of 32 tokens on a shard, which has 2; ask for"):
        session.send(PROMPT, max_new_tokens=2)
    assert session.tokens == [] and len(say(session, [1, 2], 3)) == 3


def test_two_conversations_take_turns(engine):
    """One goes on while another's answer is half read; both say what they say alone."""
    one, two = engine.session(), engine.session(seed=1)
    first = one.send(PROMPT, max_new_tokens=8)
    said = [next(first)]
    other = say(two, PROMPT[::-1], 6, temperature=1.0)
    said += first
    assert said == say_anew(engine, PROMPT, 8)
    engine.scheduler.tree.clear()
    assert other == say(engine.session(seed=1), PROMPT[::-1], 6, temperature=1.0)


def test_a_session_shares_a_step_with_requests(engine):
    request = engine.add(PROMPT, jaxcp.Sampling(max_new_tokens=6))
    answer = say(engine.session(), [3, 4, 5], 8)
    assert request.done and request.answer == say_anew(engine, PROMPT, 6)
    assert answer == say_anew(engine, [3, 4, 5], 8)


def test_the_cache_can_be_filled_to_the_last_token(engine):
    session = engine.session()
    assert len(say(session, PROMPT, 160 - 70 + 1)) == 91
    assert session.stats.tokens == 160
    with pytest.raises(ValueError, match="would hold 162 tokens: 161 so far"):
        session.send([1], max_new_tokens=1)


def test_empty_text(model):
    session = jaxcp.Engine(model, byte_level(), max_len=160).session()
    with pytest.raises(ValueError, match="the prompt is empty"):
        session.send("")


def test_max_len(model):
    with pytest.raises(ValueError, match=r"max_len must be in 1\.\.160 .*; got 0"):
        jaxcp.Engine(model, None, max_len=0)
    np.testing.assert_equal(jaxcp.Engine(model, None, max_len=1).max_len, 1)
