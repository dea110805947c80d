# SPDX-License-Identifier: Apache-2.0
"""Writes conversations for DeepSeek-V3.2 and V4, which come without a chat template.

After the descriptions that lie beside the models (`encoding/README.md` of DeepSeek-V4, the encoder
of DeepSeek-V3.2). What users write stands between control tokens; calls are DSML.

Efforts of V4 came in two ways: the first checkpoints ask for much thinking at "max", those from
V4-Flash-0731 and V4-Pro-0813 on at "high", and for more yet at "max".
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jaxcp.text.template import to_json
from jaxcp.text.thinking import NO_THINK, Levels

Messages = Sequence[Mapping[str, Any]]

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, THINK_END, DSML = "<think>", "</think>", "｜DSML｜"
MUCH_EFFORT = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to "
    "resolve the root cause, rigorously stress-testing your logic against all potential paths, "
    "edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, "
    "considered alternative, and rejected hypothesis to ensure absolutely no assumption is left "
    "unchecked.\n\n"
)
MOST_EFFORT = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: "
    "exhaustively decompose the problem into its most fundamental components, trace every causal "
    "chain to its root, and resolve the underlying cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles "
    "and are certain that no assumption remains unchecked and no error remains undiscovered.\n\n"
)
V32_TOOLS = """## Tools
You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<{dsml}function_calls>" block like the following as part of \
your reply to the user:
<{dsml}function_calls>
<{dsml}invoke name="$FUNCTION_NAME">
<{dsml}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{dsml}parameter>
...
</{dsml}invoke>
<{dsml}invoke name="$FUNCTION_NAME2">
...
</{dsml}invoke>
</{dsml}function_calls>
String and scalar parameters should be specified as is without any escaping or quotes, while lists \
and objects should use JSON format. The "string" attribute should be set to "true" for string type \
parameters and "false" for other types (numbers, booleans, arrays, objects).
If the thinking_mode is enabled, then after function results you should strongly consider \
outputting a thinking block. Here is an example:
<{dsml}function_calls>
...
</{dsml}function_calls>
<function_results>
...
</function_results>
<think>...thinking about results</think>
Here are the functions available in JSONSchema format:
<functions>
{schemas}
</functions>
"""
V4_TOOLS = """## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by \
writing a "<{dsml}tool_calls>" block like the following:

