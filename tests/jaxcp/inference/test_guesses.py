# SPDX-License-Identifier: Apache-2.0
"""Guessed tokens: an answer with them is the answer without, whatever else is asked for."""

import functools
import math
from array import array

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from slow import slow_but
from tiny_checkpoints import FIXTURES

import jaxcp
from jaxcp import Sampling
from jaxcp.inference import guesses
from jaxcp.inference.guesses import RUNS, Guesses, followers
from jaxcp.layers.stack import Layers

FULL, WINDOWS = "qwen3-moe-tiny", "hy3-tiny"
LATENTS, SELECTED, BLOCKS = "deepseek-v3-tiny", "deepseek-v32-tiny", "deepseek-v4-tiny"
DELTA, DELTA_MOE, KIMI = "qwen3-next-tiny", "qwen3-5-moe-tiny", "kimi-linear-tiny"


def slow_followers(tokens, most):
    for run in RUNS:
        for at in range(len(tokens) - run - 1, -1, -1):
            if tokens[at : at + run] == tokens[-run:]:
                return tokens[at + run : at + run + most]
    return []


@given(st.lists(st.sampled_from([0, 1, 2, 256, 65_536]), max_size=40), st.integers(1, 7))
def test_what_followed_is_found_at_its_latest_place(tokens, most):
    """Ids whose bytes look alike at other offsets are not taken for each other."""
    assert followers(array("i", tokens), most) == slow_followers(tokens, most)


def test_guesses_that_are_wrong_come_less_often():
    of_request, text = Guesses(7), array("i", [*range(8)] * 5)
    asked = []
    for step in range(100):
        if of_request.make(text):
            asked.append(step)
        of_request.learn(len(of_request.tokens), 0, 1)
    assert asked[0] == 0 and len(asked) <= 7
    while not of_request.make(text):
        of_request.learn(0, 0, 1)
        assert not of_request.tokens
    lengths = []
    for _ in range(3):
        lengths.append(of_request.make(text))
        right = len(of_request.tokens)
        of_request.learn(right, right, 1 + right)
    assert lengths == [2, 4, 7]


def prompts(model):
    """Text that repeats itself, so that there is something to guess, and some that does not."""
    rng = np.random.default_rng(0)
    vocab = model.config.vocab_size
    words = [rng.integers(0, vocab, n).tolist() for n in (3, 5, 4)]
    repeated = [token for i in (0, 1, 0, 2, 1, 0, 1, 2, 0) for token in words[i]]
    return [repeated, rng.integers(0, vocab, 70).tolist(), repeated[:9] * 3]


OPTIONS = {
    "greedy": Sampling(max_new_tokens=24),
    "sampled": Sampling(max_new_tokens=24, temperature=0.3, top_k=3, seed=5),
    "penalties": Sampling(
        max_new_tokens=24, temperature=0.5, top_k=4, repetition_penalty=1.1, frequency_penalty=0.2
    ),
    "logprobs": Sampling(max_new_tokens=24, logprobs=2),
}


@functools.cache
def plain(name):
    """The results without guesses on one device, by the name of the options."""
    with jax.set_mesh(jaxcp.make_mesh(devices=jax.devices()[:1])):
        engine = engine_of(name)
        return {
            option: engine.generate(prompts(engine.model), sampling)
            for option, sampling in OPTIONS.items()
        }


