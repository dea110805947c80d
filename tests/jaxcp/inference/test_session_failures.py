# SPDX-License-Identifier: Apache-2.0
"""A turn that fails, wherever it does, leaves a conversation that goes on as if it had not been."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from talkative import talkative_gpt
from tiny_checkpoints import FIXTURES

import jaxcp
from jaxcp.context_parallel import Halo
from jaxcp.inference.runner import Runner, Tokens
from jaxcp.text.tokenizer import byte_level
from jaxcp.weights.placement import place

SAMPLED = {"temperature": 2.0, "top_p": 0.9, "max_new_tokens": 3}


@pytest.fixture(scope="module")
def model():
    return talkative_gpt(64)


@pytest.fixture
def engine(model):
    return jaxcp.Engine(model, None, max_len=64)


def say(session, ids, **options):
    return list(session.send(ids, **(SAMPLED | options)))


def say_later(session):
    """An answer of one token that nobody has read yet; a later `send` would forbid to."""
    return session.send([1], max_new_tokens=1)


class Failure(BaseException):
    """A failure that, like KeyboardInterrupt, is no Exception."""


def failing(fn, *, on=0, after=False):
    """`fn`, whose call number `on` raises: before it has run, or after."""
    calls = iter(range(99))

    def wrapped(*args, **options):
        fails = next(calls) == on
        if fails and not after:
            raise Failure
        found = fn(*args, **options)
        if fails:
            jax.block_until_ready(found)
            raise Failure
        return found

    return wrapped


STEPS = {"sent": (Runner, "run"), "read": (Tokens, "read")}


@pytest.mark.parametrize("shared", [False, True], ids=["", "fork"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", STEPS)
def test_a_turn_that_fails_at_its_first_token_was_not(name, after, shared, engine, monkeypatch):
    session, other = engine.session(seed=3), engine.session(seed=3)
    first = say(session, [1, 2])
    assert say(other, [1, 2]) == first
    before, same = session.stats, session.stats.__dict__ | {}
    parent, session = session, session.fork() if shared else session
    with monkeypatch.context() as patch:
        patch.setattr(*STEPS[name], failing(getattr(*STEPS[name]), after=after))
        with pytest.raises(Failure):
            say(session, [7, 8, 9])
    assert vars(session.stats) == same and parent.stats is before
    assert say(session, [3]) == say(other, [3])
    assert session.stats.reused == 0, "the pool may have gone with the step"
    assert session.stats.tokens == other.stats.tokens
    if shared:
        assert len(say(parent, [4])) == 3


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name, on", [("sent", 3), ("read", 2)])
def test_a_turn_that_fails_later_holds_what_was_yielded(name, after, on, engine, monkeypatch):
    session, other = engine.session(), engine.session()
    answer, seen = session.send([1, 2], max_new_tokens=4), []
    with monkeypatch.context() as patch:
        patch.setattr(*STEPS[name], failing(getattr(*STEPS[name]), after=after, on=on))
        with pytest.raises(Failure):
            seen.extend(answer)  # one by one
    assert len(seen) == 2 and session.stats.generated == 2
    assert say(session, [3], temperature=0) == say(other, [1, 2, *seen, 3], temperature=0)
    assert session.stats.tokens == other.stats.tokens
    assert session.tokens == other.tokens and len(session.tokens) == session.stats.tokens + 1


def test_an_error_of_the_tokenizer(model, monkeypatch):
    tokenizer = byte_level()
    session = jaxcp.Engine(model, tokenizer, max_len=64).session()
    taken = []

    def stream(ids, stop):
        for i in ids:
            taken.append(i)
            if len(taken) == 2:
                raise UnicodeError("a byte that it does not know")
            yield "x"

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "stream", stream)
        with pytest.raises(UnicodeError):
            list(session.send("ab", max_new_tokens=9))
    other = jaxcp.Engine(model, None, max_len=64).session()
    assert session.tokens == [97, 98, *taken]
    answer = "".join(session.send("c", max_new_tokens=3))
    ids = say(other, [97, 98, *taken, 99], temperature=0)
    assert answer == tokenizer.decode(ids)


def test_sampling_on_a_mesh(model, engine, mesh_of):
    expected = say(alone := engine.session(seed=1), [1, 2, 3]) + say(alone, [4], top_k=9)
    mesh_of(seq=2)
    session = jaxcp.Engine(place(model), None, max_len=64).session(seed=1)
    assert say(session, [1, 2, 3]) + say(session, [4], top_k=9) == expected


# What is refused, where it is said


NO_IDS = (
    [1.9], ["12"], [True], [1, True], [None], [[1], [2, 3]], b"hi", bytearray(b"hi"), {1, 2}, None,
    np.array([2.7]), np.array([1], bool), np.array([1], object), np.array([], np.float32),
    jnp.array([1.0]), [2**64], [2**32 + 5], [-1], 5, [[1, 2]],
)  # fmt: skip


@pytest.mark.parametrize("ids", NO_IDS, ids=repr)
def test_what_is_no_prompt(ids, engine):
    session, cache = engine.session(), engine.model.init_cache(1, 64)
    answer = say_later(session)
    with pytest.raises(ValueError, match="ids"):
        session.send(ids)
    assert len(list(answer)) == 1
    for step in (
        lambda: jaxcp.logits(engine.model, [ids]),
        lambda: jaxcp.prefill(engine.model, cache, [ids]),
        lambda: jaxcp.decode_step(engine.model, cache, ids),
    ):
        with pytest.raises(ValueError, match=r"token ids must|must be \["):
            step()


def test_integers_of_every_width_are_ids(engine):
    expected = say(engine.session(), [1, 2])
    for ids in (np.array([1, 2], np.uint64), np.array([1, 2], np.uint8), jnp.array([1, 2]),
                (np.int16(1), 2), iter([1, 2])):  # fmt: skip
        assert say(engine.session(), ids) == expected


@pytest.mark.parametrize("lengths", [[1.9], [True], ["1"], [2**32 + 1], [None], 1, [[1]]], ids=repr)
def test_what_is_no_length(lengths, engine):
    cache = engine.model.init_cache(1, 64)
    with pytest.raises(ValueError, match="lengths must be"):
        jaxcp.prefill(engine.model, cache, [[1, 2]], lengths=lengths)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": 2.0}, "max_new_tokens must be an integer; got 2.0"),
        ({"max_new_tokens": True}, "max_new_tokens must be an integer; got True"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_p": float("nan"), "temperature": 1.0}, "top_p must be"),
        ({"top_k": 2.0, "temperature": 1.0}, "top_k must be"),
    ],
)
def test_what_is_no_option_of_a_turn(options, message, engine):
    session = engine.session()
    answer = say_later(session)
    with pytest.raises(ValueError, match=message):
        session.send([1], **options)
    assert len(list(answer)) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stop_tokens": 5}, r"stop_tokens must be ids, such as \(2,\) or \(\) for none; got 5"),
        ({"stop_tokens": (1.5,)}, "stop_tokens: token ids must be integers"),
        ({"stop_tokens": "5"}, "stop_tokens: token ids must be integers; got str"),
        ({"stop_tokens": (256,)}, r"stop_tokens: token ids must lie in 0\.\.255"),
        ({"max_len": 9.5}, "max_len must be an integer; got 9.5"),
        (
            {"strategy": "ring"},
            r"strategy must be one, such as jaxcp\.Ring\(\); got 'ring'",
        ),
    ],
)
def test_what_is_no_option_of_an_engine(options, message, model):
    with pytest.raises(ValueError, match=message):
        jaxcp.Engine(model, None, **({"max_len": 64} | options))


def test_seeds_are_not_cut(engine):
    for seed in (2**32, -1, 1.5, True):
        with pytest.raises(ValueError, match="seed must be"):
            engine.session(seed=seed)


@pytest.mark.parametrize(
    "strategy, axes, error, message",
    [
        (jaxcp.FixedOrder(), {}, NotImplementedError, "no reproducible form"),
        (jaxcp.FixedOrder(), None, NotImplementedError, "no reproducible form"),
        (Halo(), {"seq": 2}, NotImplementedError, "Halo needs a window"),
        (jaxcp.Ulysses(), {"seq": 4}, ValueError, "needs a multiple of 4 query heads"),
        (jaxcp.USP(ulysses=4), {"seq": 2}, ValueError, "ulysses=4 does not divide the 2 shards"),
        (jaxcp.Ring(fused=True), {"seq": 2}, NotImplementedError, "remote DMA of TPUs"),
    ],
)
def test_a_strategy_that_cannot_is_refused_by_the_engine(
    strategy, axes, error, message, model, mesh_of
):
    if axes is not None:
        mesh_of(**axes)
    with pytest.raises(error, match=message):
        jaxcp.Engine(place(model), None, max_len=64, strategy=strategy)


def test_a_strategy_that_a_family_cannot_use(mesh_of):
    """Of a compressed cache too, whose new tokens have no heads to send."""
    mesh_of(seq=2)
    model, _ = jaxcp.load(FIXTURES / "deepseek-v4-tiny")
    with pytest.raises(NotImplementedError, match="which a latent has none of"):
        jaxcp.Engine(model, None, max_len=64, strategy=jaxcp.Ulysses())


def test_rows_that_the_mesh_does_not_divide(model, mesh_of):
    mesh_of(data=2)
    placed = place(model)
    v4 = jaxcp.abstract_model(jaxcp.load_config(FIXTURES / "deepseek-v4-tiny"))
    v3 = jaxcp.abstract_model(jaxcp.load_config(FIXTURES / "deepseek-v3-tiny"))
    for make in (
        lambda: placed.init_cache(3, 64),
        lambda: jaxcp.logits(placed, [[1, 2]]),
        lambda: v4.init_cache(1, 64),
        lambda: v3.init_cache(1, 64),
    ):
        with pytest.raises(ValueError, match="rows must be a multiple of the mesh's data=2; got"):
            make()
    with pytest.raises(ValueError, match=r"batch_size >= 1 and max_len >= 1; got 2\.0 and 64"):
        placed.init_cache(2.0, 64)
