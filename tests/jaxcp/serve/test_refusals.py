# SPDX-License-Identifier: Apache-2.0
"""Requests for what this server does not do are refused by the name that was sent, with
what to send instead."""

import gzip
import json

import pytest

CHATS, RESPONSES = "/v1/chat/completions", "/v1/responses"
USER = [{"role": "user", "content": "Hi"}]


def tool(name):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


REFUSED = {
    "stored": (CHATS, {"store": True}, "store", "send the whole conversation"),
    "tier": (CHATS, {"service_tier": "flex"}, "service_tier", '"auto"'),
    "budget": (
        CHATS, {"thinking_token_budget": -1}, "thinking_token_budget", "must be 0 or more; got -1",
    ),
    "stop ids": (CHATS, {"stop_token_ids": [9999]}, "stop_token_ids", "must lie in 0..287"),
    "own variable": (
        CHATS, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs",
        "reads no 'messages' that may be set; it reads enable_thinking",
    ),
    "unread variable": (
        CHATS, {"chat_template_kwargs": {"enable_thinkin": False}}, "chat_template_kwargs",
        "reads no 'enable_thinkin'",
    ),
    "name": (CHATS, {"tools": [tool('a">x')]}, None, "the name of a tool has up to 128 letters"),
    "long name": (CHATS, {"tools": [tool("a" * 129)]}, None, "the name of a tool"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_the_field_that_was_sent_and_what_to_do(server, case):
    path, fields, param, said = REFUSED[case]
    reply = server.post(path, messages=USER, max_tokens=2, **fields)
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["param"] == param, error
    assert said in error["message"]
    assert param is None or error["message"].startswith(param)


def test_a_response_that_goes_on_with_a_stored_one_is_told_to_send_it(server):
    for field in ("previous_response_id", "conversation"):
        reply = server.post(RESPONSES, input="Hi", **{field: "resp_1"})
        assert reply.status_code == 400
        assert field in reply.json()["error"]["message"]
    assert (
        "send the whole conversation"
        in (
            server.post(RESPONSES, input="Hi", previous_response_id="resp_1").json()["error"][
                "message"
            ]
        )
    )


def test_a_body_that_is_compressed_is_refused_as_that(server):
    body = gzip.compress(json.dumps({"messages": USER}).encode())
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    reply = server.http.post(CHATS, content=body, headers=headers)
    assert reply.status_code == 415
    assert "without Content-Encoding; got gzip" in reply.json()["error"]["message"]


def test_a_variable_that_the_template_reads_is_taken(server):
    known = {"chat_template_kwargs": {"enable_thinking": False}}
    whole, silent = (
        server.post(CHATS, messages=USER, max_tokens=2, **fields).json() for fields in ({}, known)
    )
    assert silent["usage"]["prompt_tokens"] > whole["usage"]["prompt_tokens"]
