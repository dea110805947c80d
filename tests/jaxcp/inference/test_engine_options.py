# SPDX-License-Identifier: Apache-2.0
"""Options of requests: each as a pass over the whole text has it, whatever else is in the batch."""

import dataclasses
import functools
import json
import math
import re
import string

import costs
import jax
import numpy as np
import pytest
from sampling_rules import changed
from talkative import talkative_gpt
from tiny_checkpoints import FIXTURES

import jaxcp
from jaxcp.inference.sampling import Sampler, Sampling
from jaxcp.text.tokenizer import byte_level
from jaxcp.weights.placement import place

WIDTH, COUNT = 96, 8
BYTES = byte_level()
LETTERS = {i: -100.0 for i in range(256) if chr(i) not in string.ascii_lowercase[:4]}
"""Biases under which a model says but four letters."""
OPTIONS = [
    Sampling(repetition_penalty=1.6),
    Sampling(temperature=0.9, seed=3, presence_penalty=1.5, frequency_penalty=0.5),
    Sampling(temperature=1.3, seed=2**32 - 1, min_p=0.1, logit_bias={5: 3.0, 9: -2.5}),
    Sampling(temperature=0.8, top_k=9, repetition_penalty=0.7, frequency_penalty=-1.0, logprobs=3),
    Sampling(logprobs=0),
    Sampling(temperature=1.0, top_p=0.8, seed=7),
    Sampling(frequency_penalty=2, logit_bias=LETTERS, logprobs=20),
]
OPTIONS = [dataclasses.replace(one, max_new_tokens=COUNT, stop_tokens=()) for one in OPTIONS]


@functools.cache
def alone():
    with jax.set_mesh(jaxcp.make_mesh(devices=jax.devices()[:1])):
        return talkative_gpt(WIDTH)


def logits_after(ids):
    with jax.set_mesh(jaxcp.make_mesh(devices=jax.devices()[:1])):
        row = np.pad(ids, (0, WIDTH - len(ids)))[None]
        return np.asarray(jaxcp.logits(alone(), row))[0, len(ids) - 1]


def expected(prompt, sampling):
    """`(tokens, log-probabilities [V] at each)` of the answer, by the rules."""
    tokens, every = [], []
    for _ in range(sampling.max_new_tokens):
        ids = [*prompt, *tokens]
        logits = logits_after(ids)
        every.append(jax.nn.log_softmax(logits))
        sampler = Sampler(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )
        key = jax.random.fold_in(jax.random.key(sampling.seed), len(ids) - 1)
        row = np.float32(changed(logits, prompt, tokens, sampling))
        tokens.append(int(sampler(row[None], key)[0]))
    return tokens, np.asarray(every)


def prompts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, n).tolist() for n in rng.integers(1, 50, count)]


def engine_of(**options):
    model = alone() if jax.sharding.get_abstract_mesh().empty else place(alone())
    options = {"max_len": WIDTH, "max_rows": 4, "stop_tokens": (), "max_wait": math.inf} | options
    return jaxcp.Engine(model, BYTES, **options)


@pytest.fixture(scope="module")
def engine():
    engine = engine_of(pool_tokens=1024)
    engine.warm_up()
    return engine


def answers(engine, given, options):
    """Try requests that run beside each other."""
    requests = [engine.add(*pair) for pair in zip(given, options, strict=True)]
    while not all(request.done for request in requests):
        engine.step()
    engine.scheduler.check()
    return [engine.result(request) for request in requests]


def check(result, prompt, sampling):
    tokens, every = expected(prompt, sampling)
    assert result.tokens == tokens and result.finish_reason == "length"
    if sampling.logprobs is None:
        assert result.logprobs is None
        return
    for token, one, row in zip(tokens, result.logprobs, every, strict=True):
        assert one.token == token and len(one.best) == sampling.logprobs
        np.testing.assert_allclose(one.logprob, row[token], atol=2e-5)
        ids, values = zip(*one.best, strict=True) if one.best else ((), ())
        np.testing.assert_allclose(values, np.sort(row)[::-1][: len(ids)], atol=2e-5)
        np.testing.assert_allclose(values, row[list(ids)], atol=2e-5)


def test_every_option_beside_every_other(engine):
    """Seven requests in four rows, so that rows are had by one after the other."""
    given = prompts(len(OPTIONS))
    for result, *asked in zip(answers(engine, given, OPTIONS), given, OPTIONS, strict=True):
        check(result, *asked)


def test_in_a_second_turn_all_that_was_said_before_is_the_prompt(engine):
    given, options = prompts(len(OPTIONS), seed=4), OPTIONS[::-1]
    first = answers(engine, given, options)
    turns = [[*ids, *one.tokens, 1, 2] for ids, one in zip(given, first, strict=True)]
    for result, *asked in zip(answers(engine, turns, options), turns, options, strict=True):
        check(result, *asked)
        assert result.stats.reused == len(asked[0]) - 3


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"seq": 2}, {"seq": 2, "model": 2}], ids=str)
def test_on_a_mesh(axes, mesh_of):
    """And nothing is compiled there for an option either."""
    mesh_of(**axes)
    engine, given = engine_of(), prompts(len(OPTIONS), seed=1)
    engine.warm_up()
    warm = len(costs.compiled)
    results = answers(engine, given, OPTIONS)
    (schema,) = engine.generate([given[0]], Sampling(max_new_tokens=70, json_schema=SCHEMA))
    assert len(costs.compiled) == warm and is_valid(schema.text)
    for result, *asked in zip(results, given, OPTIONS, strict=True):
        check(result, *asked)


