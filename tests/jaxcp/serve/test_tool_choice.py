# SPDX-License-Identifier: Apache-2.0
"""`tool_choice` that asks for a call, and schemas, by a model that opens its thinking itself."""

import json

import pytest

USER = [{"role": "user", "content": "Where is Pierre?"}]
CITY = {
    "type": "object", "required": ["city"], "additionalProperties": False,
    "properties": {"city": {"enum": ["Moscow", "Paris"]}, "sure": {"type": "boolean"}},
}  # fmt: skip
SCHEMAS = {"find": CITY, "wait": {"type": "object", "properties": {}}}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
FLAT = [{"type": "function", "name": n, "parameters": x} for n, x in SCHEMAS.items()]
THEIRS = [{"name": n, "input_schema": x} for n, x in SCHEMAS.items()]
FIND = {"type": "function", "function": {"name": "find"}}
FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": {
    **CITY, "x-guidance": {"whitespace_flexible": False},
}}}  # fmt: skip


@pytest.fixture(scope="module")
def opening(engine):
    """The token by which the model begins to think."""
    return str(engine.tokenizer.backend.token_to_id("<think>"))


def asked(**fields):
    return {"messages": USER, "max_tokens": 120, "temperature": 0, **fields}


def chat(server, **fields):
    reply = server.post("/v1/chat/completions", **asked(**fields))
    assert reply.status_code == 200, reply.text
    [choice] = reply.json()["choices"]
    return choice["message"], choice["finish_reason"]


def check_call(name, arguments):
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert (name == "wait" and arguments == {}) or (
        name == "find" and arguments["city"] in ("Moscow", "Paris")
    )


def streamed(server, **fields):
    """The texts by name, the calls, and why it ended, of an answer in pieces."""
    texts, calls, reasons = {}, {}, []
    for event in server.events("/v1/chat/completions", **asked(**fields))[:-1]:
        for choice in json.loads(event)["choices"]:
            reasons += [choice["finish_reason"]] * bool(choice["finish_reason"])
            for name in ("content", "reasoning"):
                texts[name] = texts.get(name, "") + (choice["delta"].get(name) or "")
            for call in choice["delta"].get("tool_calls") or ():
                begun = calls.setdefault(call["index"], ["", ""])
                begun[0] += call["function"].get("name") or ""
                begun[1] += call["function"]["arguments"]
    return texts, calls, reasons


@pytest.mark.parametrize("choice", ["required", FIND], ids=["any", "by name"])
def test_a_call_is_made(server, choice):
    fields = {"tools": TOOLS, "tool_choice": choice, "reasoning_effort": "none"}
    message, reason = chat(server, **fields)
    functions = [call["function"] for call in message["tool_calls"]]
    for function in functions:
        check_call(**function)
    assert reason == "tool_calls" and message["content"] is None
    if choice is FIND:
        assert [function["name"] for function in functions] == ["find"]
    texts, calls, reasons = streamed(server, **fields)
    assert reasons == ["tool_calls"] and texts["content"] == ""
    assert [tuple(call) for call in calls.values()] == [
        (function["name"], function["arguments"]) for function in functions
    ]
    server.idle()


def test_one_call_where_several_are_not_wanted(server):
    fields = {"tools": TOOLS, "tool_choice": "required", "reasoning_effort": "none"}
    for seed in range(4):
        message, reason = chat(
            server, parallel_tool_calls=False, **fields, temperature=1.0, seed=seed
        )
        assert len(message["tool_calls"]) == 1 and reason == "tool_calls"


