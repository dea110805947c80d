# SPDX-License-Identifier: Apache-2.0
"""`/v1/responses`, by the official client."""

import functools
import json

import pytest
from forced_answers import force
from running_server import fail_later

USER = "Who is Pierre?"
TOOL = {
    "type": "function", "name": "find",
    "parameters": {"type": "object", "properties": {"name": {"type": "string"}}},
}  # fmt: skip
CALL = '<tool_call>\n{"name": "find", "arguments": {"name": "Pierre"}}\n</tool_call>'


@pytest.fixture
def says(engine, monkeypatch):
    """`says(text)`: let the model say it, whatever it is asked from now on."""
    return functools.partial(force, engine, monkeypatch)


def ask(client, **options):
    options = {"model": "tiny", "input": USER, "temperature": 0, "max_output_tokens": 200} | options
    return client.responses.create(**options)


def test_thinking_and_answer_are_items(client, says):
    says("<think>\nHe is a count.\n</think>\n\nA hero.")
    response = ask(client)
    thought, said = response.output
    assert (thought.type, said.type) == ("reasoning", "message")
    assert thought.content[0].text == "He is a count." and response.output_text == "A hero."
    assert response.status == "completed" and response.usage.input_tokens > len(USER)
    assert 0 < response.usage.output_tokens_details.reasoning_tokens
    with client.responses.stream(
        model="tiny", input=USER, temperature=0, max_output_tokens=200
    ) as stream:
        events = [*stream]
        final = stream.get_final_response()
    assert final.output_text == "A hero."
    assert final.output[0].content[0].text == "He is a count."
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert [event.sequence_number for event in events] == [*range(len(events))]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == "A hero."
    assert final.usage.input_tokens_details.cached_tokens == final.usage.input_tokens - 1


def test_a_function_is_called_and_gives_its_output(client, says, monkeypatch):
    says(f"Let me see.\n{CALL}")
    response = ask(client, tools=[TOOL], instructions="Be brief.")
    said, call = response.output
    assert said.type == "message" and call.type == "function_call" and call.name == "find"
    assert json.loads(call.arguments) == {"name": "Pierre"}
    with client.responses.stream(
        model="tiny", input=USER, tools=[TOOL], temperature=0, max_output_tokens=200
    ) as stream:
        final = stream.get_final_response()
    assert json.loads(final.output[1].arguments) == {"name": "Pierre"}
    monkeypatch.undo()
    items = [{"role": "user", "content": USER}, *(x.model_dump() for x in response.output)]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "A count."})
    after = ask(client, input=items, tools=[TOOL], instructions="Be brief.", max_output_tokens=4)
    assert after.usage.input_tokens_details.cached_tokens > len(USER)


def test_no_tokens_left_is_incomplete(client, says):
    says("A hero and a count.")
    response = ask(client, max_output_tokens=6)
    assert response.status == "incomplete" and response.output_text == "A hero"
    assert response.incomplete_details.reason == "max_output_tokens"
    *_, last = ask(client, max_output_tokens=6, stream=True)
    assert last.type == "response.incomplete" and last.response.output_text == "A hero"


def test_json_by_a_schema(client):
    schema = {
        "type": "object", "required": ["age"], "additionalProperties": False,
        "properties": {"age": {"enum": [20, 21]}}, "x-guidance": {"whitespace_flexible": False},
    }  # fmt: skip
    form = {"format": {"type": "json_schema", "name": "person", "schema": schema}}
    assert json.loads(ask(client, text=form).output_text)["age"] in (20, 21)


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": [{"type": "message", "role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "call_id": "a"}]}, "input[0].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": "immense"}}, "reasoning.effort"),
        ({"nonsense": 1}, "nonsense"),
        ({"max_output_tokens": 5000}, "max_output_tokens"),
    ],
)
def test_what_cannot_be_done_is_named(server, fields, param):
    reply = server.post("/v1/responses", **{"model": "tiny", "input": USER} | fields)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param, reply.text


def test_a_stream_that_fails_says_so(client, engine, server, monkeypatch):
    fail_later(engine, monkeypatch)
    stream = ask(client, stream=True, max_output_tokens=900)
    assert next(iter(stream)).type == "response.created"
    *_, last = stream
    assert last.type == "response.failed" and "step" in last.response.error.message
    server.idle()
