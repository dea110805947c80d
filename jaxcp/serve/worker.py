# SPDX-License-Identifier: Apache-2.0
"""The one thread that steps an engine, and what other threads may ask of it.

The event loop never waits for the engine, whose steps may take seconds: it leaves commands, which
the thread reads between two steps, and gets what a step made of all answers in one call.

    event loop                               engine's thread
    submit, cancel, ask  ── commands ──>     obey, step, obey, step ...
    Answers.deliver      <── pieces ───      one batch a step
"""

import asyncio
import collections
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from jaxcp.inference import Engine
from jaxcp.inference.request import Request
from jaxcp.serve.answers import Answers, Choice, Piece
from jaxcp.serve.errors import Refusal

LOG = logging.getLogger("jaxcp.serve")
MOST_FAILURES = 5
"""Steps that may fail in a row before the engine counts as broken."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """Numbers of the engine after its latest step."""

    running: int = 0
    waiting: int = 0
    pages: tuple[tuple[int, int, int], ...] = ()
    """Pages that are held, evictable and free, of each shard of each group."""
    steps: int = 0
    failures: int = 0
    """Steps that raised."""
    began: float | None = None
    """When the step began that runs now, on the monotonic clock."""


class Worker:
    """Runs an engine for one event loop, in a thread of its own.

    Args:
      max_requests: answers that run or wait at a time.
      on_broken: called in the event loop when the engine is given up.
    """

    def __init__(
        self,
        engine: Engine,
        loop: asyncio.AbstractEventLoop,
        *,
        max_requests: int,
        on_broken: Callable[[], None] = lambda: None,
    ):
        self.engine, self.loop, self.max_requests = engine, loop, max_requests
        self.load = Load()
        self.open = 0
        """Answers that have not ended."""
        self.broken: BaseException | None = None
        self._on_broken = on_broken
        self._answers: set[Answers] = set()
        self.refusing: Refusal | None = None
        """The answer to any new request, once none is taken any more."""
        # of the engine's thread
        self._choices: dict[Request, Choice] = {}
        self._in_a_row = 0
        self._commands: collections.deque[Callable[[], None]] = collections.deque()
        self._news = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="jaxcp-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(
        self, requests: Sequence[Request], queued: Callable[[], None] = lambda: None
    ) -> Answers:
        """Queue requests that `Engine.requests` made of one prompt.

        Args:
          queued: called in the engine's thread before they are.
        Raises:
          Refusal: too many run and wait already, or no more are taken.
        """
        self.check_open(len(requests))
        answers = Answers(requests)
        self.open += len(requests)
        self._answers.add(answers)
        self._command(lambda: self._queue(answers, queued))
        return answers

    def check_open(self, count: int = 1) -> None:
        """Raise Refusal where `count` more requests would not be taken."""
        if self.refusing is not None:
            raise self.refusing
        if self.open + count > self.max_requests:
            raise Refusal(
                429,
                f"{self.open} answers run or wait, and {self.max_requests} may; try again later",
                code="rate_limit_exceeded",
                retry_after=1,
            )

    def cancel(self, answers: Answers, choice: int | None = None) -> None:
        """End answers that nobody wants any more; those that are over stay as they are."""
        which = answers.choices if choice is None else [answers.choices[choice]]
        for one in which:
            self._command(functools.partial(self._cancel, one))

    def go_on(self, answers: Answers, index: int, request: Request) -> None:
        """Let another request go on with one of the answers, in place of the one that runs."""
        before = answers.choices[index]
        choice, ended = answers.go_on(index, request)
        self.open += ended
        self._answers.add(answers)
        self._command(functools.partial(self._replace, before, choice))

    async def ask(self, question: Callable[[Engine], Any]) -> Any:
        """Call `question` with the engine between two of its steps; what it returns."""
        future: asyncio.Future[Any] = self.loop.create_future()

        def reply(value, error):
            if future.done():
                return
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)

        def run():
            try:
                value, error = question(self.engine), None
            except Exception as raised:
                value, error = None, raised
            self._call_loop(reply, value, error)

        if self.broken is not None or not self._thread.is_alive():
            raise Refusal(503, "the engine does not run", code="engine_broken")
        self._command(run)
        return await future

    def refuse(self, refusal: Refusal) -> None:
        """Take no more requests."""
        self.refusing = self.refusing or refusal

    def end_all(self, error: BaseException) -> None:
        """End every answer with this error."""
        for answers in list(self._answers):
            self.end(answers, error)

    def end(self, answers: Answers, error: BaseException) -> None:
        """End these answers with an error, unless they are over."""
        self._ended(answers, answers.end(error))
        self.cancel(answers)

    def stop(self, timeout: float) -> bool:
        """Stop the thread after the step that runs; False if it still runs after `timeout`."""
        self._stopping = True
        self._news.set()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # what follows runs in the engine's thread, but for `_deliver` and `_ended`

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._obey()
                if self._busy():
                    self._step()
                else:
                    self._news.wait()
                    self._news.clear()
        except BaseException as error:
            LOG.exception("the engine is broken")
            self.broken = error
            self._call_loop(self._break)

    def _busy(self) -> bool:
        schedulers = self.engine.groups.schedulers
        return bool(self._choices) or any(one.in_flight for one in schedulers)

    def _obey(self) -> None:
        while self._commands:
            self._commands.popleft()()
        self._look()

    def _step(self) -> None:
        self._look(began=time.monotonic())
        try:
            self.engine.step()
        except Exception:
            LOG.exception("a step failed; the answers that it ran end with an error")
            self._in_a_row += 1
            self.load = dataclasses.replace(self.load, failures=self.load.failures + 1)
            if self._in_a_row >= MOST_FAILURES:
                raise
        else:
            self._in_a_row = 0
        self.load = dataclasses.replace(self.load, steps=self.load.steps + 1)
        self._publish()
        self._look()

    def _publish(self) -> None:
        """Hand over what is new of every answer."""
        batch: list[tuple[Answers, Piece]] = []
        for request, choice in list(self._choices.items()):
            piece = choice.take()
            if piece is not None:
                batch.append((choice.answers, piece))
                if piece.ending is not None:
                    del self._choices[request]
        if batch:
            self._call_loop(self._deliver, batch)

    def _queue(self, answers: Answers, queued: Callable[[], None]) -> None:
        try:
            queued()
            for choice in answers.choices:
                self.engine.queue(choice.request)
                self._choices[choice.request] = choice
        except Exception as error:
            LOG.exception("a request could not be queued")
            self._call_loop(self.end, answers, error)

    def _replace(self, before: Choice, choice: Choice) -> None:
        self._cancel(before)
        try:
            self.engine.queue(choice.request)
            self._choices[choice.request] = choice
        except Exception as error:
            LOG.exception("an answer could not go on")
            self._call_loop(self.end, choice.answers, error)

    def _cancel(self, choice: Choice) -> None:
        if self._choices.pop(choice.request, None) is not None:
            self.engine.cancel(choice.request)
            piece = choice.take()
            if piece is not None:
                self._call_loop(self._deliver, [(choice.answers, piece)])

    def _look(self, began: float | None = None) -> None:
        schedulers = self.engine.groups.schedulers
        pools = [pool for one in schedulers for pool in one.pages.pools]
        self.load = dataclasses.replace(
            self.load,
            running=sum(len(one.running) for one in schedulers),
            waiting=sum(len(one.waiting) for one in schedulers),
            pages=tuple((pool.held, pool.evictable, pool.free) for pool in pools),
            began=began,
        )

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._news.set()

    def _call_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody listens any more
            LOG.debug("the event loop is closed")

    def _deliver(self, batch: list[tuple[Answers, Piece]]) -> None:
        for answers, piece in batch:
            self._ended(answers, int(answers.deliver(piece)))

    def _ended(self, answers: Answers, count: int) -> None:
        self.open -= count
        if answers.over:
            self._answers.discard(answers)

    def _break(self) -> None:
        refusal = Refusal(503, "the engine is broken; the server ends", code="engine_broken")
        self.refuse(refusal)
        self.end_all(refusal)
        self._on_broken()
