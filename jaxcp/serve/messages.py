# SPDX-License-Identifier: Apache-2.0
"""Anthropic's `/v1/messages`: a conversation in, the assistant's next message out."""

import dataclasses
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

import msgspec

from jaxcp.serve.blocks import Block, Blocks, Step
from jaxcp.serve.chat import level_of
from jaxcp.serve.chatting import Task, prompt_of
from jaxcp.serve.errors import not_done, wrong
from jaxcp.serve.events import Event, Usage
from jaxcp.serve.form import Form
from jaxcp.serve.model import Served
from jaxcp.serve.options import Options
from jaxcp.serve.sse import named
from jaxcp.serve.strict import check_strict

REASONS = {
    "stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use",
}  # fmt: skip


class Tagged(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, tag_field="type"):
    """A block of a message. What is computed once is kept anyway: `cache_control` adds nothing."""

    cache_control: dict[str, Any] | None = None


class TextBlock(Tagged, tag="text", forbid_unknown_fields=True):
    text: str
    citations: None = None
    parsed_output: None = None


class ThinkingBlock(Tagged, tag="thinking", forbid_unknown_fields=True):
    thinking: str
    signature: str = ""


class ToolUse(Tagged, tag="tool_use", forbid_unknown_fields=True):
    id: str
    name: str
    input: dict[str, Any]
    caller: dict[str, Any] | None = None
    toolset_name: None = None


class ToolResult(Tagged, tag="tool_result", forbid_unknown_fields=True):
    tool_use_id: str
    content: str | list[TextBlock] = ""
    is_error: bool | None = None


