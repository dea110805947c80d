# SPDX-License-Identifier: Apache-2.0
"""The engine's thread: steps that fail, clients that leave, an engine that is broken."""

import json
import socket
import threading
import time

import httpx2
import pytest
from running_server import running
from tiny_chat import tiny_chat_model

import jaxcp
from jaxcp.text.tokenizer import byte_level

LONG = {"max_tokens": 900, "ignore_eos": True, "temperature": 1.0, "seed": 3}


def begin(server, **fields):
    """A connection on which a stream has begun."""
    body = json.dumps({"prompt": "a", "stream": True, **fields}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    received = b""
    while b"data: " not in received:
        received += connection.recv(4096)
    assert received.startswith(b"HTTP/1.1 200"), received
    return connection


def failing(engine, monkeypatch, count):
    """Let the next `count` steps of the engine fail."""
    run, left = engine.runner.run, [count]

    def broken(plans):
        if left[0]:
            left[0] -= 1
            raise RuntimeError("the device is on fire")
        return run(plans)

    monkeypatch.setattr(engine.runner, "run", broken)


def counted(server, name):
    """The value of a metric without labels."""
    lines = server.http.get("/metrics").text.splitlines()
    [line] = [line for line in lines if line.startswith(f"{name} ")]
    return float(line.split()[1])


def test_a_client_that_leaves_ends_its_answer(server):
    before = counted(server, "jaxcp_clients_left_total")
    connection = begin(server, **LONG)
    assert server.process.served.worker.open == 1
    connection.close()
    server.idle()
    assert counted(server, "jaxcp_clients_left_total") == before + 1


def test_a_client_that_leaves_before_its_answer_is_whole(server):
    before = counted(server, "jaxcp_clients_left_total")
    body = json.dumps({"prompt": "a", **LONG}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        while not server.process.served.worker.load.running:
            time.sleep(0.001)
    server.idle()
    assert counted(server, "jaxcp_clients_left_total") == before + 1


def test_a_step_that_fails_is_an_error_and_the_server_goes_on(server, engine, monkeypatch):
    before = counted(server, "jaxcp_step_failures")
    failing(engine, monkeypatch, 1)
    reply = server.post("/v1/completions", prompt="a", max_tokens=4)
    assert reply.status_code == 500 and reply.headers["x-should-retry"] == "false"
    assert reply.json()["error"]["code"] == "engine_error"
    assert "RuntimeError" in reply.json()["error"]["message"]
    assert "fire" not in reply.text  # what the exception says is for the log
    assert counted(server, "jaxcp_step_failures") == before + 1
    assert server.complete("a", max_tokens=4)["usage"]["completion_tokens"] >= 1
    server.idle()


def test_a_stream_that_fails_ends_with_an_error(server, engine, monkeypatch):
    connection = begin(server, **LONG)
    failing(engine, monkeypatch, 1)
    received = b""
    while part := connection.recv(65536):
        received += part
        if received.endswith(b"0\r\n\r\n"):
            break
    last = received.split(b"data: ")[-1].split(b"\n\n")[0]
    assert json.loads(last)["error"]["code"] == "engine_error"
    assert b"[DONE]" not in received
    connection.close()
    server.idle()


def test_a_broken_engine_ends_the_server_and_all_answers(monkeypatch):
    engine = jaxcp.Engine(tiny_chat_model(), byte_level(), max_len=256, max_rows=1)
    failing(engine, monkeypatch, 1000)
    statuses = []

    def post(server):
        try:
            statuses.append(server.post("/v1/completions", prompt="a").status_code)
        except httpx2.HTTPError:  # there was no server any more
            statuses.append(None)

    with pytest.raises(RuntimeError, match="the engine is broken"), running(engine) as server:
        clients = [threading.Thread(target=post, args=(server,)) for _ in range(7)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(60)
    assert len(statuses) == 7 and 500 in statuses and {*statuses} <= {500, 503, None}