<{dsml}tool_calls>
<{dsml}invoke name="$TOOL_NAME">
<{dsml}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{dsml}parameter>
...
</{dsml}invoke>
<{dsml}invoke name="$TOOL_NAME2">
...
</{dsml}invoke>
</{dsml}tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types \
(numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside \
<think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

{schemas}

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""


SWITCHES = frozenset({"thinking", "enable_thinking"})
"""Variables by which other servers ask these models to think, or not to."""


class V32:
    """The form of DeepSeek-V3.2, which thinks only where it is asked to."""

    block = "function_calls"
    variables = SWITCHES
    levels: ClassVar[Levels] = {NO_THINK: {"effort": NO_THINK}, "high": {"effort": "high"}}
    literals = "\0".join((BOS, EOS, USER, ASSISTANT, THINK, THINK_END, DSML, V32_TOOLS))
    """All control tokens that it writes."""

    def render(
        self, *, messages: Messages, tools: Any = None, effort: str = "", **given: Any
    ) -> str:
        """Render a conversation, and the beginning of the next turn behind a user's or a tool's.

        Raises:
          ValueError: there are more results than calls before them.
        """
        effort = _switched(effort, given, NO_THINK)
        messages = _with_tools(messages, tools, V32_TOOLS)
        last = _last_user(messages)
        text = BOS
        for i, message in enumerate(messages):
            thinks = effort != NO_THINK and i >= last
            if message["role"] == "system":
                text += message["content"]
            elif message["role"] == "user":
                text += USER + message["content"] + ASSISTANT + (THINK if thinks else THINK_END)
            elif message["role"] == "tool":
                text += self._result(messages, i, thinks)
            else:
                text += _said(message, self.block, thinks)
        return text

    @staticmethod
    def _result(messages: Messages, i: int, thinks: bool) -> str:
        """Write the result of a call, and after that of the last one the model's next turn."""
        first = next((j for j in range(i, -1, -1) if messages[j]["role"] != "tool"), -1)
        calls = messages[first].get("tool_calls", ()) if first >= 0 else ()
        if len(calls) < i - first:
            raise ValueError(
                f"needed a call before each result of a tool; messages have {len(calls)} calls "
                f"before {i - first} results"
            )
        text = "\n\n<function_results>" if i - first == 1 else ""
        text += f"\n<result>{messages[i]['content']}</result>"
        if i - first == len(calls):
            text += f"\n</function_results>\n\n{THINK if thinks else THINK_END}"
        return text


class V4:
    """The form of the first DeepSeek-V4, which thinks unless it is asked not to."""

    block = "tool_calls"
    variables = SWITCHES
    levels: ClassVar[Levels] = {**V32.levels, "max": {"effort": "max"}}
    asks: ClassVar[Mapping[str, str]] = {"max": MUCH_EFFORT}
    """Texts before all others, by the effort."""
    literals = V32.literals.replace(V32_TOOLS, V4_TOOLS)
    """All control tokens that it writes."""

    def render(
        self, *, messages: Messages, tools: Any = None, effort: str = "", **given: Any
    ) -> str:
        """Render a conversation, and the beginning of the next turn behind what is not the
        assistant's: of a system message too, where the description says nothing."""
        effort = _switched(effort, given, "")
        messages = _merged(_with_tools(messages, tools, V4_TOOLS))
        last = -1 if tools else _last_user(messages)  # with tools all thinking is kept
        text = BOS + self.asks.get(effort, "")
        for i, message in enumerate(messages):
            thinks = effort != NO_THINK and i >= last
            if message["role"] == "assistant":
                text += _said(message, self.block, thinks)
                continue
            text += (USER if message["role"] == "user" else "") + message["content"]
            if i + 1 == len(messages) or messages[i + 1]["role"] == "assistant":
                text += ASSISTANT + (THINK if thinks else THINK_END)
        return text


class LaterV4(V4):
    """The form of DeepSeek-V4 from V4-Flash-0731 on, which is told to think much at "high"."""

    levels: ClassVar[Levels] = {
        NO_THINK: {"effort": NO_THINK},
        **{effort: {"effort": effort} for effort in ("low", "high", "max")},
    }
    asks: ClassVar[Mapping[str, str]] = {"high": MUCH_EFFORT, "max": MOST_EFFORT}


V4_ENCODER = "encoding/encoding_dsv4.py"
"""The publisher's encoder in a checkpoint folder. It is never run: its names tell which it is."""


def encoder_of(kind: str, source: str) -> V32 | V4 | None:
    """Make the encoder for a `model_type` of config.json; None where none is known.

    Args:
      source: text of `V4_ENCODER`; nothing where the folder has none, which is read as the first.
    """
    if kind == "deepseek_v32":
        return V32()
    if kind != "deepseek_v4":
        return None
    return LaterV4() if re.search(r"^REASONING_EFFORT_PROMPTS\b", source, re.M) else V4()


def _switched(effort: str, given: Mapping[str, Any], default: str) -> str:
    """Give the effort where `SWITCHES` may be among what is given.

    Raises:
      ValueError: one is no bool, or says the contrary of another or of the effort.
    """
    switches = [given[name] for name in sorted(SWITCHES & given.keys())]
    if not switches:
        return effort or default
    on = switches[0]
    if not all(x is True or x is False for x in switches) or len({*switches}) > 1:
        raise ValueError(f"thinking and enable_thinking must be one bool; got {switches!r:.100}")
    if effort and on == (effort == NO_THINK):
        raise ValueError(f"thinking is {on} and its level {effort}; give one of them")
    return effort or ((default if default != NO_THINK else "high") if on else NO_THINK)


def _with_tools(messages: Messages, tools: Any, form: str) -> Messages:
    """Describe the tools at the end of the first system message, which may be made for it."""
    if not tools:
        return messages
    schemas = "\n".join(to_json(tool["function"]) for tool in tools)
    described = "\n\n" + form.replace("{dsml}", DSML).replace("{schemas}", schemas)
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    return [{**messages[0], "content": messages[0]["content"] + described}, *messages[1:]]


def _merged(messages: Messages) -> list[dict[str, Any]]:
    """Write results as blocks of a user's message, in the order of their calls, and join messages
    of users that follow one another."""
    merged: list[dict[str, Any]] = []
    for _, group in itertools.groupby(messages, lambda m: m["role"] in ("user", "tool")):
        turn = list(group)
        if turn[0]["role"] not in ("user", "tool"):
            merged += map(dict, turn)
            continue
        calls = merged[-1].get("tool_calls", ()) if merged else ()
        order = {call.get("id"): i for i, call in enumerate(calls)}
        results = [m for m in turn if m["role"] == "tool"]
        ordered = iter(sorted(results, key=lambda m: order.get(m.get("tool_call_id"), 0)))
        blocks = [
            f"<tool_result>{next(ordered)['content']}</tool_result>"
            if m["role"] == "tool"
            else m["content"]
            for m in turn
        ]
        merged.append({"role": "user", "content": "\n\n".join(blocks)})
    return merged


def _said(message: Mapping[str, Any], block: str, thinks: bool) -> str:
    """Write what the assistant thought, said and called; before it stands what opens its turn."""
    text = message.get("reasoning_content", "") + THINK_END if thinks else ""
    text += message.get("content", "")
    if calls := message.get("tool_calls"):
        written = "\n".join(map(_call, calls))
        text += f"\n\n<{DSML}{block}>\n{written}\n</{DSML}{block}>"
    return text + EOS


def _call(call: Mapping[str, Any]) -> str:
    function = call["function"]
    arguments = "\n".join(
        f'<{DSML}parameter name="{name}" string="{"true" if isinstance(x, str) else "false"}">'
        f"{x if isinstance(x, str) else to_json(x)}</{DSML}parameter>"
        for name, x in function["arguments"].items()
    )
    return f'<{DSML}invoke name="{function["name"]}">\n{arguments}\n</{DSML}invoke>'


def _last_user(messages: Messages) -> int:
    return max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
