# SPDX-License-Identifier: Apache-2.0
"""`eval load`: what it counts of a server is what the server has done, and failures have names."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import socket

import httpx2
import pytest
from running_server import MODEL
from tiny_chat import write_tiny_chat

from jaxcp.cli.devices import Devices
from jaxcp.cli.load import served
from jaxcp.cli.main import main
from jaxcp.evaluate.load import LoadResult, Workload, measure_load
from jaxcp.evaluate.load_client import Answered, ask, said_in
from jaxcp.evaluate.load_report import each, percentile, plot_load, summary, table

SMALL = {
    "requests": 3, "concurrency": 2, "prompt_tokens": 20, "answer_tokens": 5,
    "endpoint": "completions",
}  # fmt: skip


def test_what_is_counted_is_what_was_sent(server):
    """A token is a byte here, so texts have as many as they should."""
    told = []
    workload = Workload(**SMALL | {"turns": 3, "shared_tokens": 8})
    result = measure_load(server.url, workload, on_answer=told.append)
    assert len(told) == len(result.answers) == 9 and (result.model, result.endpoint) == (
        MODEL, "completions",
    )  # fmt: skip
    for answer in result.answers:
        assert answer.error is None and answer.answer_tokens == 5
        before = [x for x in result.answers if x.conversation == answer.conversation]
        said = "".join(x.text for x in before[: answer.turn])
        assert answer.prompt_tokens == 8 + 20 * (answer.turn + 1) + len(said.encode())
        if answer.turn:  # what came before is known, at least to the last whole answer
            assert answer.cached_tokens >= 8 + 20 * answer.turn
        assert 0 <= answer.to_first <= answer.end and len(answer.gaps) < 5
    server.idle()


def test_chats_are_asked_where_there_are_some(server):
    workload = Workload(**SMALL | {"endpoint": None, "turns": 2, "concurrency": 3})
    result = measure_load(f"{server.url}/v1/", workload, model=MODEL)  # as clients are given it
    numbers = summary(result)
    assert numbers["endpoint"] == "chat" and numbers["errors"] == {}
    assert numbers["requests"]["complete"] == 6 and numbers["tokens"]["answer"] == 30
    prompts = [x.prompt_tokens for x in result.answers if x.turn == 0]
    assert len({*prompts}) == 1 and prompts[0] > 20  # the template adds some
    server.idle()


def test_a_rate_begins_them_at_random_moments():
    workload = Workload(requests=4000, rate=2.0, concurrency=None, seed=3)
    moments = workload.moments()
    gaps = [b - a for a, b in itertools.pairwise(moments)]
    assert moments[0] == 0 and min(gaps) > 0 and moments == workload.moments()
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.5, rel=0.05)
    spread = (sum((x - mean) ** 2 for x in gaps) / len(gaps)) ** 0.5
    assert spread == pytest.approx(mean, rel=0.06)  # as of an exponential distribution
    assert moments != dataclasses.replace(workload, seed=4).moments()
    assert dataclasses.replace(workload, rate=None, concurrency=1).moments() == [0.0] * 4000


def test_a_request_counts_from_when_it_was_due(server):
    """The second waits in the client for the first: with a rate, that is time of the server's."""
    workload = Workload(**SMALL | {"requests": 2, "concurrency": 1, "rate": 1e6})
    first, second = measure_load(server.url, workload).answers
    assert second.due < first.due + first.end < second.due + second.to_first
    server.idle()


def test_a_conversation_ends_where_a_turn_fails(server):
    room = server.engine.max_len
    workload = Workload(**SMALL | {"requests": 1, "turns": 9, "prompt_tokens": room // 3})
    result = measure_load(server.url, workload)
    numbers = summary(result)
    assert numbers["errors"] == {"400 context_length_exceeded": 1}
    assert numbers["requests"]["complete"] == 2 and numbers["requests"]["never_sent"] == 6
    assert result.answers[-1].error and "never sent" in table(numbers).title
    server.idle()


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (['data: {"choices": [{"text": "a"}]}', "data: [DONE]"], None),
        (['data: {"choices": [{"text": "a"}]}'], "stream: it ended too early"),
        (['data: {"error": {"code": "shutting_down", "message": "m"}}'], "stream: shutting_down"),
        (["data: {"], "stream: an event is not JSON"),
        ([": a comment", "data: [DONE]"], None),
    ],
)
def test_a_stream_that_breaks(lines, error):
    def reply(request):
        assert json.loads(request.content)["stream_options"] == {"include_usage": True}
        return httpx2.Response(200, text="\n\n".join(lines) + "\n\n")

    async def one():
        answered = Answered(conversation=0, turn=0)
        transport = httpx2.MockTransport(reply)
        async with httpx2.AsyncClient(transport=transport, base_url="http://x") as client:
            await ask(client, "/v1/completions", {}, answered, 0.0)
        return answered

    answered = asyncio.run(one())
    assert answered.error == error and len(answered.pieces) == sum("text" in x for x in lines)


def test_what_counts_as_a_piece():
    calls = {"delta": {"tool_calls": [{"index": 0}]}}
    for choice in (
        {"text": "a"},
        {"delta": {"content": "a"}},
        {"delta": {"reasoning": "a"}},
        calls,
    ):
        assert said_in(choice)
    for choice in ({"text": ""}, {"delta": {"role": "assistant", "content": ""}}, {"delta": None}):
        assert not said_in(choice)


