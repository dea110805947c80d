# SPDX-License-Identifier: Apache-2.0
"""A server from its start to its end: sockets, signals, the engine's thread."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxcp.inference import Engine
from jaxcp.serve.app import application
from jaxcp.serve.config import ServeConfig
from jaxcp.serve.conversations import Conversations
from jaxcp.serve.errors import Refusal
from jaxcp.serve.model import Served
from jaxcp.serve.record import Metrics
from jaxcp.serve.worker import Worker

LOG = logging.getLogger("jaxcp.serve")
LAST_SECONDS = 5.0
"""Seconds after `grace_seconds` when the process exits at the latest."""
MOST_HEAD_BYTES = 64 * 2**10


class Bounded(H11Protocol):
    """A connection on which a head must come in time, and what is sent must be taken."""

    read_seconds = write_seconds = 30.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if connection is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            wait = int(self.write_seconds * 1000)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, wait)
        self._head_alarm = self.loop.call_later(self.read_seconds, self._check_head)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_alarm.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._head_alarm.cancel()
        self._head_alarm = self.loop.call_later(self.read_seconds, self._check_head)
        super().on_response_complete()

    def _check_head(self) -> None:
        """Close a connection that has sent no whole head of a request."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


class Server(uvicorn.Server):
    """uvicorn's server without its handlers of signals, which end the process by the signal."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Process:
    """A server in this process; `run` returns when it has ended."""

    def __init__(self, engine: Engine, config: ServeConfig):
        self.engine, self.config = engine, config
        self.url = ""
        self.served: Served | None = None
        self._server: Server | None = None
        self._ending = False

    async def run(self, ready: Callable[["Process"], None] = lambda process: None) -> None:
        """Serve until `end`, or until the engine is broken.

        Args:
          ready: called once requests are taken; `url` is set by then.
        Raises:
          OSError: the address cannot be had.
          RuntimeError: the engine was broken.
        """
        loop = asyncio.get_running_loop()
        assert self.engine.tokenizer is not None
        worker = Worker(
            self.engine, loop, max_requests=self.config.max_requests, on_broken=self._stop
        )
        self.served = Served(
            engine=self.engine, tokenizer=self.engine.tokenizer, config=self.config,
            worker=worker, metrics=Metrics(), conversations=Conversations(),
        )  # fmt: skip
        listener = _listener(self.config)
        host, port = listener.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._server = Server(self._uvicorn(self.served))
        worker.start()
        try:
            loop.call_soon(ready, self)
            await self._server.serve(sockets=[listener])
        finally:
            worker.end_all(_ends())
            self.served.workshop.shutdown(wait=False, cancel_futures=True)
            self.stopped = await asyncio.to_thread(worker.stop, LAST_SECONDS / 2)
        if worker.broken is not None:
            raise RuntimeError("the engine is broken") from worker.broken

    def end(self) -> None:
        """Take no more requests; answers have `grace_seconds` to finish. For the loop's thread."""
        if self._ending or self.served is None:
            return
        self._ending = True
        LOG.info("ending: answers have %g s to finish", self.config.grace_seconds)
        worker = self.served.worker
        worker.refuse(_ends())
        worker.loop.call_later(self.config.grace_seconds, worker.end_all, _ends())
        self._stop()

    def _stop(self) -> None:
        if self._server is not None:
            self._server.should_exit = True

    def _uvicorn(self, served: Served) -> uvicorn.Config:
        config = self.config

        class Connection(Bounded):
            read_seconds, write_seconds = config.read_seconds, config.write_seconds

        return uvicorn.Config(
            application(served), http=Connection, ws="none", lifespan="off", log_config=None,
            access_log=False, server_header=False, limit_concurrency=config.max_connections,
            timeout_keep_alive=int(max(1, config.read_seconds)), backlog=2048,
            h11_max_incomplete_event_size=MOST_HEAD_BYTES,
            timeout_graceful_shutdown=int(config.grace_seconds + LAST_SECONDS / 2),
        )  # fmt: skip


def serve(engine: Engine, config: ServeConfig, ready: Callable[[Process], None]) -> None:
    """Serve until SIGTERM or SIGINT, in the main thread.

    Raises:
      OSError: the address cannot be had.
      RuntimeError: the engine was broken.
    """
    process = Process(engine, config)

    async def main():
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, process.end)
        await process.run(ready)

    asyncio.run(main())
    if not process.stopped:  # a step that does not end, which no Python can interrupt
        LOG.warning("the engine's last step did not end")
        logging.shutdown()
        os._exit(0)


def _ends() -> Refusal:
    return Refusal(503, "the server is shutting down", code="shutting_down", retry_after=5)


def _listener(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise OSError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror}; name another --port"
        ) from error
    return listener
