# SPDX-License-Identifier: Apache-2.0
"""Bodies that are hostile, keys, hosts, and how much a server takes at a time."""

import json
import logging
import socket
import threading
import time

import openai
import pytest
from running_server import running

from jaxcp.serve.config import ServeConfig

JSON = {"content-type": "application/json"}
PATHS = ("/v1/completions", "/v1/chat/completions")
DEEP = 100_000


def connected(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def send(server, body, path="/v1/completions", **headers):
    return server.http.post(path, content=body, headers=JSON | headers)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"prompt"',
        b'{"prompt": "a"} x',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": ' + b"[" * DEEP + b"]" * DEEP + b"}",
        b'{"messages": ' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}",
        b'{"prompt": "a", "prompt_": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: repr(body[:24]) if isinstance(body, bytes) else None,
)
def test_a_body_that_is_none_is_a_400(server, path, body):
    reply = send(server, body, path)
    assert reply.status_code == 400, reply.text[:300]
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert len(reply.text) < 2000 and reply.headers["x-request-id"]


def test_deep_schemas_and_tools_are_refused(server):
    nest = {}
    for _ in range(400):
        nest = {"properties": {"a": nest}, "required": ["a"], "additionalProperties": False}
        nest["type"] = "object"
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": nest}}
    fields = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    tool = {"type": "function", "function": {"name": "a", "parameters": nest}}
    strict = {"type": "function", "function": {**tool["function"], "strict": True}}
    for more in ({"response_format": form}, {"tools": [tool]}, {"tools": [strict]}):
        reply = server.post("/v1/chat/completions", **fields, **more)
        assert reply.status_code in (200, 400), reply.text[:300]
    assert server.complete("a", max_tokens=1)


def test_a_regex_that_explodes_harms_nobody(server):
    reply = server.post("/v1/completions", prompt="a", regex="((a{1,1000}){1,1000}){1,1000}b")
    assert reply.status_code in (200, 400), reply.text
    too_large = server.post("/v1/completions", prompt="a", regex="a{1,100000}" * 100)
    assert too_large.status_code == 400 and "grammar" in too_large.json()["error"]["message"]
    server.idle()


def test_types_of_content_and_methods(server):
    assert server.http.post("/v1/completions", content=b"{}").status_code == 415
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert server.http.post("/v1/completions", content=b"{}", headers=form).status_code == 415
    assert server.http.get("/v1/completions").status_code == 405
    missing = server.http.get("/v1/nothing")
    assert missing.status_code == 404 and missing.json()["error"]["type"] == "not_found_error"


def test_request_ids_are_given_back(server):
    given = server.http.get("/v1/models", headers={"x-request-id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    own = server.http.get("/v1/models", headers={"x-request-id": "a b\tc"})
    assert own.headers["x-request-id"].startswith("req-")


def test_other_names_of_this_machine_are_refused(server):
    """A page of another origin reaches loopback under a name of its own (DNS rebinding)."""
    for host, status in (("localhost:99", 200), ("[::1]", 200), ("evil.example", 403)):
        assert server.http.get("/v1/models", headers={"host": host}).status_code == status
    reply = server.http.options(
        "/v1/completions",
        headers={"origin": "https://evil.example", "access-control-request-method": "POST"},
    )
    assert reply.status_code == 405
    assert not [name for name in reply.headers if name.startswith("access-control")]


@pytest.fixture(scope="module")
def small(engine):
    """A server with keys and small limits, over the same engine."""
    seconds = {"read_seconds": 1.0, "write_seconds": 1.0}
    with running(engine, api_keys=("secret", "other"), max_body_bytes=10_000, **seconds) as server:
        server.http.headers["authorization"] = "Bearer secret"
        yield server


def test_a_key_must_come(small):
    for headers in ({"authorization": ""}, {"authorization": "Bearer secre"}):
        reply = small.http.get("/v1/models", headers=headers)
        assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
        assert small.http.get("/metrics", headers=headers).status_code == 401
        assert small.http.get("/health", headers=headers).status_code == 200
    for headers in ({"authorization": "Bearer other"}, {"authorization": "", "x-api-key": "other"}):
        assert small.http.get("/v1/models", headers=headers).status_code == 200
    with openai.OpenAI(base_url=f"{small.url}/v1", api_key="no", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="known API key"):
            client.models.list()


def test_a_body_too_large_is_refused_before_it_is_read(small):
    assert send(small, b"a" * 10_001).status_code == 413
    parts = (b"a" * 4_000 for _ in range(3))  # no length is told
    assert small.http.post("/v1/completions", content=parts, headers=JSON).status_code == 413
    with connected(small) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\n"
            b"Content-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n"
        )
        assert b" 413 " in connection.recv(4096)


def test_too_many_answers_are_refused_with_a_time(engine, monkeypatch):
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.05), step())[1])
    body = {"prompt": "a", "max_tokens": 900, "ignore_eos": True, "n": 2, "stream": True}
    with running(engine, max_requests=2, max_choices=2) as server:
        with server.http.stream("POST", "/v1/completions", json=body) as reply:
            pieces = reply.iter_raw()  # whose end would close the connection
            next(pieces)
            refused = server.post("/v1/completions", prompt="a", max_tokens=1)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert refused.headers["x-should-retry"] == "true"
        server.idle()
        assert server.complete("a", max_tokens=1)
        assert server.post("/v1/completions", prompt="a", n=3).json()["error"]["param"] == "n"


