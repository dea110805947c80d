# SPDX-License-Identifier: Apache-2.0
"""Calls that are made to be made: what a template writes is what the grammar allows, and a model
that takes any allowed token at all calls a tool with arguments by its schema."""

import numpy as np
import pytest
from chat_folders import tokenizer_of
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
from jaxcp.text.folder import read_tokenizer
from jaxcp.text.grammar import Grammars, checked_grammar

TOOLS = [
    {"type": "function", "function": {"name": name, "description": "", "parameters": schema}}
    for name, schema in {
        "look": {
            "type": "object", "required": ["place", "count"],
            "properties": {
                "place": {"type": "string"},
                "count": {"type": "integer"},
                "unit": {"enum": ["km", "mi"]},
                "sure": {"type": ["boolean", "null"]},
                "tags": {"type": "array", "maxItems": 2, "items": {"$ref": "#/$defs/tag"}},
            },
            "$defs": {"tag": {"enum": [1, "x"]}},
        },
        "stop": {"type": "object", "properties": {}},
    }.items()
]  # fmt: skip
ARGUMENTS = {"place": "a <b> é\n&c", "count": -5, "unit": "mi", "sure": None, "tags": [1, "x"]}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return tokenizers_in(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", NAMES)
def test_what_a_template_writes_is_allowed(name, tokenizers):
    tokenizer = tokenizers(name)
    calls = [("look", ARGUMENTS)] if name == "gpt-oss" else [("look", ARGUMENTS), ("stop", {})]
    prompt = tokenizer.chat.prompt(USER, tools=TOOLS, thinking=None)
    grammar = prompt.call_grammar(None, several=True)
    text = written_by_the_template(tokenizer, TOOLS, *calls)
    text = text[text.index(START[name]) :]
    start = "".join(["<|start|>assistant"] * (name == "gpt-oss"))
    taken, constraint = accepted(tokenizer, grammar.later, start + text)
    assert np.isin(tokenizer.chat.stop_tokens, allowed(constraint)).any() or constraint.complete
    prompt = tokenizer.chat.prompt(USER, tools=TOOLS, thinking=closed(tokenizer))
    taken = taken[len(tokenizer.encode(start, read_control_tokens=True)) :]
    message, malformed = read(tokenizer, prompt, grammar, taken)
    assert arguments_of(message) == calls and not malformed
    one, _ = accepted(tokenizer, prompt.call_grammar(["stop"], several=False).later, start + text)
    assert len(one) < len(taken)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("several", [False, True])
def test_any_way_through_the_grammar_is_a_call(name, several, tokenizers):
    tokenizer, rng, names = tokenizers(name), np.random.default_rng(0), set()
    grammars, chat = Grammars(tokenizer, VOCAB), tokenizer.chat
    prompt = chat.prompt(USER, tools=TOOLS, thinking=closed(tokenizer))
    grammar = prompt.call_grammar(None, several=several)
    thinks = name in ("qwen3", "qwen3-coder")  # only then may it open its thinking
    never = tokenizer.encode("<think>", read_control_tokens=True) if thinks else ()
    begun = "<|start|>assistant" if name == "gpt-oss" else ""  # as behind a thought
    compiled = checked_grammar("grammar", grammar.later if begun else grammar.first)
    end = tokenizer.encode(ENDS.get(name, ""), read_control_tokens=True).tolist()
    for _ in range(8):
        constraint = grammars.constraint(compiled, chat.stop_tokens)
        taken = walk(constraint, chat.stop_tokens, never, rng, end)
        taken = taken[len(tokenizer.encode(begun, read_control_tokens=True)) :]
        message, malformed = read(tokenizer, prompt, grammar, taken)
        made = arguments_of(message)
        assert made and not malformed and not message["content"], message
        assert several or len(made) == 1
        for function, arguments in made:
            names.add(function)
            check(function, arguments)
    assert names == {"look", "stop"}


def check(function, arguments):
    if function == "stop":
        assert arguments == {}
        return
    assert {"place", "count"} <= arguments.keys() <= ARGUMENTS.keys()
    assert isinstance(arguments["place"], str) and type(arguments["count"]) is int
    assert arguments.get("unit", "km") in ("km", "mi")
    assert arguments.get("sure") in (True, False, None)
    assert all(tag in (1, "x") for tag in arguments.get("tags", ()))


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss", "hy3", "deepseek-v4"])
def test_thinking_comes_before_a_call_and_nothing_else_does(name, tokenizers):
    tokenizer = tokenizers(name)
    prompt = tokenizer.chat.prompt(USER, tools=TOOLS, thinking=None)
    grammar = prompt.call_grammar(None, several=True)
    thought = {"gpt-oss": "<|channel|>analysis<|message|>", "qwen3": "<think>"}.get(name)
    parser = prompt.parser(grammar)
    constrained = Constrained(parser, grammar, tokenizer.chat.stop_tokens)
    for text in ("I call", "{", "<|channel|>final"):
        taken, _ = accepted(tokenizer, grammar.first, text)
        assert tokenizer.decode(taken) == "" or name == "gpt-oss"
    if thought and name != "hy3":
        taken, _ = accepted(tokenizer, grammar.first, thought)
        assert len(taken) == len(tokenizer.encode(thought, read_control_tokens=True))
        assert constrained.options({}) == {"grammar": grammar.first}
        assert not parser.reasoning
        parser.push(taken)
        assert parser.reasoning and constrained.moved() and not constrained.moved()
    if parser.reasoning:
        banned = constrained.options({5: 1.0})["logit_bias"]
        assert banned.pop(5) == 1.0 and {*banned} >= {*tokenizer.chat.stop_tokens}
        assert {*banned.values()} == {-100.0}
        parser.push(tokenizer.encode("hm"))
        assert not constrained.moved()
        parser.push(grammar.closing)
        assert not parser.reasoning and constrained.moved()
        assert constrained.options({5: 1.0}) == {"grammar": grammar.later}


def test_thinking_that_is_closed_is_not_opened_again(tokenizers):
    chat = tokenizers("qwen3").chat
    free, told = (chat.prompt(USER, tools=TOOLS, thinking=x) for x in (None, "no_think"))
    assert (
        free.call_grammar(None, several=True).first != told.call_grammar(None, several=True).first
    )
    grammar = told.text_grammar("json_schema", "{}")
    assert grammar.first == grammar.later
    going_on = chat.prompt([*USER, {"role": "assistant", "content": "So: "}])
    grammar = going_on.text_grammar("json_schema", "{}")
    assert grammar.first == grammar.later


def test_what_cannot_be_called(tokenizers, tmp_path):
    prompt = tokenizers("qwen3").chat.prompt(USER, tools=TOOLS)
    with pytest.raises(ValueError, match="tools has no walk; there are look, stop"):
        prompt.call_grammar(["walk"], several=True)
    with pytest.raises(ValueError, match="tools has no function; there are none"):
        tokenizers("qwen3").chat.prompt(USER).call_grammar(None, several=True)
    plain = tokenizer_of(tmp_path / "plain", "qwen3")
    (tmp_path / "plain/chat_template.jinja").write_text("{{ messages[0].content }}")
    plain = read_tokenizer(tmp_path / "plain")
    with pytest.raises(NotImplementedError, match="how this model writes them is not known"):
        plain.chat.prompt(USER, tools=TOOLS).call_grammar(None, several=True)

    def tool(schema):
        return [{"type": "function", "function": {"name": "f", "parameters": schema}}]

    odd = {"properties": {"a": {"enum": ["1"], "type": ["string", "integer"]}}}
    for schema, message in (
        ({"required": ["a"]}, "arguments a of the function f are required"),
        (odd, "none of the values"),
        ({"properties": {"a": {"type": "integer", "minimum": 5, "maximum": 4}}}, "followed"),
    ):
        prompt = tokenizers("hy3").chat.prompt(USER, tools=tool(schema))
        with pytest.raises(ValueError, match=message):
            prompt.call_grammar(None, several=True)
