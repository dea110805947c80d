# SPDX-License-Identifier: Apache-2.0
"""Reads text that comes in pieces up to the next of some markers, and gives out deltas.

A reader is written as if the whole text were there: a generator that waits where it is not. Markers
that are tokens of the vocabulary come as one character each, a lone surrogate, which no text has;
so a model that spells `</think>` out letter by letter has written text, and no marker.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import Any

from jaxcp.text.tools.deltas import Delta, ToolCallDelta

Reading = Generator[None, None, Any]
Sink = Callable[[str], None]
SYMBOL = re.compile("([\ud800-\udfff])")


class Malformed(Exception):
    """Raised where a call turns out to be none; no reader lets it out."""


class Symbols:
    """The markers of a format as a vocabulary has them.

    Args:
      tokens: all added tokens of the tokenizer, as they are written.
      names: markers of the format, such as `</think>`. Where the vocabulary has them with a suffix
        (`</think:opensource>`), so are they meant.
    """

    def __init__(self, tokens: Collection[str], names: Sequence[str]):
        suffixes = (re.fullmatch(r"</think(:\w+)>", token) for token in tokens)
        self.suffix = next((match[1] for match in suffixes if match), "")
        """Ends the names of all control tokens of the vocabulary; often nothing."""
        literals = {name: self.literal(name) for name in names}
        known = [name for name in names if literals[name] in tokens]
        self._symbol_of = {name: chr(0xD800 + i) for i, name in enumerate(known)}
        self.tokens = {literals[name]: symbol for name, symbol in self._symbol_of.items()}
        """The symbol of each marker that is a token."""
        self._literal_of = {symbol: token for token, symbol in self.tokens.items()}

    def literal(self, name: str) -> str:
        """Write a marker as the vocabulary has it."""
        if not self.suffix or not name.endswith(">") or name.startswith("<|"):
            return name
        end = -2 if name.endswith("｜>") else -1
        return name[:end] + self.suffix + name[end:]

    def spell(self, marker: str) -> str:
        """Write a marker as readers see it: a symbol, or text which may have symbols in it."""
        if marker in self._symbol_of:
            return self._symbol_of[marker]
        for name, symbol in self._symbol_of.items():
            marker = marker.replace(name, symbol)
        return marker

    def verbatim(self, text: str) -> str:
        """Write symbols as the model did."""
        return SYMBOL.sub(lambda match: self._literal_of.get(match[0], ""), text)


class Reader:
    """The state of reading one message. A subclass says in `read` what it consists of.

    Args:
      schemas: for each function that may be called, the schema of its arguments.
      seed: bytes from which the ids of calls are made.
    """

    def __init__(
        self, symbols: Symbols, schemas: Mapping[str, Mapping[str, Any]], seed: bytes = b""
    ):
        self.symbols, self.schemas, self.seed = symbols, schemas, seed
        self.reasoning = False  # True while what comes is thought
        self._text, self._ended = "", False
        self._read_since: list[str] | None = None
        self._deltas: list[Delta] = []
        self._calls = 0
        self._run = self.read()
        next(self._run)

    def read(self) -> Reading:
        """Read the message to its end."""
        raise NotImplementedError

    def feed(self, text: str) -> None:
        """Take the next piece of the text."""
        self._text += text
        next(self._run, None)

    def finish(self) -> None:
        """Read what is left: no more comes."""
        self._ended = True
        next(self._run, None)

    def take(self) -> list[Delta]:
        """Give out the deltas since the last call."""
        deltas, self._deltas = self._deltas, []
        return deltas

    def until(self, markers: Sequence[str], sink: Sink | None = None) -> Reading:
        """Read up to the first of the markers; of two that begin together the longer one counts.

        Returns:
          What was read, nothing where a sink took it, and the marker; "" at the end of the text.
        """
        read: list[str] = []
        give = sink or read.append
        pattern, beginnings = _compiled(tuple(markers))
        while True:
            match = pattern.search(self._text)
            kept = 0 if match or self._ended else _kept(self._text, beginnings)
            if end := match.start() if match else len(self._text) - kept:
                self._pass(end, give)
            if match:
                self._pass(len(match[0]))
                return "".join(read), match[0]
            if self._ended:
                return "".join(read), ""
            yield

    def _pass(self, count: int, give: Sink | None = None) -> None:
        text, self._text = self._text[:count], self._text[count:]
        if self._read_since is not None:
            self._read_since.append(text)
        if give:
            give(text)

    def unread(self, marker: str) -> None:
        """Put back the marker that was just read."""
        self._text = marker + self._text
        if self._read_since is not None:
            self._read_since.pop()

    def record(self, *begin: str) -> None:
        """Remember from here on what is read."""
        self._read_since = [*begin]

    def recorded(self) -> str:
        """Give what was read since `record`, and remember no more."""
        text, self._read_since = "".join(self._read_since or ()), None
        return text

    def say(self, text: str) -> None:
        """Give out text of the answer; a marker in it, which does not belong there, is flagged."""
        for i, part in enumerate(SYMBOL.split(text)):
            self.say_malformed(part) if i % 2 else self._give("text", part)

    def say_malformed(self, text: str) -> None:
        """Give out, as it is, what the model wrote against the rules."""
        self._give("text", text, malformed=True)

    def think(self, text: str) -> None:
        """Give out text of the thinking."""
        self._give("reasoning", text)

    def _give(self, kind: Any, text: str, malformed: bool = False) -> None:
        if text := self.symbols.verbatim(text):
            self._deltas.append(Delta(kind=kind, text=text, malformed=malformed))

    def begin_call(self, name: str) -> int:
        """Give out that a function is called; returns the index of the call.

        Raises:
          Malformed: there is no such function.
        """
        if name not in self.schemas:
            raise Malformed
        index, self._calls = self._calls, self._calls + 1
        digest = hashlib.sha256(self.seed + index.to_bytes(4, "little")).hexdigest()
        call = ToolCallDelta(index=index, id=f"call_{digest[:24]}", name=name)
        self._deltas.append(Delta(kind="call", call=call))
        return index

    def go_on(self, index: int, arguments: str) -> None:
        """Give out a piece of a call's arguments."""
        call = ToolCallDelta(index=index, arguments=arguments)
        self._deltas.append(Delta(kind="call", call=call))

    def give_up(self, index: int) -> None:
        """Give out that a call will not be complete."""
        self._deltas.append(Delta(kind="call", call=ToolCallDelta(index=index, broken=True)))