def test_an_answer_has_a_time(server, engine, monkeypatch):
    server.complete("a", max_tokens=2)  # compiles
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.05), step())[1])
    fields = {"prompt": "a", "max_tokens": 900, "ignore_eos": True}
    with running(engine, request_seconds=1.0) as hasty:
        reply = hasty.post("/v1/completions", **fields)
        assert reply.status_code == 504 and reply.json()["error"]["code"] == "request_timeout"
        *chunks, last = hasty.events("/v1/completions", **fields)
        assert json.loads(last)["error"]["code"] == "request_timeout" and chunks
        hasty.idle()


def test_slow_heads_and_bodies_are_cut(small):
    started = time.monotonic()
    with connected(small) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localh")
        assert connection.recv(4096) == b""
    with connected(small) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\n"
            b'Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{"pro'
        )
        assert b" 408 " in connection.recv(4096)
    assert time.monotonic() - started < 60  # the machine may be slow


def test_a_reader_that_does_not_read_loses_its_answer(small):
    """Its untaken tokens are bounded, and its row and pages are free again."""
    fields = {"prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": True, "logprobs": 20}
    body = json.dumps(fields).encode()
    host, port = small.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        time.sleep(0.5)
        small.idle(20)
    assert small.complete("a", max_tokens=1)


def test_a_request_is_one_line_of_the_log_without_its_text(server, caplog):
    with caplog.at_level(logging.INFO, "jaxcp.serve.requests"):
        server.complete("a secret", max_tokens=3)
        reply = server.post("/v1/completions", prompt="a secret", max_tokens=-1)
        until = time.monotonic() + 20  # a line is written after its answer
        while reply.headers["x-request-id"] not in caplog.text and time.monotonic() < until:
            time.sleep(0.01)
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name.endswith("requests")]
    assert [line["status"] for line in lines] == [200, 400]
    assert lines[0]["route"] == "/v1/completions" and lines[0]["prompt_tokens"] == 8
    assert lines[0]["generated_tokens"] == 3 and lines[0]["finish"] == "length"
    assert lines[0]["first_token_seconds"] <= lines[0]["seconds"]
    assert lines[1]["id"] == reply.headers["x-request-id"] and lines[1]["error"]
    assert "secret" not in caplog.text


def test_text_is_logged_where_that_is_asked_for(engine, caplog):
    # a line is written after its answer: the server ends before the level does
    with caplog.at_level(logging.INFO), running(engine, log_text=True) as server:
        server.complete("a secret", max_tokens=3)
    assert "a secret" in caplog.text


def test_many_at_once_are_answered_or_refused(engine):
    with running(engine, max_requests=24) as server:
        statuses = []

        def post(i):
            statuses.append(server.post("/v1/completions", prompt=f"{i}", max_tokens=2).status_code)

        threads = [threading.Thread(target=post, args=(i,)) for i in range(60)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(statuses) == 60 and {*statuses} <= {200, 429} and statuses.count(200) >= 24
        server.idle()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"name": ""}, "a name"),
        ({"port": 70_000}, "port must be"),
        ({"max_requests": 0}, "max_requests"),
        ({"grace_seconds": float("inf")}, "grace_seconds"),
        ({"api_keys": ("",)}, "API key"),
        ({"api_keys": ("schlüssel",)}, "API key"),
    ],
)
def test_settings_are_checked(options, said):
    with pytest.raises(ValueError, match=said):
        ServeConfig(**{"name": "a", **options})


def test_local_is_loopback():
    for host in ("127.0.0.1", "::1", "localhost", "127.3.2.1"):
        assert ServeConfig(name="a", host=host).is_local
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.com"):
        assert not ServeConfig(name="a", host=host).is_local
    assert "secret" not in repr(ServeConfig(name="a", api_keys=("secret",)))
