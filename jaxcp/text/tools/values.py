# SPDX-License-Identifier: Apache-2.0
"""Makes JSON of the values that a model writes as text, by the schema of the argument."""

import json
import re
from collections.abc import Mapping
from typing import Any

ALIASES = {
    "str": "string", "text": "string", "varchar": "string", "int": "integer", "long": "integer",
    "float": "number", "double": "number", "num": "number", "bool": "boolean", "dict": "object",
    "map": "object", "list": "array", "tuple": "array",
}  # fmt: skip
INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
STRING = frozenset({"string"})
DEPTH = 16


def types_of(schema: Mapping[str, Any], name: str) -> frozenset[str]:
    """Give the types that an argument may have; that of one without a type is string."""
    properties = schema.get("properties")
    argument = properties.get(name) if isinstance(properties, Mapping) else None
    return frozenset(_types(argument, schema, DEPTH)) or STRING


def _types(schema: Any, root: Mapping[str, Any], depth: int) -> set[str]:
    if not isinstance(schema, Mapping) or not depth:
        return set()
    given = schema.get("type", [])
    names = given if isinstance(given, list) else [given]
    types = {ALIASES.get(x, x) for x in names if isinstance(x, str)}
    if schema.get("nullable") is True:
        types |= {"null"} if types else set()
    for key in ("anyOf", "oneOf", "allOf"):
        choices = schema.get(key)
        for choice in choices if isinstance(choices, list) else ():
            types |= _types(choice, root, depth - 1)
    if isinstance(reference := schema.get("$ref"), str):
        types |= _types(at(root, reference), root, depth - 1)
    if not types:
        values = schema.get("enum", [schema["const"]] if "const" in schema else [])
        types |= {type_of(x) for x in values} if isinstance(values, list) else set()
    return types


def at(root: Any, reference: str) -> Any:
    """Give what a `$ref` names within a schema; None where that is nothing."""
    here, *path = reference.split("/")
    for key in path:
        key = key.replace("~1", "/").replace("~0", "~")
        root = root.get(key) if isinstance(root, Mapping) else None
    return root if here == "#" else None


def type_of(value: Any) -> str:
    """Name the type of a value of JSON."""
    if isinstance(value, bool):
        return "boolean"
    names = {str: "string", int: "integer", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "null")


def as_json(text: str, types: frozenset[str]) -> str:
    """Write a value as JSON: as what it looks like of the types, else as a string."""
    bare = text.strip()
    if types == STRING:
        return quoted(text)
    if "null" in types and bare.lower() in ("null", "none"):
        return "null"
    if "boolean" in types and bare.lower() in ("true", "false"):
        return bare.lower()
    if "integer" in types and INTEGER.fullmatch(bare):
        return bare
    if "number" in types and NUMBER.fullmatch(bare):
        return bare
    for name, kind in (("array", list), ("object", dict)):
        if name in types and isinstance(strict(bare), kind):
            return bare
    if not types & {"string", "null", "boolean", "integer", "number", "array", "object"}:
        return bare if strict(bare) is not None else quoted(text)
    return quoted(text)


def quoted(text: str) -> str:
    """Write a string of JSON."""
    return json.dumps(text, ensure_ascii=False)


def strict(text: str) -> Any:
    """Read JSON; None where it is none, or has NaN or an infinity."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(name: str) -> Any:
    raise ValueError(name)
