# SPDX-License-Identifier: Apache-2.0
"""Checks messages and tools in OpenAI's form, and writes them as chat templates read them."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
TEXT_PARTS = ("text", "input_text", "output_text")
NAME = re.compile("[A-Za-z0-9_-]{1,128}")
"""Names of tools, as OpenAI (up to 64 characters) and Anthropic (128) take them."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which clients send what a model thought; templates read one or another."""


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Copy a conversation: content as one string, arguments as objects, reasoning by every name.

    Raises:
      ValueError: it is no such conversation; the message says which part is wrong.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages must be a list of at least one; got {messages!r:.100}")
    try:
        return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    except RecursionError as error:
        raise ValueError("messages are nested too deep") from error


def checked_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Copy the tools of a request, each `{"type": "function", "function": {...}}`; None for none.

    Raises:
      ValueError: one is no function with a name, or two have one name.
    """
    if not tools:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise ValueError(f"tools must be a list of functions; got {tools!r:.100}")
    try:
        copies = [_plain(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    except RecursionError as error:
        raise ValueError("tools are nested too deep") from error
    names = [_name(tool, f"tools[{i}]") for i, tool in enumerate(copies)]
    if wrong := [name for name in names if not NAME.fullmatch(name)]:
        raise ValueError(
            "the name of a tool has up to 128 letters of ASCII, digits, _ and -, as calls in all "
            f"models' forms can carry it; got {wrong[0]!r:.200}"
        )
    if len({*names}) < len(names):
        raise ValueError(f"each tool needs a name of its own; got {names!r:.200}")
    return copies


def schemas_of(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
    """Give for each function's name the JSON schema of its arguments."""
    functions = (tool["function"] for tool in tools or ())
    schemas = ((x["name"], x.get("parameters")) for x in functions)
    return {name: schema if isinstance(schema, dict) else {} for name, schema in schemas}


def taken_strict(tools: Sequence[dict[str, Any]] | None) -> list[str]:
    """Take `strict` out of tools, and list the names of those that are.

    A strict function without parameters takes none.
    """
    functions = [tool["function"] for tool in tools or ()]
    strict = [function for function in functions if function.pop("strict", None) is True]
    for function in strict:
        if not function.get("parameters"):
            function["parameters"] = {"type": "object", "properties": {}}
    return [function["name"] for function in strict]


def one_call_each(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Write a conversation for templates that take one call a message, its result behind it.

    System messages at the beginning become one. What an assistant says beside thinking and a call
    joins its thinking: such templates have one place for both.

    Raises:
      ValueError: a system message comes later.
    """
    result: list[dict[str, Any]] = []
    placed = False  # the results that come next, behind their calls
    for i, message in enumerate(messages):
        placed = "tool_calls" in message or (placed and message["role"] == "tool")
        if message["role"] in ("system", "developer"):
            if any(m["role"] not in ("system", "developer") for m in result):
                raise ValueError(
                    "needed system messages before all others: the chat template has no place for "
                    f"messages[{i}]. Move it to the beginning, or let the user say it"
                )
            text = [m["content"] for m in result] + [message["content"]]
            result = [{**message, "content": "\n\n".join(text)}]
        elif "tool_calls" in message:
            answers = itertools.takewhile(lambda m: m["role"] == "tool", messages[i + 1 :])
            result += _calls_and_results(message, [dict(m) for m in answers])
        elif not placed:
            result.append(dict(message))
    return result


def _calls_and_results(
    message: Mapping[str, Any], answers: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield a message for each call, with the result that names it behind it, or the next one."""
    for n, call in enumerate(message["tool_calls"]):
        yield _calling(message if n == 0 else {"role": "assistant"}, call)
        own = [m for m in answers if call.get("id") in (None, m.get("tool_call_id"))][:1]
        answers = [m for m in answers if not own or m is not own[0]]
        yield from own
    yield from answers


def _calling(message: Mapping[str, Any], call: Mapping[str, Any]) -> dict[str, Any]:
    copy = {**message, "tool_calls": [call]}
    said, thought = copy.get("content"), copy.get("thinking")
    if said and thought:
        copy |= {"thinking": f"{thought}\n\n{said}", "content": ""}
    return copy


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{place} must be an object with a role; got {message!r:.100}")
    copy = {k: x for k, x in _plain(message, place).items() if x is not None}
    if copy.get("role") not in ROLES:
        raise ValueError(
            f"{place}.role must be one of {', '.join(ROLES)}; got {copy.get('role')!r:.100}"
        )
    if "content" in copy:
        copy["content"] = _text(copy["content"], f"{place}.content")
    elif copy["role"] != "assistant":
        raise ValueError(f"{place} has no content, which a message of {copy['role']} needs")
    _check_id(copy.get("tool_call_id"), f"{place}.tool_call_id")
    if copy.get("tool_calls"):
        copy["tool_calls"] = _calls(copy["tool_calls"], f"{place}.tool_calls")
    else:
        copy.pop("tool_calls", None)
    thought = next((copy[name] for name in REASONING if name in copy), None)
    if thought is not None:
        thought = _text(thought, f"{place}.{REASONING[0]}")
        copy |= {"reasoning_content": thought, "thinking": thought}
    return copy


def _text(content: Any, place: str) -> str:
    """Join the parts of a content: templates take a list as nothing, or as something else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{place} must be a string or a list of parts; got {content!r:.100}")
    return "".join(_part(part, f"{place}[{i}]") for i, part in enumerate(content))


def _part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type") in TEXT_PARTS:
        if isinstance(part.get("text"), str):
            return part["text"]
        raise ValueError(f"{place}.text must be a string; got {part.get('text')!r:.100}")
    kind = part.get("type") if isinstance(part, dict) else part
    raise ValueError(f"{place} must be of type text; got {kind!r:.100}, which no model here reads")


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise ValueError(f"{place} must be a list; got {calls!r:.100}")
    for i, call in enumerate(calls):
        _name(call, f"{place}[{i}]")
        _check_id(call.get("id"), f"{place}[{i}].id")
        function = call["function"]
        function["arguments"] = _arguments(
            function.get("arguments"), f"{place}[{i}].function.arguments"
        )
    return calls


def _arguments(arguments: Any, place: str) -> dict[str, Any]:
    """Read the arguments of a call: OpenAI's clients send an object as text."""
    if arguments in (None, ""):
        return {}
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} must be JSON; got {arguments!r:.100}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{place} must be an object; got {arguments!r:.100}")
    return value


def _check_id(value: Any, place: str) -> None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{place} must be a string; got {value!r:.100}")


def _name(tool: Any, place: str) -> str:
    function = tool.get("function") if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError(f"{place} must have a function with a name; got {tool!r:.100}")
    return name


def _plain(value: Any, place: str) -> Any:
    """Copy data of JSON: a template is given nothing that has methods of its own."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{place} must have strings as keys; got {key!r:.100}")
        return {str(key): _plain(x, f"{place}.{key}") for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x, f"{place}[{i}]") for i, x in enumerate(value)]
    raise ValueError(f"{place} must be data of JSON; got a {type(value).__name__}")
