# SPDX-License-Identifier: Apache-2.0
"""`/v1/messages` without a client: its events in their order, and what is refused."""

import json

import pytest
from forced_answers import force

PATH = "/v1/messages"
USER = [{"role": "user", "content": "Who is Pierre?"}]
TOOL = {"name": "find", "input_schema": {"type": "object"}}
CALL = '<tool_call>\n{"name": "find", "arguments": {}}\n</tool_call>'
TALK = f"<think>\nhm\n</think>\n\nI ask.\n{CALL}"


def test_blocks_begin_go_on_and_end_in_their_order(server, engine, monkeypatch):
    force(engine, monkeypatch, TALK)
    fields = {"model": "tiny", "messages": USER, "max_tokens": 200, "tools": [TOOL]}
    whole = server.post(PATH, **fields).json()
    assert [block["type"] for block in whole["content"]] == ["thinking", "text", "tool_use"]
    assert whole["stop_reason"] == "tool_use" and whole["usage"]["output_tokens"] > 20
    events = [json.loads(event) for event in server.events(PATH, **fields)]
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    usage = events[0]["message"]["usage"]
    assert usage["cache_read_input_tokens"] > 0 and usage["input_tokens"] == 1
    opened = None
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert opened is None
            opened = event["index"]
        assert event["index"] == opened
        if event["type"] == "content_block_stop":
            opened = None
    assert opened is None
    texts = [e["delta"] for e in events if e["type"] == "content_block_delta"]
    assert "".join(x.get("thinking", "") for x in texts) == whole["content"][0]["thinking"]
    assert "".join(x.get("text", "") for x in texts) == whole["content"][1]["text"]
    arguments = "".join(x.get("partial_json", "") for x in texts)
    assert json.loads(arguments) == whole["content"][2]["input"] == {}


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"tool_choice": {"type": "any"}}, "tools has no function; there are none"),
        ({"tool_choice": {"type": "tool"}, "tools": [TOOL]}, "tool_choice has a name where"),
        ({"tool_choice": {"type": "tool", "name": "a"}, "tools": [TOOL]}, "tools has no a; there"),
        ({"messages": [{"role": "system", "content": "a"}]}, "Invalid enum value 'system'"),
        ({"messages": []}, "messages must be a list of at least one"),
        ({"thinking": {"type": "enabled"}}, "budget_tokens"),
        ({"container": "a"}, "unknown field `container`"),
        ({"max_tokens": 5000}, "the context holds"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "Invalid value 'image'",
        ),
    ],
)
def test_what_cannot_be_done_is_named(server, fields, said):
    reply = server.post(PATH, **{"model": "tiny", "messages": USER, "max_tokens": 4} | fields)
    assert reply.status_code == 400, reply.text
    body = reply.json()
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert said in body["error"]["message"], body
