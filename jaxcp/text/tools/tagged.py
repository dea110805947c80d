# SPDX-License-Identifier: Apache-2.0
"""Reads messages that think between two tags, and call tools between others.

`Tags` says what the tags are. Hy3, DeepSeek (DSML) and Qwen3-Coder put each argument between tags
of its own; Qwen3 writes a call as JSON (`jaxcp.text.tools.json_calls`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxcp.text.tools import values
from jaxcp.text.tools.json_calls import JsonCall
from jaxcp.text.tools.reader import (
    Malformed,
    Reader,
    Reading,
    Sink,
    Symbols,
    guarded,
    without_symbols,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tags:
    """Tags of a format, as they are written; those that are empty it has not.

    A call is `call`, its name, `name_end`, arguments, `call_end`; an argument is `key`, its name,
    `key_end`, one of `value`, its value, `value_end`.
    """

    think: str = "<think>"
    think_end: str = "</think>"
    group: tuple[str, ...] = ()
    """Begin calls; of several the first that fits, with the white space that belongs to it."""
    group_end: str = ""
    call: str = ""
    call_end: str = ""
    name_end: str = ""
    key: str = ""
    key_end: str = ""
    value: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Tags that begin a value, and what it is: by the "schema", a "string" or "json"."""
    value_end: str = ""
    json: bool = False
    """A call is JSON with `name` and `arguments`, between `call` and `call_end`."""
    newlines: bool = False
    """Newlines beside these tags are no part of the text."""
    calls_end_thinking: bool = False
    """A call ends the thinking: the model forgets to close it."""
    names: tuple[str, ...] = ()
    """Control tokens that tags are made of, beside those that are tags."""

    def spelled(self, symbols: Symbols) -> "Tags":
        """Return the tags as a reader sees them."""
        spell = symbols.spell
        texts: dict[str, Any] = {
            field.name: spell(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), str)
        }
        value = {spell(tag): kind for tag, kind in self.value.items()}
        return dataclasses.replace(self, **texts, group=tuple(map(spell, self.group)), value=value)

    def tokens(self) -> list[str]:
        """List the tags that may be tokens of the vocabulary."""
        texts = (getattr(self, field.name) for field in dataclasses.fields(self))
        tags = [x for x in texts if isinstance(x, str)]
        return [
            x for x in dict.fromkeys([*tags, *self.value, *self.group, *self.names]) if x.strip()
        ]