def oracle(texts):
    """Guesses of what comes in one of `texts`, every third one wrong from some place on."""

    def followers(tokens, most):
        known = tokens.tolist()
        text = next((x for x in texts if x[: len(known)] == known), None)
        if text is None:
            return []
        guess = text[len(known) : len(known) + most]
        if len(known) % 3 == 0 and guess:
            guess[len(known) // 3 % len(guess)] ^= 1
        return guess

    return followers


def engine_of(name, **options):
    model, _ = jaxcp.load(FIXTURES / name)
    if name == BLOCKS:  # one layer of each kind
        model.layers = Layers(model.layers[:3])
    return jaxcp.Engine(
        model, None, max_len=160, max_rows=4, stop_tokens=(), max_wait=math.inf, **options
    )


@pytest.mark.parametrize(
    ("name", "axes"),
    slow_but(
        [
            (FULL, {}),
            (WINDOWS, {"seq": 3}),
            (WINDOWS, {}),
            (LATENTS, {"seq": 2}),
            (SELECTED, {}),
            (BLOCKS, {"seq": 2}),
            (FULL, {"seq": 4, "model": 2}),
            (DELTA, {}),
            (DELTA, {"seq": 3}),
            (DELTA_MOE, {"seq": 2, "expert": 2}),
            (KIMI, {}),
            (KIMI, {"seq": 2, "model": 2}),
        ],
        lambda case: case == (WINDOWS, {}),
    ),
)
def test_an_answer_is_the_one_without_guesses(name, axes, mesh_of, monkeypatch):
    """Guess right and wrong, from each place on."""
    if axes:
        mesh_of(**axes)
    engine = engine_of(name, drafts=7)
    drafted, accepted = 0, 0
    for option, sampling in OPTIONS.items():
        texts = [
            ids + result.tokens
            for ids, result in zip(prompts(engine.model), plain(name)[option], strict=True)
        ]
        monkeypatch.setattr(guesses, "followers", oracle(texts))
        results = engine.generate(prompts(engine.model), sampling)
        for result, expected in zip(results, plain(name)[option], strict=True):
            assert result.tokens == expected.tokens, option
            for one, other in zip(result.logprobs or (), expected.logprobs or (), strict=True):
                assert one.token == other.token and abs(one.logprob - other.logprob) < 1e-4
            assert result.finish_reason == "length" and len(result.stats.token_times) == 24
            drafted += result.stats.drafted
            accepted += result.stats.accepted
    assert 80 < accepted < drafted - 20
    engine.scheduler.check()
    assert engine.scheduler.pages.states.held == 0


@pytest.mark.parametrize("name", slow_but([WINDOWS, DELTA, KIMI], lambda name: name == WINDOWS))
def test_a_next_turn_after_guesses_and_a_stop(name, monkeypatch):
    """States are those after the tokens that count: of a window too, which wrong guesses wrote."""
    engine = engine_of(name, drafts=7)
    ids = prompts(engine.model)[0]
    answer = plain(name)["greedy"][0].tokens
    monkeypatch.setattr(guesses, "followers", oracle([ids + answer]))
    stop = answer[-1]
    sampling = Sampling(max_new_tokens=24, stop_tokens=(stop,))
    (result,) = engine.generate([ids], sampling)
    assert result.tokens == answer[: answer.index(stop)] and result.finish_reason == "stop"
    turn = [*ids, *result.tokens, 1, 2, 3]
    assert result.stats.accepted > 0
    (later,) = engine.generate([turn], Sampling(max_new_tokens=8))
    alone = engine_of(name)
    assert later.tokens == alone.generate([turn], Sampling(max_new_tokens=8))[0].tokens
    assert later.stats.reused >= len(ids)


@pytest.mark.slow
def test_a_conversation_with_guesses_beside_requests():
    engine, alone = engine_of(FULL, drafts=7), engine_of(FULL)
    ids = prompts(engine.model)[0]
    request = engine.add(prompts(engine.model)[1], Sampling(max_new_tokens=16, temperature=1.0))
    session, other = engine.session(), alone.session()
    for turn in (ids, [1, 2, 3], ids):
        said = list(session.send(turn, max_new_tokens=12))
        assert said == list(other.send(turn, max_new_tokens=12))
    (expected,) = alone.generate(
        [prompts(engine.model)[1]], Sampling(max_new_tokens=16, temperature=1.0)
    )
    assert request.answer == expected.tokens


@pytest.mark.slow
def test_sampled_tokens_are_distributed_as_without_guesses(monkeypatch):
    """Chi-square over the answers of many seeds, each step with the likeliest tokens as guesses."""
    engine, alone = engine_of(FULL, drafts=3), engine_of(FULL)
    ids = [7, 8, 9, 10, 7, 8, 9, 10, 7, 8]
    (likely,) = alone.generate([ids], Sampling(max_new_tokens=8))
    monkeypatch.setattr(guesses, "followers", lambda tokens, most: likely.tokens[:most])
    counts = []
    for one, first in ((engine, 0), (alone, 1000)):
        sampling = [
            Sampling(max_new_tokens=3, temperature=1.0, top_k=3, seed=first + i) for i in range(300)
        ]
        requests = [one.add(ids, options) for options in sampling]
        while not all(request.done for request in requests):
            one.step()
        assert one is alone or sum(request.stats.accepted for request in requests) > 50
        counts.append(np.unique([r.answer[2] for r in requests], return_counts=True))
    seen = sorted({*counts[0][0].tolist(), *counts[1][0].tolist()})
    table = np.array(
        [[dict(zip(*(x.tolist() for x in c), strict=True)).get(t, 0) for t in seen] for c in counts]
    )
    table = table[:, table.sum(0) >= 10]
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    statistic, degrees = ((table - expected) ** 2 / expected).sum(), table.shape[1] - 1
    assert degrees >= 1 and statistic < degrees + 4 * np.sqrt(2 * degrees)


def test_guesses_that_cannot_be_are_refused():
    for drafts in (-1, 8, 1.5):
        with pytest.raises(ValueError, match="drafts must be"):
            engine_of(FULL, drafts=drafts)


def test_the_number_of_programs_is_bounded():
    model, _ = jaxcp.load(FIXTURES / WINDOWS)
    engine = jaxcp.Engine(model, None, max_len=10**5, max_rows=16, drafts=7, pool_tokens=64)
    assert len(engine.runner.sizes) + 2 * len(engine.geometry.row_sizes) + 2 <= 12
