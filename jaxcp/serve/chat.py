# SPDX-License-Identifier: Apache-2.0
"""`/v1/chat/completions`: a conversation in, the assistant's next message out."""

import dataclasses
import functools
from collections.abc import AsyncIterator
from typing import Any, Literal

import msgspec

from jaxcp.serve.chatting import Task
from jaxcp.serve.completions import usage_of
from jaxcp.serve.errors import not_done, wrong
from jaxcp.serve.events import Call, End, Event, Reasoning, Text, Usage
from jaxcp.serve.form import Form
from jaxcp.serve.model import Served
from jaxcp.serve.options import Options
from jaxcp.serve.sse import DONE, data
from jaxcp.serve.strict import check_strict

ANY_OBJECT = {"type": "object"}


class Part(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    type: Literal["text"]
    text: str


class Function(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    function: Function
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None


class Message(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A message of a request; the last fields are what clients send back of our answers."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    parsed: Any = None


class FunctionSchema(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    function: FunctionSchema
    type: Literal["function"] = "function"


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    schema: dict[str, Any] | bool
    name: str = ""
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def schema_wanted(self) -> Any:
        """The JSON schema of the answer; None for text."""
        if self.type == "json_object":
            return ANY_OBJECT
        if self.type == "text":
            return None
        if self.json_schema is None:
            raise wrong("response_format needs json_schema", "response_format.json_schema")
        return self.json_schema.schema


class ChatRequest(Options, forbid_unknown_fields=True, kw_only=True):
    """Body of `/v1/chat/completions`; the last fields are not OpenAI's."""

    messages: list[Message]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    modalities: list[Literal["text"]] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None

    thinking_token_budget: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self, max_choices: int) -> None:
        super().check(max_choices)
        if not self.messages:
            raise wrong("messages is empty; send one at least", "messages")
        forced_tools(self.tool_choice)
        for number, tool in enumerate(self.tools or ()):
            place = f"tools[{number}].function.parameters"
            if tool.function.strict:
                check_strict(tool.function.parameters, place, all_required=True)
        if self.top_logprobs is not None and not self.logprobs:
            raise wrong("top_logprobs needs logprobs=true", "top_logprobs")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= 20:
            raise wrong(f"top_logprobs must be 0 to 20; got {self.top_logprobs}", "top_logprobs")
        if self.reasoning_effort is not None and self.thinking_token_budget is not None:
            raise wrong("thinking has a level or a budget; give one", "thinking_token_budget")
        if (budget := self.thinking_token_budget) is not None and budget < 0:
            raise wrong(
                f"thinking_token_budget must be 0 or more; got {budget}", "thinking_token_budget"
            )

    def task(self, served: Served) -> Task:
        """Work out what is to be done."""
        limit = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        form, tools = self.response_format, self.tools if self.tool_choice != "none" else None
        return Task(
            messages=[_plain(message) for message in self.messages],
            tools=[_plain(tool) for tool in tools or ()],
            thinking=self._thinking(served),
            variables=self.chat_template_kwargs,
            max_tokens=getattr(self, limit),
            limit=limit,
            stop=self.stops(),
            schema=None if form is None else form.schema_wanted(),
            one_call=self.parallel_tool_calls is False,
            forced=forced_tools(self.tool_choice),
            sampling=functools.partial(
                self.sampling, logprobs=(self.top_logprobs or 0) if self.logprobs else None
            ),
        )

    def _thinking(self, served: Served) -> str | int | None:
        if self.reasoning_effort is None:
            return self.thinking_token_budget
        return level_of(served, self.reasoning_effort, "reasoning_effort")


def forced_tools(choice: str | dict[str, Any] | None, *, flat: bool = False) -> list[str] | None:
    """Read OpenAI's `tool_choice`: the name of the tool that must be called.

    Args:
      flat: an object has the name itself, and not in a field "function".
    Returns:
      [] where it may be any tool; None where none must be called.
    Raises:
      Refusal: it is none of "auto", "none", "required" and a function by its name.
    """
    if choice in (None, "auto", "none", "required"):
        return [] if choice == "required" else None
    if isinstance(choice, dict):
        function = choice if flat else choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        whole = {"name": name} if flat else {"function": {"name": name}}
        if isinstance(name, str) and choice == {"type": "function", **whole}:
            return [name]
    raise not_done("tool_choice", 'it may be "auto", "none", "required", or a function by its name')


def level_of(served: Served, effort: str, param: str) -> str | None:
    """Map OpenAI's effort to a level of the model.

    Raises:
      Refusal: there is no such effort, or the model cannot be told.
    """
    chat = served.chat
    try:
        level = None if chat is None else chat.level_of_effort(effort)
    except ValueError as error:
        raise wrong(str(error), param) from error
    if level is None and effort != "none":
        raise not_done(param, "this model has no levels of thinking; leave it out")
    return level


@dataclasses.dataclass(kw_only=True)
class ChatCompletions(Form):
    """The answer to one request, in OpenAI's form."""

    ask: ChatRequest

    def check(self) -> None:
        self.ask.check(self.served.config.max_choices)

    async def chunks(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        """Yield the events of a stream."""
        begun: set[int] = set()
        async for event in events:
            if event.choice not in begun:
                begun.add(event.choice)
                first = {"role": "assistant", "content": "", "refusal": None}
                yield self._chunk(event.choice, first)
            if isinstance(event, End):
                yield self._chunk(event.choice, {}, reason=event.reason)
            elif isinstance(event, Text):
                yield self._chunk(event.choice, {"content": event.text}, event)
            elif isinstance(event, Reasoning):
                yield self._chunk(event.choice, _thought(event.text))
            elif isinstance(event, Call) and not event.broken:
                yield self._chunk(event.choice, {"tool_calls": [_call_delta(event)]})
        if self.ask.usage_wanted:
            yield data(self._body("chat.completion.chunk", [], self.job.usage))
        yield DONE

    async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        """The body of an answer that is complete."""
        said: dict[int, Said] = {}
        async for event in events:
            said.setdefault(event.choice, Said()).add(event)
        choices = [
            {
                "index": index,
                "message": one.message(),
                "finish_reason": one.reason,
                "logprobs": self._logprobs(one.logprobs),
            }
            for index, one in sorted(said.items())
        ]
        return self._body("chat.completion", choices, self.job.usage)

    def _chunk(
        self, index: int, delta: dict[str, Any], text: Text | None = None, reason: str | None = None
    ) -> bytes:
        logprobs = None if text is None else self._logprobs(text.logprobs)
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return data(self._body("chat.completion.chunk", [choice], None))

    def _logprobs(self, logprobs: Any) -> dict[str, Any] | None:
        if not self.ask.logprobs:
            return None
        return {"content": [self.served.texts.chat(one) for one in logprobs], "refusal": None}

    def _body(self, kind: str, choices: list[Any], usage: Usage | None) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.id.removeprefix('req-')}",
            "object": kind,
            "created": self.created,
            "model": self.served.config.name,
            "choices": choices,
            "usage": None if usage is None else usage_of(usage),
        }


class Said:
    """One answer, put together from its events."""

    def __init__(self):
        self.text = self.reasoning = ""
        self.calls: dict[int, Call] = {}
        self.logprobs: list[Any] = []
        self.reason: str | None = None

    def add(self, event: Event) -> None:
        """Take the next event."""
        if isinstance(event, Text):
            self.text += event.text
            self.logprobs += event.logprobs
        elif isinstance(event, Reasoning):
            self.reasoning += event.text
        elif isinstance(event, End):
            self.reason = event.reason
        elif isinstance(event, Call) and event.broken:
            self.calls.pop(event.number, None)
        elif isinstance(event, Call) and event.number in self.calls:
            begun = self.calls[event.number]
            arguments = begun.arguments + event.arguments
            self.calls[event.number] = dataclasses.replace(begun, arguments=arguments)
        elif isinstance(event, Call):
            self.calls[event.number] = event

    def message(self) -> dict[str, Any]:
        """Write it in OpenAI's form; `content` is null beside reasoning or calls alone."""
        alone = not self.text and (self.calls or self.reasoning)
        content = None if alone else self.text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self.reasoning:
            message |= _thought(self.reasoning)
        if self.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for _, call in sorted(self.calls.items())
            ]
        return message


def _thought(text: str) -> dict[str, str]:
    """Reasoning by both of the names that clients read."""
    return {"reasoning": text, "reasoning_content": text}


def _call_delta(call: Call) -> dict[str, Any]:
    if not call.name:
        return {"index": call.number, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.number, "id": call.id, "type": "function", "function": function}


def _plain(value: msgspec.Struct) -> dict[str, Any]:
    """Data of JSON, without what is not given and what says nothing to a template."""
    plain = msgspec.to_builtins(value)
    for name in ("refusal", "annotations", "audio", "function_call", "parsed"):
        plain.pop(name, None)
    return {name: x for name, x in plain.items() if x is not None}
