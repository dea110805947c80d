# SPDX-License-Identifier: Apache-2.0
"""Tokens on their way from the engine's thread to the event loop that answers a client."""

import asyncio
import collections
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from jaxcp.inference.logprobs import TokenLogProbs
from jaxcp.inference.request import Request


class Ending(NamedTuple):
    """The end of an answer."""

    reason: str | None
    """"stop" or "length"; None where an error, or a client that left, ended it."""
    error: BaseException | None = None
    stop_token: int | None = None
    """The token that ended it, which is none of its own."""


class Piece(NamedTuple):
    """News of one answer from one step; its last piece has its ending."""

    choice: int
    turn: int
    """Counts the requests that make this answer one after the other, from 0."""
    tokens: list[int]
    logprobs: list[TokenLogProbs]
    ending: Ending | None


@dataclasses.dataclass(eq=False)
class Choice:
    """One of the answers to a prompt, as the engine's thread sees it."""

    request: Request
    answers: "Answers"
    index: int
    turn: int = 0
    given: int = 0
    """Tokens that were handed over."""
    reused: int | None = None
    """Tokens of the prompt that were in the pool when it was first admitted."""

    def take(self) -> Piece | None:
        """Hand over what is new, if anything is."""
        request = self.request
        if self.reused is None and request.stats.admitted is not None:
            self.reused = min(request.stats.reused, request.prompt_len)
        begin = request.prompt_len + self.given
        tokens = request.tokens[begin:].tolist()
        if not tokens and not request.done:
            return None
        logprobs = []
        if request.sampling.logprobs is not None:
            logprobs = request.output.logprobs[self.given : self.given + len(tokens)]
        self.given += len(tokens)
        ending = _ending(request) if request.done else None
        return Piece(self.index, self.turn, tokens, logprobs, ending)


def _ending(request: Request) -> Ending:
    if request.error is not None:
        return Ending(None, request.error)
    return Ending(request.finish_reason, None, request.stop_token)


class Answers:
    """The answers to one prompt: what the engine's thread made of them, in the order of its steps.

    What waits here is bounded by the tokens that were asked for. All methods are for the event
    loop's thread.
    """

    def __init__(self, requests: Sequence[Request]):
        self.choices = [Choice(request, self, i) for i, request in enumerate(requests)]
        self._first = self.choices[0]
        self._pieces: collections.deque[Piece] = collections.deque()
        self._news = asyncio.Event()
        self._open = set(range(len(self.choices)))

    @property
    def over(self) -> bool:
        """True when every one of them has ended; pieces may still be unread."""
        return not self._open

    def deliver(self, piece: Piece) -> bool:
        """Take a piece from the engine's thread; True if it ends its answer."""
        late = piece.turn != self.choices[piece.choice].turn
        if late or piece.choice not in self._open:
            return False
        self._pieces.append(piece)
        self._news.set()
        if piece.ending is None:
            return False
        self._open.discard(piece.choice)
        return True

    def go_on(self, index: int, request: Request) -> tuple[Choice, bool]:
        """Let another request go on with an answer; what came of the one before is forgotten.

        Returns whether the answer had ended as well.
        """
        ended = index not in self._open
        choice = Choice(request, self, index, self.choices[index].turn + 1)
        self.choices[index] = choice
        self._pieces = collections.deque(x for x in self._pieces if x.choice != index)
        self._open.add(index)
        return choice, ended

    def end(self, error: BaseException) -> int:
        """End what has not ended; how many that are."""
        still = sorted(self._open)
        for index in still:
            self.deliver(Piece(index, self.choices[index].turn, [], [], Ending(None, error)))
        return len(still)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while self._pieces or self._open:
            if not self._pieces:
                self._news.clear()
                await self._news.wait()
            else:
                yield self._pieces.popleft()

    @property
    def prompt_tokens(self) -> int:
        return self._first.request.prompt_len

    @property
    def reused(self) -> int:
        """Tokens of the prompt that the pool had when its first answer began."""
        return self._first.reused or 0
