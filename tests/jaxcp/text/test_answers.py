# SPDX-License-Identifier: Apache-2.0
"""Answers as models were seen to write them, wrong ones among them, and what is read of each."""

import json

import pytest
from chat_folders import MODELS, tokenizer_of

USER = {"role": "user", "content": "Hi"}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {
        "s": {"type": "string"}, "n": {"type": "integer"}, "list": {"type": "array"},
    }}}},
]  # fmt: skip
DSML = "｜DSML｜"
HY3_CALL = (
    "<tool_calls>\n<tool_call>f<tool_sep>\n<arg_key>s</arg_key>\n<arg_value>a\n</arg_value>\n"
    "<arg_key>n</arg_key>\n<arg_value>5</arg_value>\n</tool_call>\n</tool_calls>"
)
QWEN3_CALL = '<tool_call>\n{"name": "f", "arguments": {"s": "}", "n": 5}}\n</tool_call>'
V4_CALL = (
    f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n'
    f'<{DSML}parameter name="s" string="true">a</{DSML}parameter>\n'
    f'<{DSML}parameter name="list" string="false">[1, null]</{DSML}parameter>\n'
    f"</{DSML}invoke>\n</{DSML}tool_calls>"
)
OSS = "<|start|>assistant"
OSS_CALL = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"n": 5}<|call|>'


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    return {model: tokenizer_of(folder / model, model) for model in MODELS}


def answer(tokenizer, text, thinking, tools=TOOLS):
    """The message that is read of a text, and whether some of it was malformed."""
    parser = tokenizer.chat.prompt([USER], tools, thinking).parser()
    parser.push(tokenizer.encode(text, read_control_tokens=True).tolist())
    parser.finish()
    return parser.message(), parser.malformed


def said(content=None, reasoning=None, *calls):
    """What is expected: content, thought, and the arguments of calls."""
    return content, reasoning, [*calls]


