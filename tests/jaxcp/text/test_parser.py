# SPDX-License-Identifier: Apache-2.0
"""An answer is read right, in any pieces, and whatever a model writes is read without an error."""

import functools
import json
import random
import re

import pytest
from chat_folders import MODELS, SPELLED, tokenizer_of
from conversations import TOOLS, as_sent, called, joined, text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxcp.text.tools.deltas import joined as together

USER = {"role": "user", "content": "Hi"}
THINKING = {"gpt-oss": "low"}
ALL = (*MODELS, *SPELLED)
NAMES = {tool["function"]["name"] for tool in TOOLS}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parser")
    return {model: tokenizer_of(folder / model, model) for model in ALL}


@functools.cache
def prompt_of(tokenizer, model):
    return tokenizer.chat.prompt([USER], TOOLS, THINKING.get(model, "high"))


def parser_of(tokenizer, model):
    return prompt_of(tokenizer, model).parser()


@functools.cache
def written(tokenizer, model, seed):
    """An answer with calls as the publisher's template writes it, and what it says."""
    chance = random.Random(seed)
    message, *results = joined(called(chance, False, 1 if model == "gpt-oss" else 3))
    message["reasoning"] = text(chance).strip()
    if model == "gpt-oss" or not message["content"]:
        message["content"] = None
    chat, level = tokenizer.chat, THINKING.get(model, "high")
    variables = {x: True for x in ["interleaved_thinking"] if x in chat.renderer.variables}
    prompt = chat.prompt([USER], TOOLS, level, variables=variables)
    after = as_sent([USER, message, *results])
    whole = chat.prompt(after, TOOLS, level, variables=variables).text
    assert whole.startswith(prompt.text), "the turn goes on where the prompt ends"
    return message, tokenizer.encode(
        turn(whole[len(prompt.text) :], model), read_control_tokens=True
    )


def turn(answer, model):
    """What of a text the model itself writes, its end among it."""
    ends = {"qwen3": r"<\|im_end\|>", "gpt-oss": r"<\|call\|>"}
    end = ends.get(model.removesuffix("-spelled"), "<｜(hy_eos(:opensource)?|end▁of▁sentence)｜>")
    return answer[: re.search(end, answer).end()]


def read(parser, ids, sizes=()):
    """Push ids in pieces of these sizes, and the rest at once."""
    deltas, ids = [], [int(i) for i in ids]
    for size in sizes:
        deltas += parser.push(ids[:size])
        ids = ids[size:]
    deltas += parser.push(ids) + parser.finish()
    return together(deltas)


@pytest.mark.parametrize("model", ALL)
def test_what_a_template_writes_is_read_again(tokenizers, model):
    tokenizer = tokenizers[model]
    for seed in range(30):
        message, ids = written(tokenizer, model, seed)
        parser = parser_of(tokenizer, model)
        read(parser, ids)
        answer = parser.message()
        assert not parser.malformed
        assert answer["reasoning"] == message["reasoning"]
        assert answer["content"] == message["content"]
        assert len(answer["tool_calls"]) == len(message["tool_calls"])
        for call, given_ in zip(answer["tool_calls"], message["tool_calls"], strict=True):
            assert call["function"]["name"] == given_["function"]["name"]
            assert json.loads(call["function"]["arguments"]) == given_["function"]["arguments"]
        assert len({call["id"] for call in answer["tool_calls"]}) == len(answer["tool_calls"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    model=st.sampled_from(ALL),
    seed=st.integers(0, 20),
    mutations=st.integers(0, 3),
    sizes=st.lists(st.integers(0, 9), max_size=120),
)
def test_any_pieces_give_the_same(tokenizers, model, seed, mutations, sizes):
    tokenizer = tokenizers[model]
    ids = mutated(written(tokenizer, model, seed)[1], mutations, random.Random(seed), tokenizer)
    parsers = [parser_of(tokenizer, model) for _ in range(3)]
    at_once = read(parsers[0], ids)
    assert read(parsers[1], ids, sizes) == at_once
    assert read(parsers[2], ids, [1] * len(ids)) == at_once
    assert parsers[0].message() == parsers[1].message() == parsers[2].message()


def mutated(ids, count, chance, tokenizer):
    """Change ids: leave some out, repeat, move or replace them, often by control tokens."""
    ids = [int(i) for i in ids]
    for _ in range(count):
        at, to = sorted(chance.randrange(len(ids) + 1) for _ in range(2))
        other = chance.choice((chance.randrange(tokenizer.vocab_size), chance.choice(ids or [0])))
        kind = chance.randrange(7)
        if kind == 0:
            ids = ids[:at] + ids[min(to, at + 3) :]
        elif kind == 1:
            ids = ids[:at] + ids[at:to] * 2 + ids[to:]
        elif kind == 2:
            ids = ids[to:] + ids[at:to] + ids[:at]
        elif kind == 3:
            ids = ids[:at]
        elif kind == 4:
            last = tokenizer.vocab_size
            ids = [*ids[:at], chance.randrange(min(256, last - 1), last), *ids[at:]]
        else:
            ids = [*ids[:at], other, *ids[at + (kind == 5) :]]
    return ids


def check_answer(deltas, parser):
    """Hold what every answer must be: complete calls of known functions, and plain text."""
    answer, arguments = parser.message(), {}
    for delta in deltas:
        if delta.kind == "call":
            arguments[delta.call.index] = arguments.get(delta.call.index, "") + delta.call.arguments
            if delta.call.broken:
                assert not is_json(arguments.pop(delta.call.index)), "half a call can be taken"
    calls = [call["function"] for call in answer.get("tool_calls", ())]
    assert [call["arguments"] for call in calls] == [arguments[i] for i in sorted(arguments)]
    for call in calls:
        assert call["name"] in NAMES and isinstance(json.loads(call["arguments"]), dict)
    for kind, part in (("text", answer["content"]), ("reasoning", answer.get("reasoning"))):
        assert (part or "") == "".join(delta.text for delta in deltas if delta.kind == kind)
        (part or "").encode("utf-8")  # no symbol of a marker is left
    assert parser.malformed == any(delta.malformed for delta in deltas)


def is_json(text):
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def fuzz(tokenizers, count, seed=0):
    """Read mutations of right answers; returns how many were malformed, and how many had calls."""
    chance, malformed, calls = random.Random(seed), 0, 0
    for i in range(count):
        model = ALL[i % len(ALL)]
        tokenizer = tokenizers[model]
        ids = written(tokenizer, model, chance.randrange(40))[1]
        parser = parser_of(tokenizer, model)
        deltas = read(parser, mutated(ids, chance.randint(1, 4), chance, tokenizer))
        check_answer(deltas, parser)
        malformed += parser.malformed
        calls += "tool_calls" in parser.message()
    return malformed, calls


def test_nothing_a_model_writes_is_an_error(tokenizers):
    malformed, calls = fuzz(tokenizers, 300)
    assert malformed > 80 and calls > 80


@pytest.mark.slow
def test_nothing_in_many_answers_is_an_error(tokenizers):
    malformed, calls = fuzz(tokenizers, 3_000, seed=1)
    assert malformed > 800 and calls > 800