@pytest.mark.slow
def test_who_loses_its_pages_goes_on_as_it_began(engine):
    """The pool is full when the oldest grows: the others, one with a grammar, compute anew."""
    small = engine_of(pool_tokens=96)
    small.scheduler.limits = dataclasses.replace(small.scheduler.limits, overcommit=4.0)
    grammar = Sampling(max_new_tokens=50, temperature=1.0, seed=8, regex="[a-z]{40}", stop=["zzz"])
    first, second = (dataclasses.replace(OPTIONS[i], max_new_tokens=40) for i in (0, 3))
    given, options = [ids[:20] for ids in prompts(3, seed=2)], [first, second, grammar]
    results = answers(small, given, options)
    for i in (0, 1):
        check(results[i], given[i], options[i])
    (alone,) = answers(engine, given[2:], [grammar])
    assert results[2].tokens == alone.tokens and results[2].text == alone.text
    assert all(result.stats.preempted for result in results[1:])


def test_a_stop_string_ends_the_text_and_leaves_the_tokens(engine):
    sampling = Sampling(
        max_new_tokens=40, temperature=3.0, seed=1, stop_tokens=(), logit_bias=LETTERS
    )
    (whole,) = engine.generate(["a"], sampling)
    assert set(whole.text) <= set("abcd") and len(whole.text) == 40
    for stop in (whole.text[20:23], whole.text[7], "zz", whole.text[38:] + "z"):
        (found,) = engine.generate(["a"], dataclasses.replace(sampling, stop=[stop, "xyz"]))
        end = whole.text.find(stop)
        if end < 0:
            assert (found.text, found.tokens, found.finish_reason) == (
                whole.text, whole.tokens, "length",
            )  # fmt: skip
        else:
            assert found.text == whole.text[:end] and found.finish_reason == "stop"
            assert found.tokens == whole.tokens[: end + len(stop)]
    last = dataclasses.replace(sampling, stop=[whole.text[30:]])
    (found,) = engine.generate(["a"], last)  # complete with the last token that was asked for
    assert (found.text, found.finish_reason) == (whole.text[:30], "stop")
    engine.scheduler.check()


def test_a_text_grows_without_what_may_be_a_stop_string(engine):
    sampling = Sampling(max_new_tokens=12, logit_bias={97: 100.0}, stop=["aaab"])
    request = engine.add("x", sampling)
    seen = []
    while not request.done:
        engine.step()
        seen.append(engine.result(request).text)
    assert seen[-2:] == ["a" * 8, "a" * 12]
    cancelled = engine.add("x", sampling)
    for _ in range(3):
        engine.step()
    engine.cancel(cancelled)
    assert engine.result(cancelled).text == "a" * len(cancelled.answer)


def test_answers_of_one_prompt_share_its_pages(engine):
    (ids,) = prompts(1, seed=9)
    ids = [*ids, *range(40)]
    several = Sampling(max_new_tokens=5, temperature=1.5, seed=2**32 - 2, n=3)
    results = engine.generate([ids, [7], ids[:9]], several)
    assert len(results) == 9
    for prompt, three in zip(
        (ids, [7], ids[:9]), (results[:3], results[3:6], results[6:]), strict=True
    ):
        each = [engine.generate([prompt], one)[0] for one in several.each()]
        assert [one.tokens for one in three] == [one.tokens for one in each]
    assert [one.seed for one in several.each()] == [2**32 - 2, 2**32 - 1, 0]
    assert [one.stats.reused for one in results[1:3]] == [len(ids) - 1] * 2
    with pytest.raises(ValueError, match=r"not n=3: take each of `sampling\.each\(\)`"):
        engine.add(ids, several)
    requests = engine.requests(ids, several)
    for request in requests:
        engine.queue(request)
    while not all(request.done for request in requests):
        engine.step()
    assert [request.answer for request in requests] == [one.tokens for one in results[:3]]
    with pytest.raises(ValueError, match="added once"):
        engine.queue(requests[0])
    first, second = engine.generate([ids], Sampling(max_new_tokens=2, n=2))
    assert first.tokens == second.tokens  # greedy: seeds are nothing to it


@pytest.mark.slow
def test_answers_share_a_prompt_where_layers_keep_states():
    """A snapshot lies before the prompt's last token, whose logits everybody needs."""
    model, _ = jaxcp.load(FIXTURES / "gpt-oss-tiny")
    engine = jaxcp.Engine(model, None, max_len=200, max_rows=4, stop_tokens=())
    ids = np.random.default_rng(0).integers(0, 256, 150).tolist()
    several = Sampling(max_new_tokens=6, temperature=1.0, seed=4, n=3, repetition_penalty=1.2)
    results = engine.generate([ids], several)
    assert [one.stats.reused for one in results] == [0, 149, 149]
    for one, sampling in zip(results, several.each(), strict=True):
        alone = jaxcp.Engine(model, None, max_len=200, max_rows=4, stop_tokens=())
        assert alone.generate([ids], sampling)[0].tokens == one.tokens
    engine.scheduler.check()


