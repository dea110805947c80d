# SPDX-License-Identifier: Apache-2.0
"""Conversations made by chance, in OpenAI's form: systems, tools, results, thoughts, parts."""

import json
import random

WORDS = (
    "so", "the", "café", "is", "5 €", "<b>", "it's", '"quoted"', "line\n", "\tend", "{x}", "是",
)  # fmt: skip
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'Gives the "weather" <now> & then',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "A city, café or not"},
                    "days": {"type": "integer", "default": 3},
                    "units": {"type": "string", "enum": ["celsius", "kelvin"]},
                    "near": {"type": "array", "items": {"type": "number"}},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "stop",
            "description": "Stops",
            "parameters": {"type": "object", "properties": {}},
        },
    },
]
ARGUMENTS = (
    ("get_weather", {"city": "Köln </x>", "days": 2, "near": [1.5, None, {"a": [True]}]}),
    ("get_weather", {"city": "line\nbreak \\ \"q\"", "units": "kelvin"}),
    ("stop", {}),
)  # fmt: skip


def conversation(seed, *, parts=True, calls=3, systems=2):
    """Make messages and tools.

    Args:
      parts: contents may be lists of text parts.
      calls: most calls in a message; with 1 no message has thoughts and text beside a call.
      systems: most system messages at the beginning.
    """
    chance = random.Random(seed)
    messages = [
        {"role": "system", "content": content(chance, parts)}
        for _ in range(chance.randint(0, systems))
    ]
    tools = chance.choice((None, TOOLS, TOOLS[:1]))
    for _ in range(chance.randint(1, 3)):
        messages.append({"role": "user", "content": content(chance, parts)})
        for _ in range(chance.randint(0, 2) if tools else 0):
            messages += called(chance, parts, calls)
        messages.append(answered(chance, parts))
    if chance.random() < 0.8:  # else the last message is an assistant's, and goes on
        messages.append({"role": "user", "content": content(chance, parts)})
        if tools and chance.random() < 0.5:
            messages += called(chance, parts, calls)
    return messages, tools


def text(chance, least=1):
    return " ".join(chance.choice(WORDS) for _ in range(chance.randint(least, 6)))


def content(chance, parts):
    said = text(chance)
    if not parts or chance.random() < 0.7:
        return said
    return [{"type": "text", "text": said}, {"type": "text", "text": text(chance, 0)}]


def answered(chance, parts):
    message = {"role": "assistant", "content": content(chance, parts)}
    if chance.random() < 0.5:
        message[chance.choice(("reasoning", "reasoning_content"))] = text(chance)
    return message


def called(chance, parts, most):
    """An assistant's message with calls, and their results."""
    chosen = [chance.choice(ARGUMENTS) for _ in range(chance.randint(1, most))]
    made = [
        {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(chosen)
    ]
    message = {"role": "assistant", "content": None, "tool_calls": made}
    if chance.random() < 0.5:
        message["reasoning"] = text(chance)
    elif chance.random() < 0.5 or most == 1:
        message["content"] = text(chance)
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": content(chance, parts)}
        for call in made
    ]
    return [message, *results]


def as_sent(messages):
    """The same messages as clients send them: arguments are text."""
    copy = json.loads(json.dumps(messages))
    for message in copy:
        for call in message.get("tool_calls") or []:
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return copy


def joined(messages):
    """The same messages with contents as one string each."""
    copy = json.loads(json.dumps(messages))
    for message in copy:
        if isinstance(message["content"], list):
            message["content"] = "".join(part["text"] for part in message["content"])
    return copy
