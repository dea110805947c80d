# SPDX-License-Identifier: Apache-2.0
"""`/v1/messages`, by Anthropic's official client."""

import functools
import json
import warnings

import pydantic
import pytest
from forced_answers import force
from running_server import fail_later

pytestmark = pytest.mark.slow  # 2 s to import the client
USER = [{"role": "user", "content": "Who is Pierre?"}]
TOOL = {
    "name": "find", "description": "Finds people.",
    "input_schema": {"type": "object", "properties": {"name": {"type": "string"}}},
}  # fmt: skip
CALL = '<tool_call>\n{"name": "find", "arguments": {"name": "Pierre"}}\n</tool_call>'
GREEDY = {"extra_body": {"temperature": 0}}


@pytest.fixture(scope="module")
def anthropic():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the client imports
        import anthropic
    return anthropic


@pytest.fixture(scope="module")
def client(server, anthropic):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def says(engine, monkeypatch):
    """`says(text)`: let the model say it, whatever it is asked from now on."""
    return functools.partial(force, engine, monkeypatch)


def ask(client, **options):
    options = {"model": "tiny", "messages": USER, "max_tokens": 200, **GREEDY} | options
    return client.messages.create(**options)


def test_thinking_and_answer_are_blocks(client, says):
    says("<think>\nHe is a count.\n</think>\n\nA hero.")
    message = ask(client)
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking == "He is a count." and message.content[1].text == "A hero."
    assert message.stop_reason == "end_turn" and message.stop_sequence is None
    usage = message.usage
    with client.messages.stream(model="tiny", messages=USER, max_tokens=200, **GREEDY) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_message()
    assert final.content[0] == message.content[0] and final.content[1].text == "A hero."
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == usage.output_tokens
    assert final.usage.cache_read_input_tokens >= usage.cache_read_input_tokens
    total = usage.input_tokens + usage.cache_read_input_tokens
    assert final.usage.input_tokens + final.usage.cache_read_input_tokens == total
    assert final.usage.input_tokens == 1  # the rest was computed before
    assert events[0] == "message_start" and events[-1] == "message_stop"
    assert client.messages.count_tokens(model="tiny", messages=USER).input_tokens == total


def test_a_tool_is_used_and_says_its_result(client, says, monkeypatch):
    says(f"Let me see.\n{CALL}")
    message = ask(client, tools=[TOOL], system="Be brief.")
    text, use = message.content
    assert text.type == "text" and use.type == "tool_use" and use.input == {"name": "Pierre"}
    assert message.stop_reason == "tool_use"
    with client.messages.stream(
        model="tiny", messages=USER, max_tokens=200, tools=[TOOL], **GREEDY
    ) as stream:
        final = stream.get_final_message()
    assert final.content[1].input == {"name": "Pierre"} and final.stop_reason == "tool_use"
    monkeypatch.undo()
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "A count."}
    history = [
        *USER,
        {"role": "assistant", "content": [block.model_dump() for block in message.content]},
        {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
    ]
    after = ask(client, messages=history, tools=[TOOL], max_tokens=4)
    assert after.usage.cache_read_input_tokens > 0 and after.usage.output_tokens <= 4


def test_a_stop_sequence_is_named(client, says):
    says("<think>\nEND\n</think>\n\nbefore END after")
    message = ask(client, stop_sequences=["never", "END"])
    assert message.stop_reason == "stop_sequence" and message.stop_sequence == "END"
    assert message.content[-1].text == "before "


def test_errors_have_the_classes_of_the_client(client, anthropic):
    with pytest.raises(anthropic.NotFoundError, match="is not here"):
        ask(client, model="claude")
    with pytest.raises(anthropic.BadRequestError, match="unknown field"):
        ask(client, extra_body={"nonsense": 1})


def test_a_stream_that_fails_ends_with_an_error(client, anthropic, engine, server, monkeypatch):
    fail_later(engine, monkeypatch)
    with client.messages.stream(model="tiny", messages=USER, max_tokens=900) as stream:
        events = iter(stream)
        assert next(events).type == "message_start"
        with pytest.raises(anthropic.APIStatusError, match="step that ran this answer failed"):
            for _ in events:
                pass
    server.idle()
    assert json.loads(server.http.get("/health").text)["status"] == "ok"


def test_an_answer_follows_a_schema(client, anthropic):
    def of(schema, **more):
        form = {"format": {"type": "json_schema", "schema": schema}}
        return ask(client, output_config=form, thinking={"type": "disabled"}, **more)

    message = of({"enum": ["a", "bb"], "minLength": 2})
    assert message.stop_reason == "end_turn"
    assert [block.text for block in message.content] == ['"bb"']
    with pytest.raises(anthropic.BadRequestError, match="Unsatisfiable"):
        of({"enum": ["a"], "minLength": 2})
    with pytest.raises(anthropic.BadRequestError, match=r"output_config.format with tools"):
        of({"enum": ["a"]}, tools=[TOOL])


def test_an_answer_is_read_as_a_type_of_pydantic(client, says):
    class Found(pydantic.BaseModel):
        age: int

    says('<think>\n</think>\n\n{"age": 12}')
    message = client.messages.parse(
        model="tiny", messages=USER, max_tokens=200, output_format=Found, **GREEDY
    )
    assert message.parsed_output == Found(age=12)
