# SPDX-License-Identifier: Apache-2.0
"""The body of a request for `/v1/responses`, and what it is in the form of a chat."""

from typing import Any, Literal

import msgspec

from jaxcp.serve.chat import ANY_OBJECT, forced_tools, level_of
from jaxcp.serve.chatting import Task
from jaxcp.serve.errors import not_done, wrong
from jaxcp.serve.model import Served
from jaxcp.serve.options import Options, StreamOptions
from jaxcp.serve.strict import check_strict


class Content(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A part of a message, with what clients send back of our answers."""

    type: Literal["input_text", "output_text", "text", "reasoning_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class Item(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A message, a call of a function, its output, or reasoning."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[Content] | None = None
    id: str | None = None
    status: str | None = None
    phase: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Content] | None = None
    summary: list[Any] | None = None
    encrypted_content: None = None
    async_: None = None
    caller: None = None
    namespace: None = None

    def check(self, place: str) -> None:
        """Raise Refusal where a field is missing."""
        needed = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
            "reasoning": (),
        }[self.type]
        for name in needed:
            if getattr(self, name) is None:
                raise wrong(f"an item of type {self.type} needs {name}", f"{place}.{name}")


class FunctionTool(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    type: Literal["function"]
    name: str
    parameters: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class Reasoning(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    effort: str | None = None
    summary: None = None


class Format(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str = ""
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    format: Format | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of `/v1/responses`. Nothing is stored: `previous_response_id` is none here."""

    input: str | list[Item]
    model: str | None = None
    background: Literal[False] | None = None
    include: list[Any] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    reasoning: Reasoning | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    text: TextOptions | None = None
    tool_choice: str | dict[str, Any] | None = None
    tools: list[FunctionTool] | None = None
    top_p: float | None = None
    truncation: Literal["disabled"] | None = None
    user: str | None = None

    def check(self) -> None:
        """Raise Refusal where fields ask for what is not done."""
        if self.include:
            raise not_done("include")
        forced_tools(self.tool_choice, flat=True)
        for number, tool in enumerate(self.tools or ()):
            if tool.strict:
                check_strict(tool.parameters, f"tools[{number}].parameters", all_required=True)
        if self.stream_options is not None and self.stream_options.include_usage is not None:
            raise not_done("stream_options.include_usage", "the last event has it anyway")
        items = [] if isinstance(self.input, str) else self.input
        for number, item in enumerate(items):
            item.check(f"input[{number}]")

    def task(self, served: Served) -> Task:
        """Work out what is to be done.

        Raises:
          Refusal: it cannot be.
        """
        options = Options(temperature=self.temperature, top_p=self.top_p)
        effort = None if self.reasoning is None else self.reasoning.effort
        return Task(
            messages=self._messages(),
            tools=[_function(x) for x in self.tools or () if self.tool_choice != "none"],
            thinking=None if effort is None else level_of(served, effort, "reasoning.effort"),
            max_tokens=self.max_output_tokens,
            limit="max_output_tokens",
            schema=self._schema(),
            one_call=self.parallel_tool_calls is False,
            forced=forced_tools(self.tool_choice, flat=True),
            sampling=options.sampling,
        )

    def _schema(self) -> Any:
        form = None if self.text is None else self.text.format
        if form is None or form.type == "text":
            return None
        if form.type == "json_schema" and form.schema is None:
            raise wrong("text.format needs a schema", "text.format.schema")
        return ANY_OBJECT if form.type == "json_object" else form.schema

    def _messages(self) -> list[dict[str, Any]]:
        """The conversation as a chat's: what an assistant did in a row is one message of it."""
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for item in self.input:
            message = _message(item)
            last = messages[-1] if messages else {}
            if message["role"] == "assistant" == last.get("role"):
                _join(last, message)
            else:
                messages.append(message)
        return messages

    def said_again(self) -> dict[str, Any]:
        """Fields of the request that a response repeats."""
        tools = [
            {
                "type": "function",
                "name": tool.name,
                "parameters": tool.parameters or {},
                "description": tool.description,
                "strict": bool(tool.strict),
            }
            for tool in self.tools or ()
        ]
        effort = None if self.reasoning is None else self.reasoning.effort
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": {"effort": effort, "summary": None},
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "tool_choice": self.tool_choice or "auto",
            "tools": tools,
            "top_p": 1.0 if self.top_p is None else self.top_p,
        }


def _message(item: Item) -> dict[str, Any]:
    if item.type == "function_call":
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    if item.type == "function_call_output":
        return {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
    if item.type == "reasoning":
        return {"role": "assistant", "content": "", "reasoning_content": _text(item.content)}
    return {"role": item.role, "content": _text(item.content)}


def _join(message: dict[str, Any], added: dict[str, Any]) -> None:
    """Add to a message what the same assistant did next."""
    for name in ("content", "reasoning_content"):
        if added.get(name):
            message[name] = message.get(name, "") + added[name]
    if "tool_calls" in added:
        message["tool_calls"] = [*message.get("tool_calls", []), *added["tool_calls"]]


def _text(content: str | list[Content] | None) -> str:
    return content if isinstance(content, str) else "".join(x.text for x in content or ())


def _function(tool: FunctionTool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.parameters or {}}
    function["strict"] = bool(tool.strict)
    if tool.description:
        function["description"] = tool.description
    return {"type": "function", "function": function}
