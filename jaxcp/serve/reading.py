# SPDX-License-Identifier: Apache-2.0
"""Makes events of tokens: of plain text, or of a chat with reasoning and calls of tools."""

import math
from collections.abc import Sequence
from typing import Any

from jaxcp.inference.logprobs import TokenLogProbs
from jaxcp.serve.answers import Piece
from jaxcp.serve.events import Call, End, Event, Reasoning, Text
from jaxcp.text.constrained import AnswerGrammar, Constrained
from jaxcp.text.stop_strings import UntilStop
from jaxcp.text.tokenizer import Tokenizer


class PlainReader:
    """Text up to a stop string, at which the engine ends it too.

    Args:
      before: text to begin with.
    """

    stopped = goes_on = False
    reasoning = 0

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], before: str = ""):
        self._text, self._before = tokenizer.detokenizer(stop), before
        self._logprobs: list[TokenLogProbs] = []
        self.generated = 0

    def take(self, piece: Piece) -> list[Event]:
        self.generated += len(piece.tokens)
        self._logprobs += piece.logprobs
        text, self._before = self._before, ""
        text += "".join(map(self._text.push, piece.tokens))
        ended = piece.ending is not None and piece.ending.reason is not None
        if ended:
            text += self._text.finish()
        events: list[Event] = []
        if text or (ended and self._logprobs):
            events.append(Text(choice=piece.choice, text=text, logprobs=tuple(self._logprobs)))
            self._logprobs = []
        if ended and piece.ending is not None and piece.ending.reason is not None:
            events.append(End(choice=piece.choice, reason=piece.ending.reason))
        return events


class ChatReader:
    """Events of what a chat's parser reads; stop strings end the text of an answer, nothing else.

    Args:
      prompt: a rendered conversation (`jaxcp.text.chat`).
      special: ids of control tokens, whose log-probabilities are those of no text.
      one_call: end the answer after the first call of a tool.
      grammar: that of the answer, which begins where thinking ends, by another request.
      ends: ids that end an answer.
      most: tokens of the answer at most; no other request goes on where there are none left.
    """

    def __init__(
        self,
        prompt: Any,
        stop: Sequence[str],
        *,
        special: frozenset[int] = frozenset(),
        one_call: bool = False,
        grammar: AnswerGrammar | None = None,
        ends: Sequence[int] = (),
        most: float = math.inf,
    ):
        self._most = most
        self._parser, self._stop = prompt.parser(grammar), tuple(stop)
        self.constrained = Constrained(self._parser, grammar, ends)
        self._until, self._pushed, self._given = UntilStop(stop), "", 0
        self._special, self._one_call = special, one_call
        self._logprobs: list[TokenLogProbs] = []
        self._calls: set[int] = set()
        self.tokens: list[int] = []
        """All tokens of the answer, those that closed its thinking among them."""
        self.goes_on = self.stopped = False

    @property
    def generated(self) -> int:
        return len(self.tokens)

    @property
    def reasoning(self) -> int:
        return self._parser.reasoning_tokens

    def take(self, piece: Piece) -> list[Event]:
        self.goes_on = False
        events: list[Event] = []
        ending = piece.ending
        for number, token in enumerate(piece.tokens):
            if not self._parser.reasoning and token not in self._special:
                self._logprobs += piece.logprobs[number : number + 1]
            self._push([token], piece.choice, events)
            if self.goes_on and self.generated >= self._most:
                self.goes_on = False
                self._finish("length", piece.choice, events)
            if self.stopped or self.goes_on:
                return _joined(events)
        if ending is not None and ending.reason is not None:
            if ending.stop_token is not None:
                self._read(self._parser.push([ending.stop_token]), piece.choice, events)
            self._finish(ending.reason, piece.choice, events)
        return _joined(events)

    def _push(self, tokens: Sequence[int], choice: int, events: list[Event]) -> None:
        """Read tokens; where a budget of thinking is spent, those that close it as well."""
        self.tokens += tokens
        self._read(self._parser.push(tokens), choice, events)
        closing = self._parser.closing
        if closing and self.generated + len(closing) < self._most:
            self.goes_on = True
            self._push(closing, choice, events)
        if self.constrained.moved():
            self.goes_on = True

    def _read(self, deltas: Sequence[Any], choice: int, events: list[Event]) -> None:
        for delta in deltas:
            if self.stopped:
                return
            if delta.kind == "reasoning":
                events.append(Reasoning(choice=choice, text=delta.text))
            elif delta.kind == "call":
                self._call(delta.call, choice, events)
            else:
                self._pushed += delta.text if self._stop else ""
                self._say(self._until.push(delta.text), choice, events)
                if self._until.stopped:
                    self._end(choice, "stop", events, self._which())

    def _say(self, text: str, choice: int, events: list[Event]) -> None:
        if text:
            self._given += len(text)
            events.append(Text(choice=choice, text=text, logprobs=tuple(self._logprobs)))
            self._logprobs = []

    def _which(self) -> str | None:
        """The stop string before which the text ended."""
        fitting = (stop for stop in self._stop if self._pushed.startswith(stop, self._given))
        return next(fitting, None)

    def _call(self, call: Any, choice: int, events: list[Event]) -> None:
        if self._one_call and call.index and not call.broken:
            self._end(choice, "tool_calls", events)
            return
        self._say(self._until.finish(), choice, events)
        self._until, self._pushed, self._given = UntilStop(self._stop), "", 0
        self._logprobs = []
        (self._calls.discard if call.broken else self._calls.add)(call.index)
        events.append(
            Call(
                choice=choice, number=call.index, id=call.id or "", name=call.name or "",
                arguments=call.arguments or "", broken=call.broken,
            )
        )  # fmt: skip

    def _finish(self, reason: str, choice: int, events: list[Event]) -> None:
        self._read(self._parser.finish(), choice, events)
        if not self.stopped:
            self._close(choice, reason, events)

    def _close(self, choice: int, reason: str, events: list[Event]) -> None:
        self._say(self._until.finish(), choice, events)
        self._end(choice, "tool_calls" if self._calls and reason == "stop" else reason, events)

    def _end(self, choice: int, reason: str, events: list[Event], stop: str | None = None) -> None:
        self.stopped = True
        events.append(End(choice=choice, reason=reason, stop=stop))


def _joined(events: list[Event]) -> list[Event]:
    """Make one event of neighbors that say one thing in parts."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, Text) and isinstance(last, Text):
            joined[-1] = Text(
                choice=event.choice,
                text=last.text + event.text,
                logprobs=last.logprobs + event.logprobs,
            )
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            joined[-1] = Reasoning(choice=event.choice, text=last.text + event.text)
        else:
            joined.append(event)
    return joined