class AnthropicMessage(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    role: Literal["user", "assistant"]
    content: str | list[TextBlock | ThinkingBlock | ToolUse | ToolResult]


class AnthropicTool(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    name: str
    input_schema: dict[str, Any]
    description: str = ""
    strict: bool | None = None
    type: Literal["custom"] | None = None
    cache_control: dict[str, Any] | None = None


class ToolChoice(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    type: Literal["auto", "none", "any", "tool"]
    disable_parallel_tool_use: bool | None = None
    name: str | None = None

    def forced(self) -> list[str] | None:
        """The name of the tool that must be called; [] for any tool, None where none must be.

        Raises:
          Refusal: a name is missing, or stands where it means nothing.
        """
        if (self.name is not None) != (self.type == "tool"):
            raise wrong('tool_choice has a name where its type is "tool"', "tool_choice.name")
        if self.type == "tool":
            return [str(self.name)]
        return [] if self.type == "any" else None


class Thinking(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: str | None = None


class OutputFormat(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    effort: str | None = None
    format: OutputFormat | None = None


class MessagesRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of `/v1/messages`."""

    messages: list[AnthropicMessage]
    model: str | None = None
    max_tokens: int | None = None
    system: str | list[TextBlock] | None = None
    metadata: dict[str, Any] | None = None
    output_config: OutputConfig | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    thinking: Thinking | None = None
    tool_choice: ToolChoice | None = None
    tools: list[AnthropicTool] | None = None
    top_k: int | None = None
    top_p: float | None = None
    cache_control: dict[str, Any] | None = None

    def task(self, served: Served) -> Task:
        """Work out what is to be done.

        Raises:
          Refusal: it cannot be.
        """
        for number, tool in enumerate(self.tools or ()):
            if tool.strict:
                place = f"tools[{number}].input_schema"
                check_strict(tool.input_schema, place, all_required=False)
        form = None if self.output_config is None else self.output_config.format
        if form is not None and self.tools:
            raise not_done("output_config.format with tools", "ask for one of them")
        choice = self.tool_choice
        options = Options(
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k,
            stop=self.stop_sequences,
        )  # fmt: skip
        tools = [] if choice is not None and choice.type == "none" else self.tools or []
        return Task(
            messages=[*self._system(), *(x for m in self.messages for x in _openai(m))],
            tools=[_function(tool) for tool in tools],
            thinking=self._thinking(served),
            max_tokens=self.max_tokens,
            stop=options.stops(),
            schema=None if form is None else form.schema,
            one_call=choice is not None and bool(choice.disable_parallel_tool_use),
            forced=None if choice is None else choice.forced(),
            sampling=options.sampling,
        )

    def _system(self) -> list[dict[str, Any]]:
        if not self.system:
            return []
        return [{"role": "system", "content": _text(self.system)}]

    def _thinking(self, served: Served) -> str | int | None:
        thinking = self.thinking
        effort = None if self.output_config is None else self.output_config.effort
        if thinking is None or thinking.type == "adaptive":
            return None if effort is None else level_of(served, effort, "output_config.effort")
        if thinking.type == "disabled":
            return level_of(served, "none", "thinking")
        if thinking.budget_tokens is None or thinking.budget_tokens < 1:
            raise wrong("thinking needs budget_tokens of at least 1", "thinking.budget_tokens")
        return thinking.budget_tokens


@dataclasses.dataclass(kw_only=True)
class Messages(Form):
    """The answer to one request, in Anthropic's form."""

    ask: MessagesRequest

    def check(self) -> None:
        if self.ask.max_tokens is None:
            raise wrong("max_tokens is missing", "max_tokens")

    async def chunks(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        """Yield the events of a stream; its begin has the tokens of the prompt that were cached."""
        blocks, begun = Blocks(), False
        async for event in events:
            if not begun:
                begun = True
                message = self._message([], None, None)
                yield named("message_start", {"type": "message_start", "message": message})
            for step in blocks.take(event):
                for kind, fields in _changes(step):
                    yield named(kind, {"type": kind, "index": step.block.index, **fields})
        delta = {"stop_reason": _reason(blocks), "stop_sequence": blocks.stop}
        usage = {"output_tokens": self.job.usage.generated}
        yield named("message_delta", {"type": "message_delta", "delta": delta, "usage": usage})
        yield named("message_stop", {"type": "message_stop"})

    async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        """The body of an answer that is complete."""
        blocks = Blocks()
        async for event in events:
            for _ in blocks.take(event):
                pass
        content = [_content(block) for block in blocks.all]
        return self._message(content, _reason(blocks), blocks.stop)

    def _message(self, content: list[Any], reason: str | None, stop: str | None) -> dict[str, Any]:
        return {
            "id": f"msg_{self.id.removeprefix('req-')}",
            "type": "message",
            "role": "assistant",
            "model": self.served.config.name,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": _usage(self.job.usage),
        }


def count_tokens(served: Served, ask: MessagesRequest) -> dict[str, int]:
    """The body of `/v1/messages/count_tokens`.

    Raises:
      Refusal: the conversation cannot be rendered.
    """
    served.check_model(ask.model)
    return {"input_tokens": len(prompt_of(served, ask.task(served)).ids)}


def _usage(usage: Usage) -> dict[str, int]:
    """Tokens as Anthropic counts them: those from the cache are not among `input_tokens`."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.generated,
    }


def _reason(blocks: Blocks) -> str | None:
    if blocks.stop is not None:
        return "stop_sequence"
    return None if blocks.reason is None else REASONS[blocks.reason]


def _changes(step: Step) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the names and fields of the events that say what a block does."""
    block = step.block
    if step.what == "begin":
        empty = Block(index=block.index, kind=block.kind, id=block.id, name=block.name)
        yield "content_block_start", {"content_block": _content(empty)}
    elif step.what == "more":
        kind, field = {
            "text": ("text_delta", "text"),
            "reasoning": ("thinking_delta", "thinking"),
            "call": ("input_json_delta", "partial_json"),
        }[block.kind]
        yield "content_block_delta", {"delta": {"type": kind, field: step.text}}
    else:
        if block.kind == "reasoning":
            signature = {"type": "signature_delta", "signature": ""}
            yield "content_block_delta", {"delta": signature}
        yield "content_block_stop", {}


def _content(block: Block) -> dict[str, Any]:
    if block.kind == "text":
        return {"type": "text", "text": block.text}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    return {"type": "tool_use", "id": block.id, "name": block.name, "input": _input(block.text)}


def _input(arguments: str) -> Any:
    """Read the arguments of a call, which have no end where the tokens were used up."""
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return {}


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _openai(message: AnthropicMessage) -> Iterator[dict[str, Any]]:
    """Yield the same in OpenAI's form, results of tools before what the user says."""
    content = message.content
    if isinstance(content, str):
        yield {"role": message.role, "content": content}
        return
    for part in content:
        if isinstance(part, ToolResult):
            result = _text(part.content)
            yield {"role": "tool", "tool_call_id": part.tool_use_id, "content": result}
    said = "".join(part.text for part in content if isinstance(part, TextBlock))
    whole: dict[str, Any] = {"role": message.role, "content": said}
    thought = "".join(part.thinking for part in content if isinstance(part, ThinkingBlock))
    calls = [part for part in content if isinstance(part, ToolUse)]
    if message.role == "assistant":
        if thought:
            whole["reasoning_content"] = thought
        if calls:
            whole["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.dumps(call.input)},
                }
                for call in calls
            ]
        yield whole
    elif said or not any(isinstance(part, ToolResult) for part in content):
        yield whole


def _function(tool: AnthropicTool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    function["strict"] = bool(tool.strict)
    if tool.description:
        function["description"] = tool.description
    return {"type": "function", "function": function}