@functools.lru_cache(maxsize=512)
def _compiled(markers: tuple[str, ...]) -> tuple[re.Pattern[str], list[frozenset[str]]]:
    """Make a pattern of markers, and for each length what they begin with."""
    longest = sorted(markers, key=len, reverse=True)
    lengths = range(1, max(map(len, markers), default=0))
    beginnings = [frozenset(m[:n] for m in markers if len(m) > n) for n in lengths]
    return re.compile("|".join(map(re.escape, longest)) or "(?!)"), beginnings


def _kept(text: str, beginnings: Sequence[frozenset[str]]) -> int:
    """Count the characters at the end with which a marker may begin."""
    for n in range(min(len(text), len(beginnings)), 0, -1):
        if text[-n:] in beginnings[n - 1]:
            return n
    return 0


def without_symbols(text: str) -> str:
    """Return the text.

    Raises:
      Malformed: there is a marker in it.
    """
    if SYMBOL.search(text):
        raise Malformed
    return text


def guarded(give: Sink) -> Sink:
    """Make a sink that gives out the text before a marker, and raises `Malformed` there."""

    def sink(text: str) -> None:
        before = SYMBOL.split(text, maxsplit=1)[0]
        if before:
            give(before)
        if len(before) < len(text):
            raise Malformed

    return sink