class TaggedReader(Reader):
    """Reads one message; begins within the thinking where the prompt has opened it.

    Args:
      thinking: the prompt ends with the tag that begins the thinking.
    """

    def __init__(
        self,
        tags: Tags,
        symbols: Symbols,
        schemas: Mapping[str, Mapping[str, Any]],
        seed: bytes = b"",
        *,
        thinking: bool = False,
    ):
        self._tags = t = tags.spelled(symbols)
        self._begins_thinking = thinking
        groups = [*t.group, t.group_end, t.call, t.call_end]
        self._openers = _tags(*groups, t.think, t.think_end)
        self._inside = _tags(*groups, t.think, t.think_end, t.key, t.value_end)
        self._index: int | None = None
        self._answer = _Lines(self.say) if t.newlines else None
        super().__init__(symbols, schemas, seed)

    def read(self) -> Reading:
        if self._begins_thinking:
            yield from self._think()
        while True:
            _, marker = yield from self.until(self._openers, self._answer or self.say)
            if not marker:
                break
            yield from self._begun(marker)
        if self._answer:
            self._answer.finish()

    def _begun(self, marker: str) -> Reading:
        tags = self._tags
        if marker == tags.think:
            yield from self._think()
        elif marker not in (tags.call, *tags.group):
            self._say_malformed(marker)
        else:
            yield from self._group(marker) if marker in tags.group else self._call(marker)

    def _say_malformed(self, text: str) -> None:
        if self._answer:
            self._answer.flush()
        self.say_malformed(text)

    def _think(self) -> Reading:
        tags, self.reasoning = self._tags, True
        calls = [tags.call, *tags.group] if tags.calls_end_thinking else []
        sink = _Lines(self.think) if tags.newlines else self.think
        _, marker = yield from self.until(_tags(tags.think_end, *calls), sink)
        self.reasoning = False
        if marker and marker != tags.think_end:
            self.unread(marker)

    def _group(self, marker: str) -> Reading:
        """Read calls up to the tag that ends them all."""
        tags, calls, read = self._tags, 0, marker
        while True:
            gap, marker = yield from self.until(self._openers)
            if gap.strip():
                self._say_malformed(read + gap if not calls else gap)
                read = ""
            if marker == tags.call:
                calls += 1
                yield from self._call(marker)
            elif marker == tags.group_end or not marker:
                if not calls:
                    self._say_malformed(read + marker)
                return
            else:
                self.unread(marker)
                return

    def _call(self, marker: str) -> Reading:
        self._index = None
        self.record(marker)
        try:
            yield from self._json() if self._tags.json else self._arguments()
            self.recorded()
            if self._answer:
                self._answer.drop()
        except Malformed:
            if self._index is not None:
                self.give_up(self._index)
            self._say_malformed(self.recorded())
            yield from self._skip()

    def _skip(self) -> Reading:
        """Read the rest of a call that is none."""
        _, marker = yield from self.until(self._openers, self._say_malformed)
        if marker == self._tags.call_end:
            self._say_malformed(marker)
        elif marker:
            self.unread(marker)

    def _json(self) -> Reading:
        call = JsonCall(self._begin, self._go_on)
        yield from self._expect([self._tags.call_end], guarded(call.push))
        call.finish()

    def _begin(self, name: str) -> None:
        self._index = self.begin_call(name)

    def _go_on(self, arguments: str) -> None:
        assert self._index is not None
        self.go_on(self._index, arguments)

    def _arguments(self) -> Reading:
        tags = self._tags
        name, _ = yield from self._expect([tags.name_end])
        self._begin(name.strip())
        schema, names = self.schemas[name.strip()], set[str]()
        while True:
            gap, marker = yield from self._expect([tags.key, tags.call_end])
            _check(not gap.strip())
            if marker == tags.call_end:
                self._go_on("}" if names else "{}")
                return
            key, _ = yield from self._expect([tags.key_end])
            _check(bool(key) and key not in names)
            self._go_on(("{" if not names else ", ") + values.quoted(key) + ": ")
            names.add(key)
            yield from self._value(values.types_of(schema, key))

    def _value(self, types: frozenset[str]) -> Reading:
        gap, marker = yield from self._expect([*self._tags.value])
        _check(not gap.strip())
        kind, end = self._tags.value[marker], [self._tags.value_end]
        if types == values.STRING if kind == "schema" else kind == "string" and "string" in types:
            self._go_on('"')
            yield from self._expect(end, guarded(self._string))
            self._go_on('"')
            return
        text, _ = yield from self._expect(end)
        if kind == "json":
            _check(values.strict(text) is not None or text.strip() == "null")
            self._go_on(text.strip())
        else:
            self._go_on(values.as_json(text, types))

    def _string(self, text: str) -> None:
        self._go_on(values.quoted(text)[1:-1])

    def _expect(self, markers: list[str], sink: Sink | None = None) -> Reading:
        """Read up to one of these markers; any other makes the call malformed."""
        others = [tag for tag in self._inside if tag not in markers]
        text, marker = yield from self.until([*markers, *others], sink)
        if marker not in markers:
            if marker:
                self.unread(marker)
            raise Malformed
        return without_symbols(text), marker


class _Lines:
    """A text without newlines at its beginning, and before what ends it."""

    def __init__(self, give: Sink):
        self._give, self._held = give, ""
        self._begun = self._dropped = False

    def __call__(self, text: str) -> None:
        text = text if self._begun else text.lstrip("\n")
        body = text.rstrip("\n")
        if body:
            self._give(self._held + body)
            self._held, self._begun, self._dropped = "", True, False
        self._held += text[len(body) :]

    def drop(self) -> None:
        """Leave out the newline that came last, which belongs to the call behind it."""
        if self._held:
            self._give(self._held[:-1])
        self._held, self._dropped = "", True

    def flush(self) -> None:
        """Give out the newlines that came last: more follows."""
        self._give(self._held)
        self._held, self._begun, self._dropped = "", True, False

    def finish(self) -> None:
        """End the text; its last newlines belong to it, unless they follow what is no text."""
        if not self._dropped:
            self._give(self._held)


def _tags(*tags: str) -> list[str]:
    return [tag for tag in dict.fromkeys(tags) if tag]


def _check(right: bool) -> None:
    if not right:
        raise Malformed
