# SPDX-License-Identifier: Apache-2.0
"""Reads calls that are JSON with a name and arguments, as Qwen3 writes them, while they come."""

import json
import re
from collections.abc import Callable

from jaxcp.text.tools.reader import Malformed
from jaxcp.text.tools.values import strict

HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\\x00-\x1f]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)'
)
HEAD_LENGTH = 1000


class JsonCall:
    """A call whose arguments are given out as they come, where its name comes first.

    Args:
      begin: is given the name, and raises `Malformed` where there is no such function.
      go_on: is given pieces of the arguments.
    """

    def __init__(self, begin: Callable[[str], None], go_on: Callable[[str], None]):
        self._begin, self._go_on = begin, go_on
        self._body = self._arguments = ""
        self._name: str | None = None
        self._object = _ObjectEnd()

    def push(self, text: str) -> None:
        """Take the next piece.

        Raises:
          Malformed: the function is not known.
        """
        begin = len(self._body)
        self._body += text
        if self._name is not None:
            self._take(text)
        elif begin < HEAD_LENGTH and (head := HEAD.match(self._body[:HEAD_LENGTH])):
            self._name = strict(head[1])
            self._begin(self._name or "")
            self._take(self._body[head.end() :])

    def finish(self) -> None:
        """Check the whole; give out all of it where that had to wait.

        Raises:
          Malformed: it is no call, or one of a function that is not known.
        """
        value = strict(self._body)
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise Malformed
        arguments = value.get("arguments", {})
        if isinstance(arguments, str):
            arguments = strict(arguments)
        if not isinstance(arguments, dict):
            raise Malformed
        if self._name is None:
            self._begin(value["name"])
            self._go_on(json.dumps(arguments, ensure_ascii=False))
        elif value["name"] != self._name or strict(self._arguments) != arguments:
            raise Malformed  # two names, or arguments twice
        else:
            self._go_on(self._arguments[-1:])

    def _take(self, text: str) -> None:
        """Give out what belongs to the object of the arguments, but for its end."""
        if piece := text[: self._object.end_in(text)]:
            self._arguments += piece
            if given := piece[:-1] if self._object.ended else piece:
                self._go_on(given)


class _ObjectEnd:
    """Finds where the object ends with which a text begins."""

    def __init__(self) -> None:
        self._depth, self._quoted, self._escaped, self.ended = 0, False, False, False

    def end_in(self, text: str) -> int:
        """Count the characters of this piece that belong to the object."""
        for i, character in enumerate(text):
            if self.ended:
                return i
            self._step(character)
        return len(text)

    def _step(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif self._quoted:
            self._escaped, self._quoted = character == "\\", character != '"'
        elif character == '"':
            self._quoted = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.ended = self._depth == 0
