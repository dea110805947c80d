# SPDX-License-Identifier: Apache-2.0
"""Tools that are strict, by a model that says whatever chance has it say, with calls or without."""

import copy
import dataclasses
import json
from typing import Literal

import openai
import pydantic
import pytest

USER = [{"role": "user", "content": "Where is Pierre?"}]
CITY = {
    "type": "object", "required": ["city", "sure"], "additionalProperties": False,
    "properties": {"city": {"enum": ["Moscow", "Paris"]}, "sure": {"type": ["boolean", "null"]}},
}  # fmt: skip
FIND = {"type": "function", "function": {"name": "find", "strict": True, "parameters": CITY}}
FLAT = {"type": "function", "name": "find", "strict": True, "parameters": CITY}
THEIRS = {"name": "find", "strict": True, "input_schema": CITY}
ASKED = {"messages": USER, "max_tokens": 120, "temperature": 1.0, "seed": 3, "tools": [FIND]}


@pytest.fixture(scope="module")
def ids(engine):
    tokens = ("<tool_call>", "<think>")
    return {token: engine.tokenizer.backend.token_to_id(token) for token in tokens}


def check_call(name, arguments):
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert name == "find" and arguments.keys() == {"city", "sure"}
    assert arguments["city"] in ("Moscow", "Paris") and arguments["sure"] in (True, False, None)


def chat(server, bias, **fields):
    bias = {str(token): x for token, x in bias.items()}
    reply = server.post("/v1/chat/completions", **ASKED | fields, logit_bias=bias)
    assert reply.status_code == 200, reply.text
    [choice] = reply.json()["choices"]
    return choice["message"], choice["finish_reason"]


def test_a_call_that_the_model_opens_follows_the_schema(server, ids):
    for seed in range(3):
        message, reason = chat(
            server, {ids["<tool_call>"]: 100}, seed=seed, parallel_tool_calls=False
        )
        [call] = message["tool_calls"]
        check_call(**call["function"])
        assert reason == "tool_calls" and message["content"] is None
    message, _ = chat(server, {ids["<tool_call>"]: 100}, max_tokens=200)
    assert len(message["tool_calls"]) > 1
    for call in message["tool_calls"]:
        check_call(**call["function"])
    server.idle()


def test_text_alone_is_an_answer(server, ids):
    never = {ids["<tool_call>"]: -100, ids["<think>"]: -100}
    message, reason = chat(server, never, max_tokens=30)
    assert message["content"] and "tool_calls" not in message and reason in ("stop", "length")


def test_a_call_comes_after_thinking(server, ids):
    bias = {ids["<think>"]: 100, ids["<tool_call>"]: 50}
    message, reason = chat(server, bias, thinking_token_budget=6, parallel_tool_calls=False)
    assert message["reasoning"] and reason == "tool_calls"
    check_call(**message["tool_calls"][0]["function"])


def test_of_responses_and_of_anthropics_messages(server, engine, ids, monkeypatch):
    requests, bias = engine.requests, {ids["<tool_call>"]: 100.0}
    monkeypatch.setattr(
        engine,
        "requests",
        lambda ids, sampling: requests(ids, dataclasses.replace(sampling, logit_bias=bias)),
    )
    fields = {"input": USER[0]["content"], "max_output_tokens": 120, "parallel_tool_calls": False}
    body = server.post("/v1/responses", **fields, tools=[FLAT]).json()
    [call] = [item for item in body["output"] if item["type"] == "function_call"]
    check_call(call["name"], call["arguments"])
    assert body["tools"][0]["strict"] is True
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    fields = {"messages": USER, "max_tokens": 120, "tool_choice": choice}
    body = server.post("/v1/messages", **fields, tools=[THEIRS]).json()
    [use] = [block for block in body["content"] if block["type"] == "tool_use"]
    check_call(use["name"], use["input"])


class Find(pydantic.BaseModel):
    """Finds somebody."""

    city: Literal["Moscow", "Paris"]
    sure: bool | None


def test_openais_client_makes_strict_tools_of_classes_and_reads_their_calls(client, ids):
    tool = openai.pydantic_function_tool(Find)
    assert tool["function"]["strict"] is True
    answer = client.chat.completions.parse(
        model="tiny", messages=USER, tools=[tool], parallel_tool_calls=False, max_tokens=120,
        seed=1, logit_bias={str(ids["<tool_call>"]): 100},
    )  # fmt: skip
    [call] = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Find)


def loosened(*path, **changes):
    """A strict schema with other fields at a place."""
    inner = {**CITY, "required": ["x"], "properties": {"x": {"type": "integer"}}}
    many = {"anyOf": [{"type": "array", "items": inner}, {"type": "null"}]}
    schema = copy.deepcopy({**CITY, "required": ["city"], "properties": {"city": many}})
    part = schema
    for key in path:
        part = part[key]
    part |= changes
    return schema


ITEMS = ("properties", "city", "anyOf", 0, "items")
IN_ITEMS = ".properties.city.anyOf[0].items"


@pytest.mark.parametrize(
    ("schema", "place", "said"),
    [
        (loosened(type="string"), "", '"type": "object"'),
        (loosened(required=5), "", "a list as required"),
        (loosened(*ITEMS, properties=[1]), IN_ITEMS, "an object as properties"),
        (loosened(additionalProperties=True), "", '"additionalProperties": false'),
        (loosened(required=[]), "", "city is not there"),
        (loosened(*ITEMS, additionalProperties={}), IN_ITEMS, '"additionalProperties": false'),
        (loosened(*ITEMS, required=[]), IN_ITEMS, "x is not there"),
    ],
)
def test_a_schema_that_is_not_strict_is_named(server, schema, place, said):
    tool = {"type": "function", "function": {**FIND["function"], "parameters": schema}}
    for path, field, fields in (
        ("chat/completions", "function.parameters", ASKED | {"tools": [tool]}),
        ("responses", "parameters", {"input": "a", "tools": [{**FLAT, "parameters": schema}]}),
        ("messages", "input_schema", {
            "messages": USER, "max_tokens": 9, "tools": [{**THEIRS, "input_schema": schema}],
        }),
    ):  # fmt: skip
        if path == "messages" and "not there" in said:
            continue  # Anthropic's rules have no such one
        reply = server.post(f"/v1/{path}", **fields)
        assert reply.status_code == 400 and f"tools[0].{field}{place}: " in reply.text
        assert said in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"regex": "a"}, "one grammar; got strict"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {
            **CITY, "properties": {"city": {"not": {}}, "sure": {}}}}}]}, "strict: "),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_named(server, fields, said):
    reply = server.post("/v1/chat/completions", **ASKED | fields)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "tools"
    assert said in reply.json()["error"]["message"]


def test_properties_may_be_missing_by_anthropics_rules(server):
    schema = {**CITY, "required": []}
    fields = {"messages": USER, "max_tokens": 2, "tools": [{**THEIRS, "input_schema": schema}]}
    assert server.post("/v1/messages", **fields).status_code == 200


def test_a_function_without_parameters_is_strict(server, ids):
    tool = {"type": "function", "function": {"name": "go", "strict": True}}
    message, _ = chat(server, {ids["<tool_call>"]: 100}, tools=[tool], parallel_tool_calls=False)
    assert message["tool_calls"][0]["function"] == {"name": "go", "arguments": "{}"}
