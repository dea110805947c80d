# SPDX-License-Identifier: Apache-2.0
"""Strict tools: an answer is any text, and a call of one of them that it has follows its schema."""

import numpy as np
import pytest
from grammar_walks import (
    ENDS,
    NAMES,
    START,
    USER,
    VOCAB,
    accepted,
    allowed,
    arguments_of,
    closed,
    read,
    tokenizers_in,
    walk,
    written_by_the_template,
)

from jaxcp.text.constrained import Constrained
from jaxcp.text.grammar import Grammars, checked_grammar

LOOK = {
    "type": "object", "required": ["place", "unit", "count"], "additionalProperties": False,
    "properties": {
        "place": {"type": "string"},
        "unit": {"enum": ["km", "mi"]},
        "count": {"type": ["integer", "null"]},
    },
}  # fmt: skip
NOTE = {"type": "object", "properties": {"text": {"type": "string"}}}
TOOLS = [
    {"type": "function", "function": {"name": "look", "strict": True, "parameters": LOOK}},
    {"type": "function", "function": {"name": "note", "parameters": NOTE}},
]
GOOD = ("look", {"place": "a <b> é\n&c", "unit": "mi", "count": None})
BAD = ("look", {"place": "here", "unit": "ft", "count": None})
FREE = ("note", {"text": "x\ny", "more": "[1]"})
SAID = "Let me <look>:\nso"
BEFORE = {"gpt-oss": "<|channel|>commentary<|message|>{}<|end|><|start|>assistant"}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return tokenizers_in(tmp_path_factory.mktemp("models"))


def asked(tokenizer, tools=TOOLS):
    return tokenizer.chat.prompt(USER, tools=tools, thinking=closed(tokenizer))


def of_template(name, tokenizer, *calls):
    text = written_by_the_template(tokenizer, TOOLS, *calls)
    return text[text.index(START[name]) :]


def ends_in(constraint, tokenizer):
    return np.isin(tokenizer.chat.stop_tokens, allowed(constraint)).any() or constraint.complete


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("said", ["", SAID])
def test_text_and_calls_are_allowed_as_the_template_writes_them(name, said, tokenizers):
    tokenizer = tokenizers(name)
    prompt, calls = asked(tokenizer), [GOOD] if name == "gpt-oss" else [GOOD, FREE]
    grammar = prompt.strict_grammar(several=True)
    begun = "<|start|>assistant" * (name == "gpt-oss")
    text = BEFORE.get(name, "{}").format(said) if said else ""
    text += of_template(name, tokenizer, *calls)
    taken, constraint = accepted(tokenizer, grammar.later, begun + text)
    assert ends_in(constraint, tokenizer)
    taken = taken[len(tokenizer.encode(begun, read_control_tokens=True)) :]
    message, malformed = read(tokenizer, prompt, grammar, taken)
    assert arguments_of(message) == calls and not malformed
    assert (message["content"] or "").rstrip("\n") == said


@pytest.mark.parametrize("name", ["hy3", "hy3-spelled", "qwen3-coder", "deepseek-v4"])
def test_a_call_whose_group_was_forgotten_follows_the_schema_too(name, tokenizers):
    tokenizer = tokenizers(name)
    prompt = asked(tokenizer)
    opens = {"qwen3-coder": "<function", "deepseek-v4": "<｜DSML｜invoke"}.get(name, "<tool_call>")
    closes = {"qwen3-coder": "</function>", "deepseek-v4": "</｜DSML｜invoke>"}
    for call, whole in ((GOOD, True), (BAD, False)):
        text = of_template(name, tokenizer, call)
        end = closes.get(name, "</tool_call>")
        text = SAID + text[text.index(opens) : text.index(end) + len(end)]
        grammar = prompt.strict_grammar(several=False)
        taken, constraint = accepted(tokenizer, grammar.later, text)
        assert bool(ends_in(constraint, tokenizer)) == whole
        if whole:
            message, malformed = read(tokenizer, prompt, grammar, taken)
            assert arguments_of(message) == [call] and not malformed
            assert message["content"] == SAID


@pytest.mark.parametrize("name", NAMES)
def test_text_alone_is_an_answer(name, tokenizers):
    tokenizer = tokenizers(name)
    text = "Nothing < to\n\n do {1}"
    written = f"<|start|>assistant<|channel|>final<|message|>{text}" if name == "gpt-oss" else text
    for several in (False, True):
        grammar = asked(tokenizer).strict_grammar(several=several)
        taken, constraint = accepted(tokenizer, grammar.later, written)
        assert tokenizer.decode(taken).endswith(text) and ends_in(constraint, tokenizer)