RIGHT = {
    "thought and answer": ("hy3", "high", "hm</think>Yes<｜hy_eos｜>", said("Yes", "hm")),
    "no thinking": ("hy3", "no_think", "Yes<｜hy_eos｜>", said("Yes")),
    "thought alone": ("hy3", "high", "hm", said(None, "hm")),
    "nothing": ("hy3", "high", "", said("")),
    "a call": ("hy3", "low", f"</think>So{HY3_CALL}", said("So", None, {"s": "a\n", "n": 5})),
    "two calls": (
        "hy3", "no_think", HY3_CALL.replace("</tool_calls>", "<tool_call>f<tool_sep></tool_call>"),
        said(None, None, {"s": "a\n", "n": 5}, {}),
    ),
    "a call in thought is thought": ("hy3", "high", f"{HY3_CALL}</think>x", said("x", HY3_CALL)),
    "Qwen3's newlines": (
        "qwen3", "high", f"<think>\nhm\n</think>\n\nSo\n{QWEN3_CALL}\n{QWEN3_CALL}<|im_end|>",
        said("So", "hm", {"s": "}", "n": 5}, {"s": "}", "n": 5}),
    ),
    "Qwen3 without thinking": ("qwen3", "no_think", "So\n<|im_end|>", said("So\n")),
    "arguments before the name": (
        "qwen3", "no_think", '<tool_call>{"arguments": {"n": 1}, "name": "f"}</tool_call>',
        said(None, None, {"n": 1}),
    ),
    "arguments as text": (
        "qwen3", "no_think", '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>',
        said(None, None, {}),
    ),
    "DeepSeek's call": (
        "deepseek-v4", "high", f"hm</think>So{V4_CALL}<｜end▁of▁sentence｜>",
        said("So", "hm", {"s": "a", "list": [1, None]}),
    ),
    "a call that ends the thinking": (
        "deepseek-v4", "high", f"hm{V4_CALL}", said(None, "hm", {"s": "a", "list": [1, None]}),
    ),
    "channels": (
        "gpt-oss", "low", "<|channel|>analysis<|message|>hm<|end|>" + OSS
        + "<|channel|>commentary<|message|>Let me see.<|end|>" + OSS + OSS_CALL,
        said("Let me see.", "hm", {"n": 5}),
    ),
    "two thoughts": (
        "gpt-oss", "low", f"<|channel|>analysis<|message|>a<|end|>{OSS}<|channel|>analysis"
        f"<|message|>b<|end|>{OSS}<|channel|>final<|message|>c<|return|>", said("c", "a\n\nb"),
    ),
    "recipient in the role": (
        "gpt-oss", "low", ' to=functions.f<|channel|>commentary json<|message|>{"n": 5}<|call|>',
        said(None, None, {"n": 5}),
    ),
    "a call as a thought": (
        "gpt-oss", "low", '<|channel|>analysis to=functions.f<|message|>{"n": 5}<|call|>',
        said(None, None, {"n": 5}),
    ),
    "the stop token is not pushed": (
        "gpt-oss", "low", OSS_CALL.removesuffix("<|call|>"), said(None, None, {"n": 5}),
    ),
    "an end that is forgotten": (
        "gpt-oss", "low", f"<|channel|>analysis<|message|>a{OSS}<|channel|>final<|message|>c",
        said("c", "a"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers(tokenizers, name):
    model, thinking, text, (content, reasoning, calls) = RIGHT[name]
    message, malformed = answer(tokenizers[model], text, thinking)
    assert not malformed
    assert (message["content"], message.get("reasoning")) == (content, reasoning)
    functions = [call["function"] for call in message.get("tool_calls", ())]
    assert [json.loads(function["arguments"]) for function in functions] == calls
    assert {function["name"] for function in functions} <= {"f"}


WRONG = {
    "a wrong tag after the name": ("hy3", "<tool_calls>\n<tool_call>f</arg_value>\n</tool_calls>"),
    "an unknown function": ("hy3", HY3_CALL.replace(">f<", ">g<")),
    "an argument twice": ("hy3", HY3_CALL.replace("<arg_key>n", "<arg_key>s")),
    "an argument without a value": ("hy3", HY3_CALL.replace("<arg_value>5</arg_value>", "")),
    "a call that is cut": ("hy3", HY3_CALL[:-40]),
    "no call between the tags": ("hy3", "<tool_calls>\n</tool_calls>"),
    "an end without a beginning": ("hy3", "a</tool_call>b"),
    "thinking that ends twice": ("hy3", "a</think>b"),
    "a control token of another place": ("hy3", "a<arg_key>b"),
    "no JSON": ("qwen3", QWEN3_CALL.replace("}}", "}")),
    "not a number": ("qwen3", QWEN3_CALL.replace("5", "NaN")),
    "two names": ("qwen3", QWEN3_CALL.replace("5}", '5}, "name": "g"')),
    "no name": ("qwen3", QWEN3_CALL.replace('"name": "f", ', "")),
    "a number as arguments": ("qwen3", '<tool_call>{"name": "f", "arguments": 5}</tool_call>'),
    "deep arguments": ("qwen3", QWEN3_CALL.replace("5", "[" * 9_000)),
    "a list that is none": ("deepseek-v4", V4_CALL.replace("null]", "]")),
    "no parameter": ("deepseek-v4", V4_CALL.replace("<" + DSML + "parameter name", "<parameter")),
    "no header": ("gpt-oss", "Hello"),
    "a header without a channel": ("gpt-oss", " to<|message|>Hello<|end|>"),
    "an unknown channel": ("gpt-oss", "<|channel|>aside<|message|>Hello<|end|>"),
    "tokens in a header": ("gpt-oss", "<|channel|>fin<|end|>al<|message|>Hello"),
    "an unknown recipient": ("gpt-oss", "<|channel|>commentary to=python<|message|>1<|call|>"),
    "arguments that are cut": ("gpt-oss", OSS_CALL.replace("5}", "5")),
    "arguments that are a list": ("gpt-oss", OSS_CALL.replace('{"n": 5}', "[1]")),
}  # fmt: skip
THINKING = {"gpt-oss": "low"}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_text(tokenizers, name):
    model, text = WRONG[name]
    message, malformed = answer(tokenizers[model], text, THINKING.get(model, "no_think"))
    assert malformed and "tool_calls" not in message and "reasoning" not in message
    assert squeezed(message["content"]) in squeezed(text)
    assert message["content"].strip()


def squeezed(text):
    """A text without the tags around calls, which are no part of a call that is malformed."""
    for tag in ("<tool_calls>", "</tool_calls>", f"<{DSML}tool_calls>", f"</{DSML}tool_calls>"):
        text = text.replace(tag, "")
    return "".join(text.split())


@pytest.mark.parametrize(
    ("model", "text"), [("hy3", HY3_CALL), ("qwen3", QWEN3_CALL), ("deepseek-v4", V4_CALL)]
)
def test_without_tools_a_call_is_text(tokenizers, model, text):
    message, malformed = answer(tokenizers[model], text, "no_think", tools=None)
    assert malformed and "tool_calls" not in message
    assert "f" in message["content"]


def test_tags_that_are_spelled_are_text(tokenizers):
    tokenizer = tokenizers["hy3"]
    parser = tokenizer.chat.prompt([USER], TOOLS, "high").parser()
    parser.push([*b"I write </think> here", *tokenizer.encode("é").tolist()])
    assert parser.reasoning and parser.reasoning_tokens == 23
    assert parser.finish() == []
    assert parser.message()["reasoning"] == "I write </think> hereé"


def test_arguments_come_while_they_are_written(tokenizers):
    for model, text, level in (("hy3", HY3_CALL, "no_think"), ("qwen3", QWEN3_CALL, "no_think")):
        tokenizer = tokenizers[model]
        parser = tokenizer.chat.prompt([USER], TOOLS, level).parser()
        pieces = []
        for i in tokenizer.encode(text, read_control_tokens=True).tolist():
            pieces += [delta.call for delta in parser.push([i]) if delta.kind == "call"]
        assert pieces[0].name == "f" and pieces[0].id and len(pieces[0].arguments) < 2
        assert len(pieces) > 5 and not any(piece.name or piece.id for piece in pieces[1:])
        before_the_end = "".join(piece.arguments for piece in pieces[:-1])
        with pytest.raises(ValueError, match="Expecting"):
            json.loads(before_the_end)
        assert json.loads(before_the_end + pieces[-1].arguments)["n"] == 5


def test_a_broken_call_is_said_to_be(tokenizers):
    tokenizer = tokenizers["hy3"]
    parser = tokenizer.chat.prompt([USER], TOOLS, "no_think").parser()
    cut = HY3_CALL[:90] + HY3_CALL
    deltas = parser.push(tokenizer.encode(cut, read_control_tokens=True).tolist())
    calls = [delta.call for delta in deltas if delta.kind == "call"]
    assert [call.index for call in calls if call.broken] == [0]
    assert [call["function"]["name"] for call in parser.message()["tool_calls"]] == ["f"]
    assert calls[-1].index == 1, "the index of the broken one is not used again"


def test_characters_are_whole(tokenizers):
    tokenizer = tokenizers["hy3"]
    parser = tokenizer.chat.prompt([USER], TOOLS, "high").parser()
    deltas = []
    for i in [*"日本".encode(), tokenizer.backend.token_to_id("</think>"), *"語".encode()]:
        deltas += parser.push([i])
    assert [(d.kind, d.text) for d in deltas] == [
        ("reasoning", "日"), ("reasoning", "本"), ("text", "語"),
    ]  # fmt: skip
    # half a character before a control token is one that nobody can read
    parser = tokenizer.chat.prompt([USER], TOOLS, "high").parser()
    parser.push([*"日".encode()[:2], tokenizer.backend.token_to_id("</think>"), *b"x"])
    assert (parser.message()["reasoning"], parser.message()["content"]) == ("\ufffd", "x")
