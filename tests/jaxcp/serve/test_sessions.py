# SPDX-License-Identifier: Apache-2.0
"""`/v1/sessions`, `/v1/pool` and `/openapi.json`: what is held, and what can be asked."""

import json

import pytest
from running_server import running
from test_chat_completions import USER
from tiny_chat import tiny_chat_model

import jaxcp
from jaxcp.serve.openapi import ANSWERS, READING
from jaxcp.text.tokenizer import byte_level


def sessions(server):
    return {one["id"]: one for one in server.http.get("/v1/sessions").json()["data"]}


def test_a_key_names_a_conversation(server, engine):
    prompt = "A long book, chapter by chapter. " * 6
    server.complete(prompt, max_tokens=4, prompt_cache_key="reader", ignore_eos=True)
    one = sessions(server)["reader"]
    assert one["tokens"] == len(prompt) + 4 and one["tokens_held"] == len(prompt) + 3
    assert one["status"] == "idle" and one["turns"] == 1 and one["where"] == "device"
    pages = server.ask(lambda engine: engine.groups.schedulers[0].pages)
    assert one["pages"] == pages.places(one["tokens_held"]) == sum(one["pages_per_shard"])
    assert max(one["pages_per_shard"]) - min(one["pages_per_shard"]) <= 1
    assert one["bytes_per_device"] == engine.bytes_per_device(one["tokens_held"])
    server.complete(prompt + "?", max_tokens=2, prompt_cache_key="reader")
    assert sessions(server)["reader"]["turns"] == 2


@pytest.mark.slow
def test_what_went_to_the_host_is_said():
    engine = jaxcp.Engine(
        tiny_chat_model(256), byte_level(), max_len=256, max_rows=1, pool_tokens=256,
        host_memory=2**22, stop_tokens=(),
    )  # fmt: skip
    with running(engine) as server:
        for name in ("first", "second"):
            server.complete(name * 36, max_tokens=2, prompt_cache_key=name)
        held = sessions(server)
        assert held["second"]["where"] == "device" and held["second"]["tokens_on_host"] == 0
        first = held["first"]
        assert "host" in first["where"] and first["tokens_on_host"] > 0
        assert first["tokens_held"] + first["tokens_on_host"] == 5 * 36 + 1
        server.idle()


def test_without_a_key_a_conversation_is_known_by_its_prefix(server):
    body = server.complete("Once upon a time", max_tokens=4, logit_bias={"65": 100})
    first = body["id"]
    assert first in sessions(server)
    text = "Once upon a time" + body["choices"][0]["text"]
    server.complete(text + ", there was", max_tokens=2)
    after = sessions(server)
    assert after[first]["turns"] == 2 and after[first]["tokens"] == len(text) + 11 + 2
    server.complete("Once", max_tokens=2)
    assert sessions(server)[first]["turns"] == 2


def test_the_picture_has_every_page_and_who_shares_it(server):
    shared = "The same beginning for two. " * 12
    for name in ("left", "right"):
        server.complete(f"{shared}{name}", max_tokens=2, prompt_cache_key=name)
    picture = server.http.get("/v1/pool").json()
    [group] = picture["groups"]
    names = [one["id"] for one in picture["sessions"]]
    pages = server.ask(lambda engine: engine.groups.schedulers[0].pages)
    cells = [cell for shard in group["shards"] for cell in shard]
    assert (
        len(group["shards"]) == pages.shards and len(cells) == pages.shards * pages.pages_per_shard
    )
    both = [names[owner] for owner, count, _ in cells if count >= 2]
    both = [name for name in both if name in ("left", "right")]
    assert len(both) == len(shared) // pages.page_size
    free = sum(pool.free for pool in pages.pools)
    assert sum(owner == -1 for owner, _, _ in cells) == free
    assert all(holds == 0 for _, _, holds in cells)  # nothing runs


def test_the_document_is_of_every_route_and_field(server):
    document = server.http.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0" and document["paths"].keys() == {*ANSWERS, *READING}
    schemas = document["components"]["schemas"]
    text = json.dumps(document)
    for name in {x.split('"')[0] for x in text.split('"#/components/schemas/')[1:]}:
        assert name in schemas
    chat = schemas["ChatRequest"]
    assert chat["additionalProperties"] is False and "messages" in chat["required"]
    assert {"tools", "seed", "response_format", "logit_bias"} <= chat["properties"].keys()


@pytest.mark.parametrize("path", [path for path in READING if "{" not in path])
def test_every_route_of_the_document_is_there(server, path):
    assert server.http.get(path).status_code == 200
    assert server.http.request("HEAD", path).status_code == 200


@pytest.mark.parametrize("path", ANSWERS)
def test_every_field_that_is_not_ours_is_refused(server, path):
    fields = {"model": "tiny", "max_tokens": 2, "messages": USER, "prompt": "a", "input": "a"}
    wanted = {"/v1/completions": "prompt", "/v1/responses": "input"}.get(path, "messages")
    if path == "/v1/responses":
        fields["max_output_tokens"] = fields.pop("max_tokens")
    limits = {"model", "max_tokens", "max_output_tokens", wanted}
    good = {name: value for name, value in fields.items() if name in limits}
    assert server.post(path, **good).status_code == 200
    bad = server.post(path, **good, frobnicate=1)
    assert bad.status_code == 400 and "frobnicate" in bad.json()["error"]["message"]
