# SPDX-License-Identifier: Apache-2.0
"""A server in a thread of this process, for tests that talk to it over a socket."""

import asyncio
import contextlib
import json
import threading
import time

import httpx2

import jaxcp
from jaxcp.serve.config import ServeConfig
from jaxcp.serve.process import Process

MODEL = "tiny"


def fail_later(engine, monkeypatch, steps=20):
    """Let a step fail after so many, once."""
    run, left = engine.runner.run, iter(range(steps))

    def broken(plans):
        if next(left, None) is not None:
            return run(plans)
        monkeypatch.undo()
        raise RuntimeError("on fire")

    monkeypatch.setattr(engine.runner, "run", broken)


class Running:
    """What tests need of a server that runs."""

    def __init__(self, process: Process):
        self.process, self.url, self.engine = process, process.url, process.engine
        self.http = httpx2.Client(base_url=self.url, timeout=120, trust_env=False)

    def post(self, path, **fields):
        return self.http.post(path, json=fields)

    def complete(self, prompt, **fields):
        """The body of a completion that must succeed; greedy unless a temperature is named."""
        fields = {"prompt": prompt, "temperature": 0, **fields}
        reply = self.post("/v1/completions", **fields)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def events(self, path, **fields):
        """The data of all events of a stream that must succeed."""
        with self.http.stream("POST", path, json={"stream": True, **fields}) as reply:
            text = reply.read().decode()
            assert reply.status_code == 200, text
            assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in text.split("\n") if line.startswith("data: ")]
        return [line.removeprefix("data: ") for line in lines]

    def stream(self, prompt, **fields):
        """The chunks of a completion that is streamed, without the last event."""
        fields = {"prompt": prompt, "temperature": 0, **fields}
        *chunks, done = self.events("/v1/completions", **fields)
        assert done == "[DONE]"
        return [json.loads(chunk) for chunk in chunks]

    def ask(self, question):
        """What `question` returns of the engine, between two of its steps."""
        worker = self.process.served.worker
        return asyncio.run_coroutine_threadsafe(worker.ask(question), worker.loop).result(60)

    def idle(self, seconds=120):
        """Wait until no answer runs, and see that every page is where it should be."""
        worker, end = self.process.served.worker, time.monotonic() + seconds
        while worker.open or worker.load.running or worker.load.waiting:
            assert time.monotonic() < end, f"still {worker.open} answers, {worker.load}"
            time.sleep(0.01)
        self.ask(lambda engine: [one.check() for one in engine.groups.schedulers])
        for pages in self.ask(lambda engine: [one.pages for one in engine.groups.schedulers]):
            assert all(pool.held == 0 for pool in pages.pools)


@contextlib.contextmanager
def running(engine: jaxcp.Engine, **options):
    """Serve `engine` until the end of the block."""
    config = ServeConfig(**{"name": MODEL, "port": 0, "grace_seconds": 10.0, **options})
    process, ready, failure = Process(engine, config), threading.Event(), []

    def run():
        try:
            asyncio.run(process.run(lambda _: ready.set()))
        except BaseException as error:
            failure.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(60) and not failure, failure
    server = Running(process)
    try:
        yield server
    finally:
        server.http.close()
        process.served.worker.loop.call_soon_threadsafe(process.end)
        thread.join(60)
        assert not thread.is_alive(), "the server does not end"
    if failure:
        raise failure[0]
