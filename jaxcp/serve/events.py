# SPDX-License-Identifier: Apache-2.0
"""Events of answers, for every interface the same: text, reasoning, calls of tools, an end."""

import dataclasses
import functools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, Protocol

from jaxcp.inference.logprobs import TokenLogProbs
from jaxcp.inference.request import Request
from jaxcp.serve.answers import Answers, Piece
from jaxcp.serve.errors import Refusal, failed
from jaxcp.serve.record import Record
from jaxcp.serve.worker import Worker


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happens in the answer number `choice`."""

    choice: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(Event):
    text: str
    logprobs: tuple[TokenLogProbs, ...] = ()
    """One for each token since the text before, where they were asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reasoning(Event):
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call(Event):
    """A call of a tool begins (it has a name), or its arguments go on."""

    number: int
    """It is this of the calls of its answer, from 0."""
    id: str = ""
    name: str = ""
    arguments: str = ""
    broken: bool = False
    """It will not be complete; what the model wrote comes as text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class End(Event):
    reason: str
    """ "stop", "length" or "tool_calls"."""
    stop: str | None = None
    """The stop string that ended it."""


class Reader(Protocol):
    """Makes events of the tokens of one answer."""

    @property
    def generated(self) -> int:
        """Tokens that belong to it."""

    @property
    def reasoning(self) -> int:
        """Tokens of it that were reasoning."""

    @property
    def stopped(self) -> bool:
        """True from when it has ended though the engine goes on: nothing more is read."""

    @property
    def goes_on(self) -> bool:
        """True if another request must go on with what was read so far: see `Job.next_request`."""

    def take(self, piece: Piece) -> list[Event]:
        """Read more tokens."""


@dataclasses.dataclass(kw_only=True)
class Usage:
    """Tokens of a request and its answers."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0
    reasoning: int = 0


@dataclasses.dataclass(kw_only=True)
class Job:
    """Answers to make: a request of the engine for each, and a reader of what comes of it."""

    requests: Sequence[Request]
    readers: Sequence[Reader]
    next_request: Callable[[int], Request] | None = None
    """Makes the request that goes on with the answer of this number."""
    usage: Usage = dataclasses.field(default_factory=Usage)


async def happening(
    worker: Worker,
    answers: Answers,
    job: Job,
    record: Record,
    *,
    seconds: float,
    prepare: Callable[[Callable[[], Any]], Awaitable[Any]],
) -> AsyncGenerator[Event]:
    """Yield what happens in the answers; leaving ends them.

    Args:
      prepare: calls what takes long in another thread.
    Raises:
      Refusal: a step failed, the time is over, or the server ends.
    """
    late = Refusal(504, f"no answer within {seconds:g} s", code="request_timeout")
    alarm = worker.loop.call_later(seconds, worker.end, answers, late)
    try:
        async for piece in answers:
            reader = job.readers[piece.choice]
            if reader.stopped:
                continue
            record.tokens(piece.choice, len(piece.tokens), time.monotonic())
            events = reader.take(piece)
            _count(job, answers)
            for event in events:
                if isinstance(event, End):
                    record.finish = event.reason
                yield event
            if reader.stopped:
                worker.cancel(answers, piece.choice)
            elif reader.goes_on and job.next_request is not None:
                request = await prepare(functools.partial(job.next_request, piece.choice))
                worker.go_on(answers, piece.choice, request)
            elif piece.ending is not None and piece.ending.error is not None:
                raise failed(piece.ending.error)
    finally:
        alarm.cancel()
        worker.cancel(answers)
        _count(job, answers)
        record.usage(job.usage.prompt, job.usage.cached, job.usage.generated)


def _count(job: Job, answers: Answers) -> None:
    job.usage.prompt, job.usage.cached = answers.prompt_tokens, answers.reused
    job.usage.generated = sum(reader.generated for reader in job.readers)
    job.usage.reasoning = sum(reader.reasoning for reader in job.readers)
