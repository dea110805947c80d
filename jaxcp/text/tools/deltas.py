# SPDX-License-Identifier: Apache-2.0
"""Pieces of an assistant's message, as they come, and the message that they make."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolCallDelta:
    """A piece of a call: the first one of an index has its id and name, all add to `arguments`.

    Joined, the arguments of a complete call are a JSON object. They stay without their end where
    a call is `broken`, so that nobody acts on half of one.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    broken: bool = False
    """The call will not be complete; what the model wrote comes as malformed text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
    """A piece of what a model thinks ("reasoning"), answers ("text") or calls ("call")."""

    kind: Literal["reasoning", "text", "call"]
    text: str = ""
    call: ToolCallDelta | None = None
    malformed: bool = False
    """The text has control tokens, or a call that is none: it is as the model wrote it."""


def joined(deltas: Iterable[Delta]) -> list[Delta]:
    """Join neighbors of one kind; the pieces of one call as well."""
    result: list[Delta] = []
    for delta in deltas:
        last = result[-1] if result else None
        if last is None or (last.kind, last.malformed) != (delta.kind, delta.malformed):
            result.append(delta)
        elif delta.call is None or last.call is None:
            result[-1] = dataclasses.replace(last, text=last.text + delta.text)
        elif _goes_on(last.call, delta.call):
            arguments = last.call.arguments + delta.call.arguments
            call = dataclasses.replace(last.call, arguments=arguments)
            result[-1] = dataclasses.replace(last, call=call)
        else:
            result.append(delta)
    return result


def _goes_on(call: ToolCallDelta, added: ToolCallDelta) -> bool:
    return call.index == added.index and added.id is None and not (call.broken or added.broken)


class Message:
    """An assistant's message that grows by deltas."""

    def __init__(self) -> None:
        self.content = self.reasoning = ""
        self.malformed = False
        self._calls: dict[int, dict[str, Any]] = {}
        self._open: int | None = None

    def add(self, delta: Delta) -> None:
        """Take the next piece."""
        self.malformed = self.malformed or delta.malformed
        if delta.kind == "reasoning":
            self.reasoning += delta.text
        elif delta.kind == "text":
            self.content += delta.text
        elif delta.call is not None:
            self._add_call(delta.call)

    def _add_call(self, call: ToolCallDelta) -> None:
        if call.broken:
            del self._calls[call.index]
            return
        if call.index not in self._calls:
            function = {"name": call.name, "arguments": ""}
            self._calls[call.index] = {"id": call.id, "type": "function", "function": function}
        self._calls[call.index]["function"]["arguments"] += call.arguments

    def fields(self) -> dict[str, Any]:
        """Write it in OpenAI's form; `content` is None where there is thinking or a call alone."""
        fields: dict[str, Any] = {"role": "assistant", "content": self.content}
        if not self.content and (self.reasoning or self._calls):
            fields["content"] = None
        if self.reasoning:
            fields["reasoning"] = self.reasoning
        if self._calls:
            fields["tool_calls"] = [self._calls[index] for index in sorted(self._calls)]
        return fields