@pytest.mark.parametrize("wanted", ["call", "schema"])
def test_thinking_that_the_model_opens_comes_before(server, opening, wanted):
    """A bias lets the random model open it, and a budget closes it."""
    fields = {"logit_bias": {opening: 100}, "thinking_token_budget": 6}
    if wanted == "call":
        fields |= {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    else:
        fields |= {"response_format": FORM}
    message, reason = chat(server, **fields)
    assert message["reasoning"]
    texts, calls, reasons = streamed(server, **fields)
    assert texts["reasoning"] == message["reasoning"] and reasons == [reason]
    if wanted == "call":
        check_call(**message["tool_calls"][0]["function"])
        check_call(*calls[0])
        assert reason == "tool_calls"
    else:
        assert json.loads(message["content"])["city"] in ("Moscow", "Paris")
        assert texts["content"] == message["content"] and reason == "stop"
    server.idle()


def test_a_model_that_opens_none_follows_the_schema_at_once(server, opening):
    message, reason = chat(server, response_format=FORM, logit_bias={opening: -100})
    assert json.loads(message["content"])["city"] and reason == "stop"
    assert "reasoning" not in message


def test_no_end_of_an_answer_comes_within_the_thinking(server, engine, opening):
    """A bias for the token that ends a turn is of no effect there, and none of it is left after."""
    [end] = engine.tokenizer.chat.stop_tokens
    fields = {"logit_bias": {opening: 100, str(end): 99}, "thinking_token_budget": 6}
    message, reason = chat(server, response_format=FORM, **fields)
    assert message["reasoning"] and json.loads(message["content"])["city"] and reason == "stop"


def test_tokens_are_as_many_as_asked_for(server, opening):
    for tokens, budget in ((1, None), (2, None), (5, None), (8, 6), (9, 6)):
        fields = {"response_format": FORM, "logit_bias": {opening: 100}, "max_tokens": tokens}
        fields |= {} if budget is None else {"thinking_token_budget": budget}
        reply = server.post("/v1/chat/completions", **asked(**fields))
        usage = reply.json()["usage"]
        assert usage["completion_tokens"] == tokens
        assert reply.json()["choices"][0]["finish_reason"] == "length"


def test_half_a_call_is_text(server):
    fields = {"tools": TOOLS, "tool_choice": "required", "reasoning_effort": "none"}
    message, reason = chat(server, max_tokens=20, **fields)
    assert reason == "length" and message.get("tool_calls") is None
    assert message["content"].startswith('<tool_call>\n{"name": "')


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "find"}])
def test_of_responses(server, choice):
    fields = {"input": USER[0]["content"], "temperature": 0, "max_output_tokens": 120}
    fields |= {"tools": FLAT, "tool_choice": choice, "reasoning": {"effort": "none"}}
    body = server.post("/v1/responses", **fields).json()
    calls = [item for item in body["output"] if item["type"] == "function_call"]
    for call in calls:
        check_call(call["name"], call["arguments"])
    assert calls and body["status"] == "completed" and body["tool_choice"] == choice
    last = json.loads(server.events("/v1/responses", **fields)[-1])
    assert [(x["name"], x["arguments"]) for x in last["response"]["output"]] == [
        (x["name"], x["arguments"]) for x in calls
    ]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "find"}])
def test_of_anthropics_messages(server, choice):
    fields = {"messages": USER, "temperature": 0, "max_tokens": 120, "tools": THEIRS}
    fields |= {"tool_choice": choice, "thinking": {"type": "disabled"}}
    body = server.post("/v1/messages", **fields).json()
    uses = [block for block in body["content"] if block["type"] == "tool_use"]
    for use in uses:
        check_call(use["name"], use["input"])
    assert uses and body["stop_reason"] == "tool_use"
    one = server.post(
        "/v1/messages", **fields | {"tool_choice": choice | {"disable_parallel_tool_use": True}}
    )
    assert len(one.json()["content"]) == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tool_choice": "required"}, "tools has no function"),
        ({"tool_choice": FIND | {"function": {"name": "walk"}}, "tools": TOOLS}, "no walk; there"),
        ({"tool_choice": "always", "tools": TOOLS}, "or a function by its name"),
        ({"tool_choice": {"type": "function"}, "tools": TOOLS}, "or a function by its name"),
        ({"tool_choice": {"type": "allowed_tools"}, "tools": TOOLS}, "or a function by its name"),
        ({"tool_choice": FIND, "tools": TOOLS, "regex": "a"}, "one grammar"),
    ],
)
def test_what_cannot_be_done_is_named(server, fields, said):
    reply = server.post("/v1/chat/completions", **asked(**fields))
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == "tool_choice" and said in reply.text