@pytest.mark.parametrize("name", NAMES)
def test_a_strict_call_ends_where_it_leaves_the_schema_and_another_does_not(name, tokenizers):
    tokenizer = tokenizers(name)
    grammar = asked(tokenizer).strict_grammar(several=True)
    begun = "<|start|>assistant" * (name == "gpt-oss")
    ids = {}
    for which, call in (("bad", BAD), ("free", FREE)):
        text = begun + of_template(name, tokenizer, call)
        taken, constraint = accepted(tokenizer, grammar.later, text)
        ids[which] = len(taken)
        assert ends_in(constraint, tokenizer) == (which == "free")
        upto = text.partition("ft" if which == "bad" else "[1]")[0]
        assert len(tokenizer.encode(upto, read_control_tokens=True)) <= len(taken)
    unknown = begun + of_template(name, tokenizer, FREE).replace("note", "nose")
    taken, _ = accepted(tokenizer, grammar.later, unknown)
    assert len(taken) < ids["free"] and not tokenizer.decode(taken).endswith("nose")


@pytest.mark.parametrize("name", NAMES)
def test_any_way_on_from_where_a_call_is_opened_is_a_call_by_the_schema(name, tokenizers):
    tokenizer, rng = tokenizers(name), np.random.default_rng(1)
    grammars, chat, prompt = Grammars(tokenizer, VOCAB), tokenizer.chat, asked(tokenizer)
    grammar = prompt.strict_grammar(several=False)
    begun = "<|start|>assistant" * (name == "gpt-oss")
    compiled = checked_grammar("grammar", grammar.later)
    end = tokenizer.encode(ENDS.get(name, ""), read_control_tokens=True).tolist()
    call = begun + of_template(name, tokenizer, GOOD)
    opened = tokenizer.encode(call.partition("look")[0] + "look", read_control_tokens=True)
    for _ in range(6):
        constraint = grammars.constraint(compiled, chat.stop_tokens)
        for token in opened.tolist():
            constraint.take(token)
        taken = [*opened, *walk(constraint, chat.stop_tokens, (), rng, end)]
        taken = taken[len(tokenizer.encode(begun, read_control_tokens=True)) :]
        message, malformed = read(tokenizer, prompt, grammar, taken)
        [(function, arguments)] = arguments_of(message)
        assert isinstance(arguments["place"], str) and arguments["unit"] in ("km", "mi")
        assert arguments["count"] is None or type(arguments["count"]) is int
        assert arguments.keys() == LOOK["properties"].keys()
        assert function == "look" and not malformed and not message["content"]


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss", "deepseek-v4"])
def test_thinking_comes_before_as_without_strict_tools(name, tokenizers):
    tokenizer = tokenizers(name)
    prompt = tokenizer.chat.prompt(USER, tools=TOOLS, thinking=None)
    grammar = prompt.strict_grammar(several=True)
    parser = prompt.parser(grammar)
    constrained = Constrained(parser, grammar, tokenizer.chat.stop_tokens)
    if not parser.reasoning:
        thought = {"gpt-oss": "<|channel|>analysis<|message|>", "qwen3": "<think>"}[name]
        taken, _ = accepted(tokenizer, grammar.first, thought)
        assert len(taken) == len(tokenizer.encode(thought, read_control_tokens=True))
        parser.push(taken)
        assert parser.reasoning and constrained.moved()
    assert "grammar" not in constrained.options({})
    parser.push([*tokenizer.encode("hm"), *grammar.closing])
    assert constrained.moved() and constrained.options({}) == {"grammar": grammar.later}


def test_an_answer_that_was_begun_goes_on_and_may_still_call(tokenizers):
    tokenizer = tokenizers("gpt-oss")
    prompt = tokenizer.chat.prompt([*USER, {"role": "assistant", "content": "So "}], tools=TOOLS)
    grammar = prompt.strict_grammar(several=False)
    for call in ("", "<|end|><|start|>assistant" + of_template("gpt-oss", tokenizer, GOOD)):
        taken, constraint = accepted(tokenizer, grammar.first, f"it is.{call}")
        assert ends_in(constraint, tokenizer) and len(taken) > 5


def test_a_prompt_is_the_same_and_only_strict_tools_have_a_grammar(tokenizers):
    chat = tokenizers("qwen3").chat
    loose = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": False}}, TOOLS[1]]
    prompts = [chat.prompt(USER, tools=tools) for tools in (TOOLS, loose)]
    assert prompts[0].ids == prompts[1].ids and "strict" not in prompts[0].text
    assert prompts[1].strict_grammar(several=True) is None
    bare = [{"type": "function", "function": {"name": "go", "strict": True}}]
    grammar = chat.prompt(USER, tools=bare).strict_grammar(several=True)
    call = '<tool_call>\n{{"name": "go", "arguments": {}}}\n</tool_call>'
    for arguments, whole in (("{}", True), ('{"a": 1}', False)):
        _, constraint = accepted(tokenizers("qwen3"), grammar.later, call.format(arguments))
        assert ends_in(constraint, tokenizers("qwen3")) == whole
