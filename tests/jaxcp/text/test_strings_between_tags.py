# SPDX-License-Identifier: Apache-2.0
"""Strings that stand between tags are held to their schema: what validators take may be written,
what they refuse may not, and what cannot be held to is named."""

import datetime
import ipaddress
import re
import uuid
from urllib.parse import urlsplit

import numpy as np
import pytest
from grammar_walks import (
    ENDS,
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

from jaxcp.text.grammar import Grammars, checked_grammar

TAGGED = ["hy3", "hy3-spelled", "qwen3-coder", "deepseek-v4", "deepseek-v4-spelled"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return tokenizers_in(tmp_path_factory.mktemp("models"))


def tools(schema, **more):
    whole = {"type": "object", "properties": {"x": schema}, "required": ["x"], **more}
    return [{"type": "function", "function": {"name": "f", "description": "", "parameters": whole}}]


def may_be(tokenizers, name, schema, value, **more):
    """Tell whether a call with this argument, as the template writes it, follows the grammar."""
    tokenizer, offered = tokenizers(name), tools(schema, **more)
    prompt = tokenizer.chat.prompt(USER, tools=offered, thinking=closed(tokenizer))
    grammar = prompt.call_grammar(None, several=False)
    text = written_by_the_template(tokenizer, offered, ("f", {"x": value}))
    taken, constraint = accepted(tokenizer, grammar.later, text[text.index(START[name]) :])
    stops = np.isin(tokenizer.chat.stop_tokens, allowed(constraint)).any()
    whole = bool(stops or constraint.complete)
    if whole:
        message, malformed = read(tokenizer, prompt, grammar, taken)
        assert arguments_of(message) == [("f", {"x": value})] and not malformed
    return whole


WORDS = ["", "a", "b", "ab", "xaby", "a\nb", "5", "55", "a-5", "é", "٣", "/a/", "a.b", "AB", "[&]"]
PATTERNS = [
    "a", "^a", "b$", "^a|b$", "^(?:a|b)$", "^[0-9]+$", r"^\d{2}$", r"\D", r"^[^\d]$", r"^\w$",
    r"a\.b", "a/b|^/a", "^.$", r"^a[\s\S]b$", "^[[&]+", r"^[^a]\d*$", "^$", "(a|x)(?:b)", "[/]",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_is_searched_for_as_validators_do(pattern, tokenizers):
    for word in WORDS:
        wanted = (
            re.search(pattern.replace("$", r"\Z").replace("[[", r"[\["), word, re.ASCII) is not None
        )
        if word == "٣" and "\\" in pattern:
            continue  # dialects differ
        for name in ("hy3", "hy3-spelled"):
            assert may_be(tokenizers, name, {"type": "string", "pattern": pattern}, word) == wanted


def test_what_dialects_take_for_a_digit_is_not_written(tokenizers):
    for pattern in (r"^\d$", r"^\D$", r"^\w$", r"^[^\d]$", r"^[^\w]$"):
        assert not may_be(tokenizers, "hy3", {"type": "string", "pattern": pattern}, "٣")


FORMATS = {
    "date": (["2024-02-29", "1999-12-31"], ["2023-02-29", "2024-13-01", "2024-04-31", "24-1-1"]),
    "time": (["12:30:59Z", "23:00:00.25+02:00"], ["12:30Z", "24:00:00Z", "12:30:00"]),
    "date-time": (["2024-02-29T12:30:59Z"], ["2024-02-29", "2024-02-30T12:30:59Z"]),
    "duration": (["P3Y6M4DT12H30M5S", "P2W", "PT5M"], ["P", "PT", "3D", "P1Y2D"]),
    "uuid": (["f81d4fae-7dec-11d0-a765-00a0c91e6bf6"], ["f81d4fae7dec11d0a76500a0c91e6bf6", "f"]),
    "email": (["joe.bloggs@example.com", "te~st@a-b.org"], ["joe", "@a.b", "a b@c.d", ".a@b.c"]),
    "hostname": (["www.example.com", "a"], ["-a.b", "a..b", "a_b", "x" * 64]),
    "ipv4": (["127.0.0.1", "255.255.255.255"], ["256.0.0.1", "1.2.3", "01.2.3.4"]),
    "ipv6": (["::1", "fe80::a:b", "1:2:3:4:5:6:7:8", "::ffff:1.2.3.4"], ["1::2::3", ":", "g::"]),
    "uri": (["http://a.b:80/c?d=%20#e", "urn:a:b", "file:///x"], ["a", "//a/b", "a:// b", "a:%"]),
}  # fmt: skip
"""Examples of the RFCs, after the suite of JSON Schema's tests."""


@pytest.mark.parametrize("form", FORMATS)
def test_a_format_is_followed(form, tokenizers):
    for name in ("hy3", "qwen3-coder"):
        for wanted, texts in zip((True, False), FORMATS[form], strict=True):
            for text in texts:
                schema = {"type": "string", "format": form}
                assert may_be(tokenizers, name, schema, text) == wanted, text


READERS = {
    "date": datetime.date.fromisoformat, "date-time": datetime.datetime.fromisoformat,
    "uuid": uuid.UUID, "ipv4": ipaddress.IPv4Address, "ipv6": ipaddress.IPv6Address,
    "uri": urlsplit,
}  # fmt: skip


@pytest.mark.parametrize("name", TAGGED)
def test_any_way_through_the_grammar_is_by_the_schema(name, tokenizers):
    tokenizer, rng = tokenizers(name), np.random.default_rng(0)
    grammars, chat = Grammars(tokenizer, VOCAB), tokenizer.chat
    schema = {
        "type": "object", "required": ["code", "maybe", "list", *READERS],
        "properties": {
            "code": {"type": "string", "pattern": "^[A-C]{2,3}$", "maxLength": 2},
            "maybe": {"$ref": "#/$defs/maybe"},
            "list": {"anyOf": [{"type": "string", "minLength": 1, "maxLength": 3},
                               {"type": "array", "items": {"enum": [1]}, "maxItems": 2}]},
            **{form: {"type": "string", "format": form} for form in READERS},
        },
        "$defs": {"maybe": {"type": ["string", "null", "boolean", "integer"], "maxLength": 4}},
    }  # fmt: skip
    offered = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    prompt = chat.prompt(USER, tools=offered, thinking=closed(tokenizer))
    grammar = prompt.call_grammar(None, several=False)
    compiled, kinds = checked_grammar("grammar", grammar.later), set()
    end = tokenizer.encode(ENDS.get(name, ""), read_control_tokens=True).tolist()
    for _ in range(6):
        constraint = grammars.constraint(compiled, chat.stop_tokens)
        taken = walk(constraint, chat.stop_tokens, (), rng, end)
        message, malformed = read(tokenizer, prompt, grammar, taken)
        [(_, made)] = arguments_of(message)
        assert not malformed and re.fullmatch("[A-C]{2}", made["code"])
        assert made["maybe"] is None or isinstance(made["maybe"], bool | int | str)
        assert not isinstance(made["maybe"], str) or len(made["maybe"]) <= 4
        kinds.add(type(made["list"]))
        assert (
            0 < len(made["list"]) <= 3
            if isinstance(made["list"], str)
            else (len(made["list"]) <= 2 and {*made["list"]} <= {1})
        )
        for form, reader in READERS.items():
            reader(made[form])
    assert kinds <= {str, list}


@pytest.mark.parametrize("name", TAGGED)
def test_a_string_never_looks_like_another_of_its_types(name, tokenizers):
    kinds = {"type": ["string", "null", "integer"]}
    for value in (None, 5, "five", "5 a"):
        assert may_be(tokenizers, name, kinds, value)
    choices = {"anyOf": [{"enum": ["a", "b"]}, {"type": "null"}]}
    assert [may_be(tokenizers, name, choices, x) for x in ("a", None, "c")] == [True, True, False]
    items = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]}
    for value, wanted in (("a[", True), ([5], True), (["a"], False)):
        assert may_be(tokenizers, name, items, value) == wanted


def test_choices_of_one_schema_are_what_each_says(tokenizers):
    one = {"oneOf": [{"const": "a", "title": "A"}, {"const": "b"}]}
    both = {"allOf": [{"$ref": "#/$defs/s"}], "maxLength": 2, "description": "short"}
    more = {"$defs": {"s": {"type": "string", "pattern": "^a", "description": "of a"}}}
    for schema, good, bad in ((one, "b", "c"), (both, "ab", "abc"), (both, "a", "b")):
        assert may_be(tokenizers, "hy3", schema, good, **more)
        assert not may_be(tokenizers, "hy3", schema, bad, **more)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "string", "pattern": "a(?=b)"}, "'x' of the function f: (?s:.*)look"),
        ({"type": "string", "pattern": r"\bword"}, "'x' of the function f: (?s:.*)look"),
        ({"type": "string", "pattern": r"(a|^b)"}, "looks around"),
        ({"type": "string", "format": "sandwich"}, "'x' of the function f: .*sandwich"),
        ({"type": "string", "pattern": "^a$", "format": "date"}, "'x' of the function f: "),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "'x' of the function f: "),
        ({"type": "string", "not": {"const": "a"}}, "'not' cannot be followed"),
        ({"type": "string", "pattern": 5}, "'x' of the function f: "),
        ({"enum": ["a"], "pattern": "b"}, "'x' of the function f: none of the values by"),
        ({"enum": ["a"], "pattern": "a(?=b)"}, "'x' of the function f: (?s:.*)look"),
        ({"enum": ["a"], "format": "sandwich"}, "'x' of the function f: .*sandwich"),
        ({"type": ["string", "integer"], "minimum": 3}, "minimum of a number"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 2}]}, "in common"),
        ({"allOf": [{"type": "string", "maxLength": 3}, {"maxLength": 2}]}, "said twice"),
        ({"anyOf": [{"$ref": "#/nowhere"}, {"type": "string"}]}, "nowhere in the schema"),
        ({"anyOf": [{"$ref": "#/properties/x"}, {"type": "string"}]}, "within itself"),
    ],
)
def test_what_cannot_be_followed_is_named(schema, said, tokenizers):
    prompt = tokenizers("hy3").chat.prompt(USER, tools=tools(schema))
    with pytest.raises(ValueError, match=said):
        prompt.call_grammar(None, several=True)


@pytest.mark.parametrize("odd", [{"required": 5}, {"required": [{}]}, {"properties": True}])
def test_a_schema_that_is_none_is_named(odd, tokenizers):
    prompt = tokenizers("hy3").chat.prompt(USER, tools=tools({"type": "string"}, **odd))
    with pytest.raises(ValueError, match="the schema of the function f needs"):
        prompt.call_grammar(None, several=True)


@pytest.mark.parametrize("key", ["anyOf", "minProperties", "patternProperties"])
def test_rules_over_several_arguments_are_named(key, tokenizers):
    prompt = tokenizers("hy3").chat.prompt(USER, tools=tools({"type": "string"}, **{key: 1}))
    with pytest.raises(ValueError, match=f"'{key}' of the arguments of the function f"):
        prompt.call_grammar(None, several=True)
