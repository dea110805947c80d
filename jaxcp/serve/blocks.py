# SPDX-License-Identifier: Apache-2.0
"""Divides an answer into blocks of one kind, as Anthropic's interface and that of responses do."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from jaxcp.serve.events import Call, End, Event, Reasoning, Text


@dataclasses.dataclass(kw_only=True)
class Block:
    """A run of reasoning, of text, or one call of a tool."""

    index: int
    kind: Literal["reasoning", "text", "call"]
    text: str = ""
    """Text so far; the arguments of a call."""
    id: str = ""
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Step:
    """A block begins, goes on with a text, or ends."""

    what: Literal["begin", "more", "end"]
    block: Block
    text: str = ""


class Blocks:
    """The blocks of one answer, as its events come."""

    def __init__(self):
        self.all: list[Block] = []
        self.reason: str | None = None
        self.stop: str | None = None
        self._number: int | None = None  # of the call that is open
        self._open = False

    def take(self, event: Event) -> Iterator[Step]:
        """Yield what an event does to blocks."""
        if isinstance(event, End):
            self.reason, self.stop = event.reason, event.stop
            yield from self._end()
        elif isinstance(event, Call):
            yield from self._call(event)
        elif isinstance(event, Text | Reasoning):
            kind: Literal["reasoning", "text"] = "text" if isinstance(event, Text) else "reasoning"
            if not self._open or self.all[-1].kind != kind:
                yield from self._begin(Block(index=len(self.all), kind=kind))
            yield from self._more(event.text)

    def _call(self, event: Call) -> Iterator[Step]:
        if event.broken:
            yield from self._end()
            self.all = [x for x in self.all if x.kind != "call" or x.id != event.id or not x.id]
            return
        if not self._open or self.all[-1].kind != "call" or self._number != event.number:
            self._number = event.number
            block = Block(index=len(self.all), kind="call", id=event.id, name=event.name)
            yield from self._begin(block)
        yield from self._more(event.arguments)

    def _begin(self, block: Block) -> Iterator[Step]:
        yield from self._end()
        self.all.append(block)
        self._open = True
        yield Step("begin", block)

    def _more(self, text: str) -> Iterator[Step]:
        if text:
            self.all[-1].text += text
            yield Step("more", self.all[-1], text)

    def _end(self) -> Iterator[Step]:
        if self._open:
            self._open = False
            yield Step("end", self.all[-1])
