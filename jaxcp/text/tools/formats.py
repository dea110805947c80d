# SPDX-License-Identifier: Apache-2.0
"""The formats in which models call tools, and how a checkpoint's own is recognized."""

import dataclasses
from collections.abc import Collection

from jaxcp.text.tools import harmony
from jaxcp.text.tools.tagged import Tags

HARMONY, DSML = "harmony", "｜DSML｜"
PLAIN = Tags()
"""Thinking, and no calls."""
HY3 = Tags(
    group=("<tool_calls>",), group_end="</tool_calls>", call="<tool_call>",
    call_end="</tool_call>", name_end="<tool_sep>", key="<arg_key>", key_end="</arg_key>",
    value={"<arg_value>": "schema"}, value_end="</arg_value>",
)  # fmt: skip
QWEN3 = Tags(call="<tool_call>", call_end="</tool_call>", json=True, newlines=True)
QWEN3_CODER = Tags(
    group=("<tool_call>",), group_end="</tool_call>", call="<function=", call_end="</function>",
    name_end=">", key="<parameter=", key_end=">", value={"\n": "schema"},
    value_end="\n</parameter>", newlines=True,
)  # fmt: skip


def dsml(block: str) -> Tags:
    """DeepSeek's format; `block` is the name of the tag around all calls."""
    return Tags(
        group=(f"\n\n<{DSML}{block}>", f"<{DSML}{block}>"), group_end=f"</{DSML}{block}>",
        call=f'<{DSML}invoke name="', call_end=f"</{DSML}invoke>", name_end='">',
        key=f'<{DSML}parameter name="', key_end='"',
        value={' string="true">': "string", ' string="false">': "json"},
        value_end=f"</{DSML}parameter>", calls_end_thinking=True, names=(DSML,),
    )  # fmt: skip


def format_of(source: str, tokens: Collection[str]) -> Tags | str:
    """Recognize the format by what a template writes: its tags, or `HARMONY`.

    Tags of thinking are left out where neither the template nor a token has them: a model that
    never thinks may still speak of them.
    """
    form = _calls_of(source)
    if isinstance(form, str) or "<think" in source or any(x.startswith("<think") for x in tokens):
        return form
    return dataclasses.replace(form, think="", think_end="")


def _calls_of(source: str) -> Tags | str:
    if harmony.CHANNEL in source and harmony.MESSAGE in source:
        return HARMONY
    if DSML in source:  # somebody's template for a model that its publisher gave none
        return dsml("function_calls" if "function_calls" in source else "tool_calls")
    if "<tool_sep" in source and "<arg_key" in source:
        return HY3
    if "<function=" in source and "<parameter=" in source:
        return QWEN3_CODER
    if "<tool_call>" in source and '"arguments"' in source:
        return QWEN3
    return PLAIN
