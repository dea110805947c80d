# SPDX-License-Identifier: Apache-2.0
"""Arguments become JSON by the types of their schema, and stay text where they are of none."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcp.text.tools.values import as_json, types_of

TYPES = [
    ({"type": "string"}, "5", "string"),
    ({"type": "integer"}, "5", "integer"),
    ({"type": "int"}, "5", "integer"),
    ({"type": ["integer", "null"]}, "null", "integer null"),
    ({"type": "string", "nullable": True}, "x", "null string"),
    ({"anyOf": [{"type": "number"}, {"type": "boolean"}]}, "x", "boolean number"),
    ({"oneOf": [{"$ref": "#/$defs/point"}, {"type": "null"}]}, "x", "null object"),
    ({"allOf": [{"type": "array"}]}, "x", "array"),
    ({"enum": ["a", 1, None]}, "x", "integer null string"),
    ({"const": True}, "x", "boolean"),
    ({}, "x", "string"),
    (True, "x", "string"),
    ({"$ref": "#/properties/x"}, "x", "string"),  # to itself
    ({"$ref": "elsewhere.json"}, "x", "string"),
]


@pytest.mark.parametrize(("schema", "text", "types"), TYPES)
def test_types_of_an_argument(schema, text, types):
    whole = {"properties": {"x": schema}, "$defs": {"point": {"type": "object"}}}
    assert types_of(whole, "x") == {*types.split()}
    assert isinstance(json.loads(as_json(text, types_of(whole, "x"))), object)


def test_schemas_that_are_none():
    for schema in ({}, {"properties": None}, {"properties": {"y": {}}}, {"properties": {"x": 5}}):
        assert types_of(schema, "x") == {"string"}


VALUES = [
    ("5", "integer", 5),
    (" 5\n", "integer", 5),
    ("5", "string", "5"),
    ("5", "integer string", 5),
    ("05", "integer", "05"),
    ("5.0", "integer", "5.0"),
    ("5.5e3", "number", 5500.0),
    ("NaN", "number", "NaN"),
    ("True", "boolean", True),
    ("yes", "boolean", "yes"),
    ("null", "null string", None),
    ("null", "string", "null"),
    ("[1, {}]", "array", [1, {}]),
    ("[1, Infinity]", "array", "[1, Infinity]"),
    ("{}", "array", "{}"),
    ('{"a": [true]}', "object", {"a": [True]}),
    ("{'a': 1}", "object", "{'a': 1}"),
    ("[" * 9_000, "array", "[" * 9_000),
    ("5", "any", 5),
    ("x", "any", "x"),
]


@pytest.mark.parametrize(("text", "types", "value"), VALUES, ids=range(len(VALUES)))
def test_values(text, types, value):
    read = json.loads(as_json(text, frozenset(types.split())))
    assert read == value and type(read) is type(value)


NAMES = ["string", "integer", "number", "boolean", "null", "array", "object", "any"]


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.sets(st.sampled_from(NAMES)))
def test_any_text_is_json(text, types):
    read = json.loads(as_json(text, frozenset(types)))
    if types <= {"string"} and types:
        assert read == text
