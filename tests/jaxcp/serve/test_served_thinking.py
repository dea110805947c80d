# SPDX-License-Identifier: Apache-2.0
"""A model that begins within its thinking (Hy3): levels, a budget, and a grammar behind it."""

import json

import pytest
from running_server import running
from tiny_chat import saying, tiny_engine, tokenizer_of

import jaxcp

pytestmark = pytest.mark.slow
USER = [{"role": "user", "content": "How old is Pierre?"}]
SCHEMA = {
    "type": "object", "required": ["age"], "additionalProperties": False,
    "properties": {"age": {"enum": [20, 21]}}, "x-guidance": {"whitespace_flexible": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    tokenizer = tokenizer_of(tmp_path_factory.mktemp("tokenizer"), "hy3")
    engine = tiny_engine(tokenizer)
    with running(engine) as server:
        yield server


def ask(client, **options):
    options = {"model": "tiny", "messages": USER, "temperature": 0, "max_tokens": 60} | options
    return client.chat.completions.create(**options)


def test_an_effort_is_the_nearest_level(client, server):
    """Of Hy3's levels; a level is said in the prompt, which it begins."""
    told = {
        effort: ask(client, reasoning_effort=effort, max_tokens=1).usage.prompt_tokens
        for effort in ("none", "minimal", "low", "medium", "high", "xhigh")
    }
    chat = server.engine.tokenizer.chat
    tokens = {x: len(chat.prompt(USER, thinking=x).ids) for x in chat.thinking_levels}
    assert told == {
        "none": tokens["no_think"], "minimal": tokens["no_think"], "low": tokens["low"],
        "medium": tokens["low"], "high": tokens["high"], "xhigh": tokens["high"],
    }  # fmt: skip


def test_a_budget_closes_the_thinking_and_the_answer_goes_on(client, server):
    chat = server.engine.tokenizer.chat
    options = {"ignore_eos": True, "thinking_token_budget": 9}
    answer = ask(client, extra_body=options, max_tokens=40, seed=4, temperature=1.0)
    message, usage = answer.choices[0].message, answer.usage
    assert usage.completion_tokens_details.reasoning_tokens <= 9 + len(chat.closing)
    assert usage.completion_tokens == 40 and answer.choices[0].finish_reason == "length"
    assert message.reasoning and message.content
    prompt = chat.prompt(USER, thinking=9)
    thought = jaxcp.Sampling(max_new_tokens=9, seed=4, temperature=1.0, stop_tokens=())
    begun = server.engine.generate([prompt.ids], thought)[0].tokens
    rest = jaxcp.Sampling(
        max_new_tokens=40 - 9 - len(chat.closing), seed=4, temperature=1.0, stop_tokens=()
    )
    end = server.engine.generate([[*prompt.ids, *begun, *chat.closing]], rest)[0].tokens
    parser = prompt.parser()
    parser.push([*begun, *chat.closing, *end])
    parser.finish()
    assert (message.reasoning, message.content) == (
        parser.message()["reasoning"], parser.message()["content"],
    )  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_begins_where_the_thinking_ends(client, server, stream):
    """jundot/mlx-serve#331: a grammar from the first token on forbids the end of the thinking."""
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    options = {"response_format": form, "extra_body": {"thinking_token_budget": 12}}
    thought, said = "", ""
    if stream:
        for chunk in ask(client, stream=True, **options):
            for choice in chunk.choices:
                thought += getattr(choice.delta, "reasoning", None) or ""
                said += choice.delta.content or ""
    else:
        message = ask(client, **options).choices[0].message
        thought, said = message.reasoning, message.content
    assert json.loads(said)["age"] in (20, 21) and thought
    server.idle()


def test_no_think_thinks_nothing(client, server):
    grammar = saying(server.engine.tokenizer, "No.")
    options = {"extra_body": {"grammar": grammar}, "reasoning_effort": "none"}
    message = ask(client, **options).choices[0].message
    assert message.content == "No." and not hasattr(message, "reasoning")
