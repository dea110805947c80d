# SPDX-License-Identifier: Apache-2.0
"""Values of an enum may be written where the other keywords of its schema allow them, by the
`jsonschema` package, whether arguments stand between tags or are JSON."""

import random
import time

import jsonschema
import pytest
from grammar_walks import USER, tokenizers_in
from test_strings_between_tags import may_be, tools

VALUES = [
    "", "a", "b", "ab", "xaby", "5 x", "2024-02-29", "2023-13-01", "é", "a.b", "A\nb", "127.0.0.1",
    0, 1, 2, 5, -3, 10, 1.5, 2.0, 0.1, 1e3, True, False, None, [1], [1, 2], [], {"a": 1}, {"b": 2},
]  # fmt: skip
KEYWORDS = {
    "pattern": ["a", "^a", "b$", "^[0-9]", "^.$", "^a|b$"],
    "minLength": [0, 1, 2, 3], "maxLength": [1, 2, 4], "format": ["date", "ipv4"],
    "minimum": [0, 1, -3, 1.5], "maximum": [2, 5, 10], "exclusiveMinimum": [0, 1],
    "exclusiveMaximum": [5, 2.0], "multipleOf": [1, 2, 0.5, 0.1], "minItems": [0, 1, 2],
    "maxItems": [0, 1], "required": [["a"]], "const": VALUES,
    "type": ["string", "integer", "number", "boolean", "null", "array", "object",
             ["string", "null"], ["integer", "string"], ["string", "array"]],
}  # fmt: skip
FORMS = ["hy3", "hy3-spelled", "qwen3-coder", "deepseek-v4", "deepseek-v4-spelled", "qwen3"]
Validator = jsonschema.Draft202012Validator


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return tokenizers_in(tmp_path_factory.mktemp("models"))


def random_schema(rng):
    keys = [key for key in KEYWORDS if rng.random() < 0.15]
    own = {key: rng.choice(KEYWORDS[key]) for key in keys}
    return {"enum": rng.sample(VALUES, rng.randint(1, 5)), **own}


@pytest.mark.parametrize("name", FORMS)
def test_those_values_may_be_written_that_validators_take(name, tokenizers):
    rng, refused = random.Random(name), 0
    for _ in range(60):
        schema = random_schema(rng)
        judge = Validator(schema, format_checker=Validator.FORMAT_CHECKER)
        wanted = [judge.is_valid(value) for value in schema["enum"]]
        if not any(wanted):
            prompt = tokenizers(name).chat.prompt(USER, tools=tools(schema))
            with pytest.raises(ValueError, match=r"none of the values by|Unsatisfiable"):
                prompt.call_grammar(None, several=False)
                pytest.fail(f"{schema}")
            refused += 1
            continue
        for value, good in zip(schema["enum"], wanted, strict=True):
            value = int(value) if isinstance(value, float) and value.is_integer() else value
            assert may_be(tokenizers, name, schema, value) == good, (schema, value)
    assert 0 < refused < 60


@pytest.mark.parametrize("name", ["qwen3-coder", "hy3-spelled", "deepseek-v4-spelled"])
def test_a_value_that_has_a_tag_of_calls_in_it_is_not_written(name, tokenizers):
    end = {"qwen3-coder": "\n</parameter>\n</function>", "hy3-spelled": "</arg_value>"}
    schema = {"enum": ["a", "b" + end.get(name, "</｜DSML｜parameter>") + "c"]}
    assert may_be(tokenizers, name, schema, "a")
    assert not may_be(tokenizers, name, schema, schema["enum"][1])
    with pytest.raises(ValueError, match="none of the values by"):
        may_be(tokenizers, name, {"const": schema["enum"][1]}, "a")


def test_a_thousand_values_are_compared_in_less_than_two_seconds(tokenizers):
    prompt = tokenizers("hy3").chat.prompt(
        USER, tools=tools({"enum": [f"n{i}" for i in range(1000)], "pattern": "7$"})
    )
    begin = time.perf_counter()
    grammar = prompt.call_grammar(None, several=False).later
    assert time.perf_counter() - begin < 2
    assert grammar.count('"n') == 100


def test_a_name_of_a_host_that_is_too_long_is_not_written(tokenizers):
    long, short = ".".join(["a" * 60] * 5), ".".join(["a" * 60] * 4)
    schema = {"enum": [long, short], "format": "hostname"}
    assert may_be(tokenizers, "hy3", schema, short)
    assert not may_be(tokenizers, "hy3", schema, long)
