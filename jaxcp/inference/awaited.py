# SPDX-License-Identifier: Apache-2.0
"""An engine's answers for coroutines, which share its steps.

A step may take seconds, so it runs in a thread. Coroutines of one event loop that all want the next
one await the same; each then takes what came of its own request.
"""

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any

from jaxcp.inference.request import Request


class Awaited:
    """Steps for coroutines of any event loops.

    Args:
      queue, step, cancel: those of the engine.
    """

    def __init__(
        self,
        *,
        queue: Callable[[Request], None],
        step: Callable[[], Any],
        cancel: Callable[[Request], None],
    ):
        self._queue, self._step, self._cancel = queue, step, cancel
        self._running: weakref.WeakKeyDictionary[Any, asyncio.Task] = weakref.WeakKeyDictionary()

    async def stream(self, request: Request) -> AsyncIterator[int]:
        """Queue a request and yield the tokens of its answer; leaving cancels it."""
        await asyncio.to_thread(self._queue, request)
        given = request.prompt_len
        try:
            while not request.done or given < len(request.tokens):
                if given < len(request.tokens):
                    yield request.tokens[given]
                    given += 1
                else:
                    await self._next_step()
        finally:
            if not request.done:
                await asyncio.shield(asyncio.to_thread(self._cancel, request))
        if request.error is not None:
            raise request.error

    async def _next_step(self) -> None:
        """Wait for the step that runs, or for a new one."""
        loop = asyncio.get_running_loop()
        task = self._running.get(loop)
        if task is None or task.done():
            task = loop.create_task(asyncio.to_thread(self._step))
            self._running[loop] = task
        await asyncio.shield(task)  # who leaves leaves the step to the others