def test_where_there_is_no_server():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ValueError, match="needed the address of a server of OpenAI's"):
            measure_load(f"http://127.0.0.1:{taken.getsockname()[1]}", Workload(**SMALL))


def test_a_server_that_refuses_says_why(server):
    with pytest.raises(ValueError, match="refuses /v1/completions: 404 model_not_found"):
        measure_load(server.url, Workload(**SMALL), model="other")


def answers():
    """Ten answers of one, two, ... ten seconds, and one that failed."""
    made = [
        Answered(
            conversation=i, turn=i % 2, pieces=[i / 2, i / 2 + 0.25, i / 2 + 0.5], end=float(i),
            prompt_tokens=100, cached_tokens=50, answer_tokens=3,
        )
        for i in range(1, 11)
    ]  # fmt: skip
    return tuple([*made, Answered(conversation=11, turn=0, error="timeout", end=99.0)])


def test_numbers_of_a_load(tmp_path):
    result = LoadResult(
        workload=Workload(requests=6, turns=2), url="u", model="m", endpoint="chat", seconds=20.0,
        answers=answers(),
    )  # fmt: skip
    numbers = summary(result)
    assert numbers["requests"] == {
        "wanted": 12, "complete": 10, "failed": 1, "never_sent": 1, "per_second": 0.5,
    }  # fmt: skip
    assert numbers["tokens"] == {
        "prompt": 1000, "cached": 500, "answer": 30, "cached_share": 0.5,
        "prompt_per_second": 50.0, "answer_per_second": 1.5,
    }  # fmt: skip
    whole = {"mean": 5.5, "p50": 5.0, "p90": 9.0, "p99": 10.0, "max": 10.0}
    assert numbers["times"]["whole"] == whole
    assert numbers["times"]["to_first"] == {name: x / 2 for name, x in whole.items()}
    assert numbers["times"]["to_first_of_later_turns"]["max"] == 4.5
    assert (
        numbers["times"]["per_token"]["mean"] == numbers["times"]["between_pieces"]["max"] == 0.25
    )
    assert [row["error"] for row in each(result)][-2:] == [None, "timeout"]
    json.dumps(numbers)
    plot_load(result, tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    assert [percentile([3, 1, 2], part) for part in (0.01, 0.34, 0.5, 1.0)] == [1, 2, 2, 3]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"requests": 0}, "requests must be at least 1"),
        ({"rate": 0.0}, "rate must be"),
        ({"rate": float("inf")}, "rate must be"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"concurrency": None}, "a concurrency, a rate, or both"),
        ({"answer_tokens": 0}, "answer_tokens must be"),
    ],
)
def test_a_workload_that_is_none(fields, message):
    with pytest.raises(ValueError, match=message):
        Workload(**fields)


def test_the_command(server, tmp_path, capsys):
    asked = ["eval", "load", server.url, "--requests", "2", "--prompt-tokens", "9"]
    asked += ["--answer-tokens", "3", "--concurrency", "2", "--endpoint", "completions"]
    main([*asked, "--json", "--out", str(tmp_path / "load.png")])
    line = capsys.readouterr().out
    numbers = json.loads(line)
    assert line.count("\n") == 1 and numbers["tokens"]["answer"] == 6
    written = json.loads((tmp_path / "load.json").read_text())
    assert len(written.pop("each")) == 2 and written == numbers
    main(asked)
    assert "2 of 2 requests" in capsys.readouterr().out
    for wrong in ([server.url, "--checkpoint", "x"], [], [server.url, "--out", "x.json"]):
        with pytest.raises(SystemExit):
            main(["eval", "load", *wrong])
    server.idle()


def test_the_command_asks_the_server_that_it_starts(server, tmp_path, capsys, monkeypatch):
    started = []

    @contextlib.contextmanager
    def running(checkpoint, devices, options):
        started.append((checkpoint, devices.seq, options))
        yield server.url

    monkeypatch.setattr("jaxcp.cli.load.served", running)
    asked = ["--requests", "2", "--turns", "2", "--prompt-tokens", "9", "--answer-tokens", "30"]
    main(["eval", "load", "--checkpoint", "my-model", "--seq", "2", *asked, "--json"])
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["requests"]["complete"] == 4 and numbers["tokens"]["answer"] == 120
    [(checkpoint, shards, (name, room, *rest))] = started
    assert (checkpoint.name, shards, name, rest) == (
        "my-model",
        2,
        "--max-len",
        ["--max-rows", "16"],
    )
    assert int(room) >= 2 * (9 + 30)
    server.idle()


@pytest.mark.slow
def test_a_server_is_started_and_ended(tmp_path):
    folder = write_tiny_chat(tmp_path / "chat")
    with served(folder, Devices(), ["--no-warm-up", "--max-len", "64"]) as url:
        [model] = httpx2.get(f"{url}/v1/models", trust_env=False).json()["data"]
        assert (model["id"], model["max_model_len"]) == ("chat", 64)
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{url}/v1/models", trust_env=False)
    with pytest.raises(ValueError, match=r"did not start: .*config\.json"):
        with served(tmp_path, Devices(), []):
            pass