def test_a_conversation_has_the_same_options(engine):
    options = {"max_new_tokens": 20, "temperature": 3.0, "logit_bias": LETTERS, "min_p": 0.01}
    (whole,) = engine.generate(["a"], Sampling(seed=1, frequency_penalty=0.5, **options))
    stop, session = whole.text[8:10], engine.session(seed=1)
    said = "".join(session.send("a", frequency_penalty=0.5, stop=[stop], **options))
    assert said == whole.text[: whole.text.index(stop)]
    said = "".join(session.send("b", regex="(ab|cd){3}", **options))
    assert re.fullmatch("(ab|cd){3}", said)
    with pytest.raises(ValueError, match="not n=2"):
        session.send("c", n=2, max_new_tokens=2)
    engine.scheduler.check()


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["né", "日本", "x"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "count", "tags"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


def is_valid(text):
    value = json.loads(text)
    assert set(value) == {"name", "count", "tags"}
    assert value["name"] in SCHEMA["properties"]["name"]["enum"]
    assert type(value["count"]) is int and 0 <= value["count"] <= 99
    assert len(value["tags"]) <= 2 and all(type(tag) is bool for tag in value["tags"])
    return True


def test_answers_follow_their_grammars_beside_others_that_have_none(engine):
    each = Sampling(max_new_tokens=70, temperature=1.5)
    options = [
        dataclasses.replace(each, json_schema=SCHEMA, temperature=0.0),
        dataclasses.replace(each, json_schema=json.dumps(SCHEMA), seed=5, logprobs=1),
        dataclasses.replace(each, regex="(ab|cd){2}e", repetition_penalty=1.5),
        dataclasses.replace(each, grammar='start: "x" /[0-9]{3}/ "y"', logit_bias={49: 50}),
        OPTIONS[1],
        dataclasses.replace(each, json_schema=SCHEMA, seed=6),
    ]
    given = prompts(len(options), seed=3)
    given = [ids[:20] for ids in given]
    results = answers(engine, given, options)
    for result in (results[0], results[1], results[5]):
        assert is_valid(result.text) and result.finish_reason == "stop"
    assert results[2].text in {a + b + "e" for a in ("ab", "cd") for b in ("ab", "cd")}
    assert results[3].text == "x111y" and results[3].finish_reason == "stop"
    check(results[4], given[4], options[4])
    assert len(results[1].logprobs) == len(results[1].tokens)
    for result, *asked in zip(results, given, options, strict=True):
        assert answers(engine, [asked[0]], [asked[1]])[0].tokens == result.tokens


def test_a_grammar_may_end_at_a_stop_token_where_it_may_end(engine):
    stop = ord("!")
    asked = Sampling(max_new_tokens=9, regex="ab*", stop_tokens=[stop], logit_bias={stop: 100})
    (result,) = engine.generate([[1]], asked)
    assert (result.text, result.finish_reason) == ("a", "stop")
    (result,) = engine.generate([[1]], dataclasses.replace(asked, stop_tokens=[]))
    assert (result.text, result.finish_reason) == ("abbbbbbbb", "length")
    beside = engine.add([2], OPTIONS[0])
    with pytest.raises(ValueError, match="no token that is not a stop token goes on"):
        engine.generate([[1]], Sampling(max_new_tokens=9, regex="xa", stop_tokens=[97]))
    while not beside.done:
        engine.step()
    check(engine.result(beside), [2], OPTIONS[0])
    engine.scheduler.check()


def test_what_this_engine_cannot_honour_is_refused(engine):
    with pytest.raises(
        ValueError, match=r"logit_bias: token ids must lie in 0\.\.255; got 3\.\.256"
    ):
        engine.add([1], Sampling(logit_bias={256: 1.0, 3: 1.0}))
    in_ids = jaxcp.Engine(engine.model, None, max_len=8)
    for options in ({"stop": ["a"]}, {"regex": "a"}):
        with pytest.raises(ValueError, match="this engine has no tokenizer"):
            in_ids.add([1], Sampling(**options))
    for options in ({"stop": "ab"}, {"stop": [""]}, {"n": 0}, {"n": 1.0}, {"logprobs": 21},
                    {"logprobs": -1}, {"logprobs": True}):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{next(iter(options))}"):
            Sampling(**options)
    assert not engine.scheduler.waiting and not engine.scheduler.running


def test_nothing_is_compiled_for_an_option(engine):
    """After warming up: this test asks for all of them once more, in other rows."""
    given = prompts(len(OPTIONS), seed=5)
    warm = len(costs.compiled)
    answers(engine, given[::-1], OPTIONS)
    engine.generate(given, Sampling(max_new_tokens=4, n=2, stop=["a"], logprobs=2))
    assert len(costs.compiled) == warm
