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


def buffers(session):
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(session.cache.layers)]


def say(session, ids, count=4, **options):
    return list(session.send(ids, max_new_tokens=count, **options))


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
    assert stats.cache_bytes_per_device == session.cache.bytes_per_device() > 0
    # and it is as if all had been said at once
    assert say(engine.session(), [*PROMPT, *first, 1, 2, 3]) == second


def test_a_fork_copies_nothing_and_goes_its_own_way(engine):
    parent = engine.session()
    first = say(parent, PROMPT)
    shared = buffers(parent)
    child = parent.fork()
    grandchild = child.fork()
    assert buffers(child) == buffers(grandchild) == shared
    said = {name: say(s, ids) for name, s, ids in (
        ("parent", parent, [5]), ("child", child, [9, 9]), ("grandchild", grandchild, [7] * 5)
    )}  # fmt: skip
    assert len({*buffers(parent), *buffers(child), *buffers(grandchild)}) == 3 * len(shared)
    for name, ids in (("parent", [5]), ("child", [9, 9]), ("grandchild", [7] * 5)):
        assert said[name] == say(engine.session(), [*PROMPT, *first, *ids]), name
    assert (parent.stats.tokens, child.stats.tokens) == (73 + 2 + 3, 73 + 3 + 3)
    kept = buffers(parent)
    say(parent, [3])
    assert buffers(parent) == kept  # alone again, it writes in place


def test_leaving_an_answer_early(engine):
    session = engine.session()
    answer = session.send(PROMPT, max_new_tokens=50)
    seen = [next(answer), next(answer)]
    more = say(session, [8])
    assert more == say(engine.session(), [*PROMPT, *seen, 8])
    with pytest.raises(RuntimeError, match="an answer cannot go on after a later send"):
        next(answer)
    assert say(session, [6]) == say(engine.session(), [*PROMPT, *seen, 8, *more, 6])


def test_an_answer_that_was_never_read(engine):
    session = engine.session()
    unread = session.send([1] * 70, max_new_tokens=4)
    assert say(session, PROMPT) == say(engine.session(), PROMPT)
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
    assert jax.tree.leaves(session.cache.layers)[0].sharding.device_set == set(devices)
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
            r"would hold 3\d\d tokens: 73 in the cache, 100 of th",
        ),
        ([1] * 88, {}, "up to 4 of the answer; max_len=160. Shorten the prompt"),
        ([256], {}, r"token ids must lie in 0\.\.255; got 256\.\.256"),
        ("text", {}, "this engine has no tokenizer: send token ids"),
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
    assert say(session, [2]) == say(engine.session(), [*PROMPT, *first, 2])


def test_the_cache_can_be_filled_to_the_last_token(engine):
    session = engine.session()
    assert len(say(session, PROMPT, 160 - 70 + 1)) == 91
    assert session.stats.tokens == 160
    with pytest.raises(ValueError, match="would hold 162 tokens: 160 in the cache"):
        session.send([1], max_new_tokens=1)


def test_empty_text(model):
    session = jaxcp.Engine(model, byte_level(), max_len=160).session()
    with pytest.raises(ValueError, match="the prompt is empty"):
        session.send("")


def test_max_len(model):
    with pytest.raises(ValueError, match=r"max_len must be in 1\.\.160 .*; got 0"):
        jaxcp.Engine(model, None, max_len=0)
    np.testing.assert_equal(jaxcp.Engine(model, None, max_len=1).max_len, 1)
