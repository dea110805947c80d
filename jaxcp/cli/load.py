# SPDX-License-Identifier: Apache-2.0
"""The command that puts a load on a server: `eval load`."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes

from jaxcp.cli.devices import ONE_DEVICE, Devices
from jaxcp.cli.terminal import at_least_one

KEY = "OPENAI_API_KEY"
ROOM = 1.25
"""Tokens that a started server has room for, over those that a conversation is to have: texts have
about as many tokens as they should, and templates add some."""
MORE_ROOM = 512
LEAST = 400
"""Tokens of the longest text that goes before the load."""


def eval_load(
    url: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="URL")] = None,
    *,
    checkpoint: pathlib.Path | None = None,
    requests: int = 64,
    turns: int = 1,
    concurrency: int | None = None,
    rate: float | None = None,
    prompt_tokens: int = 512,
    answer_tokens: int = 64,
    shared_tokens: int = 0,
    endpoint: Literal["auto", "chat", "completions"] = "auto",
    ignore_eos: bool = True,
    seed: int = 0,
    name: str | None = None,
    api_key: str | None = None,
    timeout: float = 600.0,
    max_rows: int = 16,
    warm_up: bool = True,
    json_line: Annotated[bool, tyro.conf.arg(name="json")] = False,
    out: pathlib.Path | None = None,
    devices: OmitArgPrefixes[Devices] = ONE_DEVICE,
) -> None:
    """Put a load on a server of OpenAI's interface, and measure how long its answers take.

    All answers are streamed. A table has the seconds to the first token, a token (after the first,
    in the mean of an answer), between pieces of a stream, and of whole answers, at p50, p90 and
    p99; tokens a second, in and out; tokens that the server had cached; and errors by kind.

    Seconds count from when a request was due. With --rate that is whether or not there was room
    for it by --concurrency, so a server that falls behind shows.

    Args:
        url: the address of a server, as http://127.0.0.1:8000: ours, vLLM's, SGLang's.
        checkpoint: start a server of ours for this folder, and end it afterwards.
        requests: conversations; each is --turns requests.
        turns: requests of a conversation, one after the other, each with all that was said before.
        concurrency: conversations at a time (default: 16; with --rate any number).
        rate: conversations that begin a second, at random moments (a Poisson process).
        prompt_tokens: tokens that each turn adds to its conversation, about.
        answer_tokens: tokens of each answer.
        shared_tokens: tokens, about, with which all conversations begin.
        endpoint: chat sends messages, completions plain text; auto: by what the model has.
        ignore_eos: ask for answers that go on to --answer-tokens, by a field which OpenAI's own
            servers refuse.
        seed: of texts and moments.
        name: of the model; default: the first that the server has.
        api_key: default: the variable OPENAI_API_KEY.
        timeout: seconds without news after which a request has failed.
        max_rows: of a server that is started, answers that are computed at a time.
        warm_up: a server that is started compiles all programs before the load begins.
        json_line: print one line of JSON, with all numbers, in place of the table.
        out: a picture, as load.png; load.json beside it has the numbers of every request.
        devices: of a server that is started, how the devices are used.
    """
    at_least_one(max_rows=max_rows)
    if (url is None) == (checkpoint is None):
        raise ValueError("give the address of a server, or a --checkpoint to start one for")
    if out is not None and out.suffix != ".png":
        raise ValueError(
            f"--out is a picture such as load.png, with load.json beside it; got {out}"
        )
    from jaxcp.evaluate.load import Workload, measure_load

    workload = Workload(
        requests=requests, turns=turns, rate=rate, prompt_tokens=prompt_tokens,
        concurrency=16 if concurrency is None and rate is None else concurrency,
        answer_tokens=answer_tokens, shared_tokens=shared_tokens, ignore_eos=ignore_eos, seed=seed,
        endpoint=None if endpoint == "auto" else endpoint,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        if checkpoint is not None:
            options = ["--max-len", str(_room(workload)), "--max-rows", str(max_rows)]
            options += [] if warm_up else ["--no-warm-up"]
            url = stack.enter_context(served(checkpoint, devices, options))
        assert url is not None
        from rich.progress import Progress

        bar = stack.enter_context(Progress(transient=True, disable=json_line))
        task = bar.add_task("requests", total=requests * turns)
        result = measure_load(
            url, workload, model=name, key=api_key or os.environ.get(KEY), timeout=timeout,
            on_answer=lambda _: bar.advance(task),
        )  # fmt: skip
    _report(result, json_line=json_line, out=out)


def _report(result, *, json_line: bool, out: pathlib.Path | None) -> None:
    from rich.console import Console

    from jaxcp.evaluate.load_report import each, plot_load, summary, table
    from jaxcp.evaluate.pictures import draw_if_possible

    numbers = summary(result)
    if json_line:
        print(json.dumps(numbers))
    else:
        Console().print(table(numbers))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        whole = numbers | {"each": each(result)}
        out.with_suffix(".json").write_text(json.dumps(whole, indent=1))
        picture = draw_if_possible(plot_load, result, out)
        if not json_line:
            print(f"{out.with_suffix('.json')}   {picture}")


def _room(workload) -> int:
    return max(int(ROOM * workload.tokens), LEAST) + MORE_ROOM


@contextlib.contextmanager
def served(checkpoint: pathlib.Path, devices: Devices, options: Sequence[str]) -> Iterator[str]:
    """Start `jaxcp serve` on a free port, and yield its address; it is ended at last.

    Raises:
      ValueError: it does not start; the message has the end of what it said.
    """
    command = [
        sys.executable,
        "-m",
        "jaxcp",
        "serve",
        "--port",
        "0",
        "--checkpoint",
        str(checkpoint),
    ]
    command += ["--seq", str(devices.seq), "--model", str(devices.model)]
    command += options
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        with process:
            assert process.stdout is not None
            address = re.search(r"http://\S+", process.stdout.readline())
            if address is None:
                process.wait()
                log.seek(0)
                said = log.read().decode("utf-8", "replace").strip().rsplit("\n", 1)[-1]
                raise ValueError(f"the server for {checkpoint} did not start: {said:.500}")
            try:
                yield address.group()
            finally:
                process.send_signal(signal.SIGTERM)
