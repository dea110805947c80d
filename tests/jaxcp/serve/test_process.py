# SPDX-License-Identifier: Apache-2.0
"""`jaxcp serve` as a process: its first line, its end, and many streams at once."""

import concurrent.futures
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
from chat_folders import write_model
from running_server import running
from tiny_chat import spread, write_tiny_chat

from jaxcp import Sampling

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_chat(tmp_path_factory.mktemp("served") / "tiny")


@contextlib.contextmanager
def served(folder, *options):
    """A process that serves, with its address; killed at the end if it is still there."""
    command = [sys.executable, "-m", "jaxcp.cli.main", "serve", "--checkpoint", str(folder)]
    process = subprocess.Popen(
        [*command, "--port", "0", "--max-len", "1024", "--no-warm-up", *options],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        url = re.search(r"at (http://127\.0\.0\.1:\d+)$", line.strip())
        assert url, line + process.stderr.read()
        yield process, url.group(1)
    finally:
        process.kill()
        process.communicate()


def test_help_is_quick_and_needs_no_server():
    code = (
        "import sys; sys.argv = ['jaxcp', 'serve', '--help']\n"
        "from jaxcp.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: assert not {'jax', 'starlette', 'uvicorn'} & {*sys.modules}\n"
        "import time; print(time.process_time())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "--grace-seconds" in done.stdout and "--api-keys" in done.stdout
    assert float(done.stdout.split()[-1]) < 1.0


@pytest.mark.slow
def test_a_port_that_is_taken_is_an_error_of_one_line(server, folder):
    port = server.url.rsplit(":", 1)[1]
    command = [sys.executable, "-m", "jaxcp.cli.main", "serve", "--checkpoint", str(folder)]
    done = subprocess.run(
        [*command, "--port", port, "--no-warm-up"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "name another --port" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_the_tokenizer_of_another_model_is_an_error_before_anything_is_compiled(tmp_path):
    shutil.copytree(ROOT / "tests/fixtures/qwen3-moe-tiny", tmp_path / "mixed")
    folder = write_model(tmp_path / "mixed", "qwen3")
    done = subprocess.run(
        [sys.executable, "-m", "jaxcp.cli.main", "serve", "--checkpoint", str(folder)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "needed a tokenizer of the model's 256 ids" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_server_says_that_it_compiles_before_it_listens(folder):
    with served(folder, "--warm-up", "--max-rows", "1") as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert "compiling what requests need" in process.stderr.readline()


@pytest.mark.slow
def test_sigterm_under_load_ends_streams_with_a_reason_and_exits_0(folder):
    with served(folder, "--grace-seconds", "3") as (process, url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            ask = {"model": "tiny", "prompt": "a", "stream": True, "temperature": 0}
            next(iter(client.completions.create(max_tokens=2, **ask)))  # compiles
            long = {"max_tokens": 1000, "extra_body": {"ignore_eos": True}}
            streams = [client.completions.create(**ask, **long) for _ in range(6)]
            letters = {"logit_bias": {"65": 100}}  # each token is a chunk
            short = client.completions.create(max_tokens=20, extra_body=letters, **ask)
            for stream in streams:
                next(iter(stream))
            for _, _chunk in zip(range(18), short, strict=False):  # it is nearly done
                pass
            process.send_signal(signal.SIGTERM)
            started = time.monotonic()
            ends = []
            for stream in [*streams, short]:
                try:
                    reasons = [c.choices[0].finish_reason for c in stream]
                    ends.append(reasons[-1])
                except openai.APIError as error:
                    ends.append(error.code)
            with pytest.raises((openai.APIConnectionError, openai.InternalServerError)):
                client.completions.create(**ask)
        assert process.wait(30) == 0, process.stderr.read()
        assert time.monotonic() - started < 3 + 5 + 60  # the machine may be slow
        assert ends[-1] in ("length", "stop"), ends
        assert {*ends} <= {"shutting_down", "length", "stop"}, ends
        lines = [x for x in process.stderr.read().splitlines() if x.startswith("{")]
        assert len(lines) >= 8 and all(json.loads(line)["status"] for line in lines)


@pytest.mark.slow
def test_64_streams_at_once_say_what_each_says_alone(engine):
    """And what a request draws does not depend on its neighbors (vllm-project/vllm#51226)."""
    prompts = spread(64)
    options = [
        {"max_tokens": 8 + i % 7, "temperature": i % 3 / 2, "seed": i, "n": 1 + i % 2}
        for i in range(64)
    ]
    alone = [
        engine.generate([prompt], Sampling(**{"max_new_tokens": one.pop("max_tokens"), **one}))
        for prompt, one in zip(prompts, [dict(one) for one in options], strict=True)
    ]
    expected = [[result.text for result in results] for results in alone]
    with running(engine) as server, concurrent.futures.ThreadPoolExecutor(64) as pool:

        def stream(prompt, one):
            chunks = server.stream(prompt, stream_options={"include_usage": True}, **one)
            texts = [""] * one["n"]
            for choice in (choice for chunk in chunks for choice in chunk["choices"]):
                texts[choice["index"]] += choice["text"]
            return texts, chunks[-1]["usage"]["completion_tokens"]

        given = [*pool.map(stream, prompts, options)]
        server.idle()
    assert [texts for texts, _ in given] == expected
    tokens = [sum(len(result.tokens) for result in results) for results in alone]
    assert [count for _, count in given] == tokens


@pytest.mark.slow
def test_clients_that_vanish_leave_nothing_behind(engine):
    """64 streams, every other one of which is dropped at another moment."""
    prompts = spread(64, seed=1)
    with running(engine) as server, concurrent.futures.ThreadPoolExecutor(16) as pool:

        def stream(i):
            body = {"prompt": prompts[i], "max_tokens": 30, "stream": True, "n": 1 + i % 3}
            with server.http.stream("POST", "/v1/completions", json=body) as reply:
                for count, _ in enumerate(reply.iter_raw()):
                    if i % 2 and count > i % 9:
                        return

        [*pool.map(stream, range(64))]
        server.idle()
        assert "jaxcp_step_failures 0.0" in server.http.get("/metrics").text


@pytest.mark.slow
def test_two_clients_on_one_conversation(engine):
    """Whoever comes second finds what the first one has computed, and both have their answers."""
    prompt = spread(1, seed=2)[0] * 5
    with running(engine) as server, concurrent.futures.ThreadPoolExecutor(2) as pool:
        fields = {"max_tokens": 20, "prompt_cache_key": "shared"}
        for turn in range(3):
            both = [*pool.map(lambda _: server.complete(prompt, **fields), range(2))]  # noqa: B023
            assert both[0]["choices"] == both[1]["choices"]
            text = both[0]["choices"][0]["text"].encode("utf-8", "ignore")
            cached = [x["usage"]["prompt_tokens_details"]["cached_tokens"] for x in both]
            assert turn == 0 or min(cached) > 0
            prompt = [*prompt, *text]
        server.idle()
