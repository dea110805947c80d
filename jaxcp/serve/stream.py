# SPDX-License-Identifier: Apache-2.0
"""Sends an answer while it is made, and notices when nobody reads it any more."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from jaxcp.serve.errors import Refusal

T = TypeVar("T")
PATIENCE = 5.0
"""Seconds for which the status of a response waits for its first event: an answer that fails before
that has an error for its status."""
QUIET = 15.0
"""Seconds after which a stream without news sends a comment, so that nobody takes it for dead."""
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class Gone(Exception):
    """The client left."""


async def _left(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Callable[[], Awaitable[Any]], work: Awaitable[T]) -> T:
    """Finish `work`, whose result nobody has seen yet.

    Raises:
      Gone: the client left; then `work` is cancelled.
    """
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        await _end(task, left)


class EventStream:
    """A response of server-sent events.

    Args:
      chunks: the events, each with its empty line at the end.
      on_end: awaited at the end, whatever it is.
      write_seconds: time that the client may leave a chunk untaken.
      error_chunk: the last event of a stream that failed.
      error_response: the response of one that failed before its first event.
    """

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        *,
        write_seconds: float,
        error_chunk: Callable[[Refusal], bytes],
        error_response: Callable[[Refusal], Any],
        on_end: Callable[[], Awaitable[None]],
    ):
        self._on_end = on_end
        self._chunks, self._write_seconds = chunks, write_seconds
        self._error_chunk, self._error_response = error_chunk, error_response

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self._send, self._started = send, False
        left = asyncio.ensure_future(_left(receive))
        try:
            await self._follow(left)
            await self._write(b"", more=False)
        except Refusal as refusal:
            if not self._started:
                await self._error_response(refusal)(scope, receive, send)
            else:
                await self._write(self._error_chunk(refusal), more=False)
        finally:
            await _end(left)
            with contextlib.suppress(RuntimeError):  # it is being closed already
                await self._chunks.aclose()  # type: ignore[attr-defined]
            await self._on_end()

    async def _follow(self, left: asyncio.Future) -> None:
        """Send chunks as they come."""
        patience, sentinel = PATIENCE, object()
        while True:
            news = asyncio.ensure_future(anext(self._chunks, sentinel))  # type: ignore[arg-type]
            try:
                while not news.done():
                    await asyncio.wait(
                        {news, left}, timeout=patience, return_when=asyncio.FIRST_COMPLETED
                    )
                    if left.done():
                        raise Gone
                    if not news.done():
                        patience = QUIET
                        await self._write(b": the answer is being computed\n\n")
            finally:
                await _end(news)
            chunk = news.result()
            if chunk is sentinel:
                return
            patience = QUIET
            await self._write(chunk)  # type: ignore[arg-type]

    async def _write(self, body: bytes, *, more: bool = True) -> None:
        try:
            async with asyncio.timeout(self._write_seconds):
                if not self._started:
                    self._started = True
                    start = {"type": "http.response.start", "status": 200, "headers": HEADERS}
                    await self._send(start)
                await self._send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError as error:
            raise Gone from error


async def _end(*tasks: asyncio.Future) -> None:
    """Cancel what is not done, and wait until it is."""
    for task in tasks:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
