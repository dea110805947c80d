# SPDX-License-Identifier: Apache-2.0
"""Reads one answer of a chat model as a person sees it: pieces of text, and calls of tools."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxcp.text.parser import Parser
from jaxcp.text.stop_strings import UntilStop
from jaxcp.text.tools.deltas import Delta


class Piece(str):
    """A piece of what a model writes: a string, and which stream it belongs to."""

    kind: str
    """"text" of the answer, or "reasoning"."""

    def __new__(cls, text: str, kind: str = "text") -> "Piece":
        piece = super().__new__(cls, text)
        piece.kind = kind
        return piece


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A call of a tool that a model asks for."""

    id: str
    name: str
    arguments: dict[str, Any]


class Answer:
    """Reads an answer, id by id.

    Args:
      stop: strings before the first of which the text ends; they mean nothing in thinking.
    """

    def __init__(self, parser: Parser, stop: Sequence[str] = ()):
        self._parser, self._until, self._said = parser, UntilStop(stop), ""

    @property
    def stopped(self) -> bool:
        """True from when the text has ended at a stop string."""
        return self._until.stopped

    @property
    def reasoning(self) -> bool:
        """True while what comes is thought."""
        return self._parser.reasoning

    @property
    def closing(self) -> tuple[int, ...]:
        """The ids that end the thinking where its budget is spent: push them, and go on."""
        return self._parser.closing

    def push(self, ids: Iterable[int]) -> list[Piece]:
        """Take the next ids, the token that ended the answer among them."""
        return self._pieces(self._parser.push(ids))

    def finish(self) -> list[Piece]:
        """Give out the rest: no more ids come."""
        pieces = self._pieces(self._parser.finish())
        return pieces if self.stopped else pieces + self._text(self._until.finish())

    def message(self) -> dict[str, Any]:
        """Return what was given out so far as an assistant's message in OpenAI's form.

        A call that is not complete is left out, so that the message can always be rendered.
        """
        fields = self._parser.message()
        calls = [call for call in fields.pop("tool_calls", ()) if _complete(call)]
        fields["content"] = self._said
        return fields | ({"tool_calls": calls} if calls else {})

    def _pieces(self, deltas: Iterable[Delta]) -> list[Piece]:
        pieces: list[Piece] = []
        for delta in deltas:
            if delta.kind == "reasoning" and delta.text:
                pieces.append(Piece(delta.text, "reasoning"))
            elif delta.kind == "text":
                pieces += self._text(self._until.push(delta.text))
        return pieces

    def _text(self, text: str) -> list[Piece]:
        self._said += text
        return [Piece(text)] if text else []


def calls_of(message: Mapping[str, Any]) -> list[Call]:
    """Read the calls of an assistant's message."""
    return [
        Call(
            id=call["id"],
            name=call["function"]["name"],
            arguments=json.loads(call["function"]["arguments"]),
        )
        for call in message.get("tool_calls", ())
    ]


def _complete(call: Mapping[str, Any]) -> bool:
    try:
        return isinstance(json.loads(call["function"]["arguments"]), dict)
    except ValueError:
        return False
