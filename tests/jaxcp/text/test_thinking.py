# SPDX-License-Identifier: Apache-2.0
"""Levels, budgets and OpenAI's efforts; what a template tells for each; thoughts in a history."""

import pytest
from chat_folders import MODELS, tokenizer_of
from conversations import TOOLS

from jaxcp.text.template import Template
from jaxcp.text.thinking import level_of_effort

USER = {"role": "user", "content": "Hi"}
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
MAPPED = {
    ("no_think", "low", "high"): "no_think no_think low low high high high",
    ("no_think", "high"): "no_think no_think high high high high high",
    ("low", "medium", "high"): "low low low medium high high high",
    ("no_think", "high", "max"): "no_think no_think high high high high max",
    ("no_think", "low", "medium", "xhigh"): "no_think no_think low medium medium xhigh xhigh",
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("thinking")
    return {model: tokenizer_of(folder / model, model) for model in MODELS}


@pytest.mark.parametrize("levels", MAPPED)
def test_efforts_map_to_levels(levels):
    assert [level_of_effort(effort, levels) for effort in EFFORTS] == MAPPED[levels].split()
    with pytest.raises(ValueError, match="reasoning_effort must be one of none, minimal"):
        level_of_effort("much", levels)


def test_no_levels_take_no_effort(tmp_path):
    assert level_of_effort("high", ()) is None


TEMPLATES = {
    "{{ messages }}": (),
    "{{ enable_thinking }}": ("no_think", "high"),
    "{% if thinking %}x{% endif %}": ("no_think", "high"),
    "{{ reasoning_effort }}": ("low", "medium", "high"),
    "{{ reasoning_effort }}{{ enable_thinking }}": ("no_think", "low", "medium", "high"),
    "{% if reasoning_effort not in ['high', 'no_think'] %}x{% endif %}": ("no_think", "high"),
    "{% if reasoning_effort not in ('max', 'low') %}x{% endif %}": ("low", "max"),
}


@pytest.mark.parametrize("source", TEMPLATES)
def test_levels_of_templates(source):
    assert tuple(Template(source).levels) == TEMPLATES[source]


CLOSING = {
    "hy3": "</think>",
    "hy3-released": "</think:opensource>",
    "qwen3": "\n</think>\n\n",
    "gpt-oss": "<|end|><|start|>assistant<|channel|>final<|message|>",
    "deepseek-v4": "</think>",
}
BEGINS = {"qwen3": "<think>\n", "gpt-oss": "<|channel|>analysis<|message|>"}


@pytest.mark.parametrize("model", CLOSING)
def test_a_budget_closes_the_thinking(tokenizers, model):
    tokenizer = tokenizers[model]
    parser = tokenizer.chat.prompt([USER], thinking=5).parser()
    begin = tokenizer.encode(BEGINS.get(model, ""), read_control_tokens=True).tolist()
    end = tokenizer.chat.stop_tokens[0]
    thought, answer = iter(b"abcdefghij"), iter([*b"Yes", *[end] * 9])
    written = list(begin)
    parser.push(begin)
    for _ in range(12):
        closing = parser.closing
        ids = closing or [
            next(thought if parser.reasoning else answer, tokenizer.chat.stop_tokens[0])
        ]
        written += ids
        parser.push(ids)
    parser.finish()
    assert parser.message()["content"] == "Yes" and not parser.malformed
    newline = model == "qwen3"  # a token of the thinking that is not shown
    assert parser.message()["reasoning"] == "abcde"[: 5 - newline]
    text = tokenizer.backend.decode(written, skip_special_tokens=False)
    assert CLOSING[model] in text and text.count("</think") <= 1


def test_a_budget_that_is_not_reached_closes_nothing(tokenizers):
    tokenizer = tokenizers["hy3"]
    parser = tokenizer.chat.prompt([USER], thinking=5).parser()
    parser.push([*b"abc", tokenizer.backend.token_to_id("</think>"), *b"a long answer"])
    assert parser.closing == () and parser.reasoning_tokens == 4
    parser = tokenizer.chat.prompt([USER], thinking="high").parser()
    parser.push(b"a long thought")
    assert parser.reasoning and parser.closing == ()
    assert not tokenizer.chat.prompt([USER], thinking=0).parser().reasoning, "0 is no thinking"


def test_a_model_without_levels_says_so(tokenizers):
    chat = tokenizers["hy3"].chat
    plain = type(chat)(tokenizers["hy3"], Template("{{ messages[0].content }}"), "harmony")
    assert plain.thinking_levels == ()
    with pytest.raises(ValueError, match="this one has none"):
        plain.prompt([USER], thinking="high")


THOUGHT = {"role": "assistant", "content": "b", "reasoning": "SECRET"}
CALLS = {
    "role": "assistant", "content": None, "reasoning": "SECRET",
    "tool_calls": [{"id": "1", "function": {"name": "stop", "arguments": "{}"}}],
}  # fmt: skip
RESULT = {"role": "tool", "tool_call_id": "1", "content": "done"}


@pytest.mark.parametrize("model", ["qwen3", "gpt-oss", "deepseek-v32", "deepseek-v4"])
def test_thoughts_of_earlier_turns_are_dropped_as_the_template_does(tokenizers, model):
    chat, level = tokenizers[model].chat, "high"
    dropped = chat.prompt([USER, THOUGHT, USER], thinking=level).text
    within = chat.prompt([USER, CALLS, RESULT], TOOLS, thinking=level).text
    later = chat.prompt([USER, CALLS, RESULT, THOUGHT, USER], TOOLS, thinking=level).text
    assert "SECRET" not in dropped
    assert within.count("SECRET") == 1, "in a loop of tools it is kept"
    assert later.count("SECRET") == 2 * (model == "deepseek-v4"), "V4 keeps all beside tools"
