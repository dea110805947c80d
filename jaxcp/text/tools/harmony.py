# SPDX-License-Identifier: Apache-2.0
"""Reads what gpt-oss writes (OpenAI's harmony format): messages on channels, each with a header.

`<|channel|>analysis<|message|>` begins a thought, `final` and `commentary` the answer, a recipient
`functions.NAME` in any header a call. A header that says nothing of this makes its message
malformed text; that happens to a few turns of a hundred.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

from jaxcp.text.tools.reader import Malformed, Reader, Reading, Sink, Symbols, guarded
from jaxcp.text.tools.values import strict

START, END, MESSAGE, CHANNEL = "<|start|>", "<|end|>", "<|message|>", "<|channel|>"
CONSTRAIN, RETURN, CALL = "<|constrain|>", "<|return|>", "<|call|>"
AUTHOR = f"{START}assistant"
"""Begins a message of the model."""
NAMES = (START, END, MESSAGE, CHANNEL, CONSTRAIN, RETURN, CALL)
STOPS = (RETURN, CALL)
ANSWER = f"{END}{AUTHOR}{CHANNEL}final{MESSAGE}"
"""Ends a thought, and begins the answer."""
FUNCTIONS = "functions."
RECIPIENT = re.compile("(?:^|\\s)to=([^\\s<\ud800-\udfff]+)")


class HarmonyReader(Reader):
    """Reads the messages of one turn.

    Args:
      opened: what the prompt has of the first message, behind its author.
    """

    def __init__(
        self,
        symbols: Symbols,
        schemas: Mapping[str, Mapping[str, Any]],
        seed: bytes = b"",
        *,
        opened: str = "",
    ):
        spelled = {name: symbols.spell(name) for name in NAMES}
        self._start, self._message = spelled[START], spelled[MESSAGE]
        self._ends = [spelled[name] for name in (END, RETURN, CALL)]
        self._channel = re.compile(re.escape(spelled[CHANNEL]) + r"\s*(\w+)")
        self._thoughts = self._answers = 0
        super().__init__(symbols, schemas, seed)
        if opened:
            self.feed("".join(map(symbols.spell, re.split(r"(<\|\w+\|>)", opened))))
            self.take()

    def read(self) -> Reading:
        while True:
            self.record()
            header, marker = yield from self.until([self._message, self._start, *self._ends])
            if marker == self._message:
                yield from self._body(header)
            elif self.recorded() and header.strip() not in ("", "assistant"):
                self.say_malformed(header + marker)
            if not marker:
                return

    def _body(self, header: str) -> Reading:
        recipient = RECIPIENT.search(header)
        channel = self._channel.search(header)
        name = channel[1] if channel else ""
        if recipient and recipient[1].startswith(FUNCTIONS):
            yield from self._call(recipient[1].removeprefix(FUNCTIONS))
            return
        known = not recipient or recipient[1] in ("user", "all")
        read = self.recorded()
        if known and name == "analysis":
            yield from self._pass_on(self.think, self._thoughts)
            self._thoughts += 1
        elif known and name in ("final", "commentary"):
            yield from self._pass_on(self.say, self._answers)
            self._answers += 1
        else:
            self.say_malformed(read)
            yield from self._pass_on(self.say_malformed, 0)

    def _pass_on(self, give: Any, before: int) -> Reading:
        """Give out the body of a message, a paragraph of its own."""
        gap = "\n\n" if before else ""

        def sink(text: str) -> None:
            nonlocal gap
            give(gap + text)
            gap = ""

        self.reasoning = give == self.think
        _, marker = yield from self.until([*self._ends, self._start], sink)
        self.reasoning = False
        if marker == self._start:  # the end of the message was forgotten
            self.unread(marker)

    def _call(self, name: str) -> Reading:
        ends, index, marker = [*self._ends, self._start], None, None
        try:
            index = self.begin_call(name)
            arguments = _Arguments(functools.partial(self.go_on, index))
            _, marker = yield from self.until(ends, guarded(arguments.push))
            if marker == self._start:
                self.unread(marker)
            arguments.finish()
            self.recorded()
        except Malformed:
            if index is not None:
                self.give_up(index)
            self.say_malformed(self.recorded())
            if marker is None:
                _, marker = yield from self.until(ends, self.say_malformed)
                if marker == self._start:
                    self.unread(marker)


class _Arguments:
    """The JSON object of a call's arguments; what may be its end waits until it is known to be."""

    def __init__(self, give: Sink):
        self._give, self._text, self._kept, self._begun = give, "", "", False

    def push(self, text: str) -> None:
        """Take the next piece; raises `Malformed` where it is no object."""
        self._text += text
        if not self._begun and (bare := self._text.lstrip()):
            _check(bare[0] == "{")
            self._begun = True
        text = self._kept + text
        body = text.rstrip("} \t\r\n")
        self._kept = text[len(body) :]
        if body:
            self._give(body)

    def finish(self) -> None:
        """Give out the rest; raises `Malformed` where the whole is no object."""
        _check(not self._begun or isinstance(strict(self._text), dict))
        self._give(self._kept if self._begun else "{}")


def _check(right: bool) -> None:
    if not right:
        raise Malformed
