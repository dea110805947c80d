# SPDX-License-Identifier: Apache-2.0
"""Grammars of values that a model writes as plain text, where a string is one of their types.

What is written is read back by `values.as_json`: a text that looks like another of the types is a
value of that type. So a string never looks like one, and every text is a value by the schema.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from jaxcp.text.grammar import checked_grammar, satisfiable
from jaxcp.text.tools import values
from jaxcp.text.tools.patterns import FORMATS, LONGEST, is_of_format, searched
from jaxcp.text.tools.rules import ANY_TEXT

SPACE = r"[\s\x1c-\x1f]*"
LOOKS = {
    "null": f"/{SPACE}(?i:null|none){SPACE}/",
    "boolean": f"/{SPACE}(?i:true|false){SPACE}/",
    "integer": f"/{SPACE}{values.INTEGER.pattern}{SPACE}/",
    "number": f"/{SPACE}{values.NUMBER.pattern}{SPACE}/",
    "array": rf"/{SPACE}\[(?s:.*)/",
    "object": rf"/{SPACE}\{{(?s:.*)/",
}
"""Texts that are read as a value of a type, or may be."""
WRITTEN = {
    "null": '"null"',
    "boolean": '("true" | "false")',
    "integer": f"/{values.INTEGER.pattern}/",
    "number": f"/{values.NUMBER.pattern}/",
}
OF_STRINGS = ("pattern", "format", "minLength", "maxLength")
OF_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
NOT_FOLLOWED = ("not", "if", "then", "else", "$dynamicRef", "$recursiveRef")
SAID_BESIDE = ("title", "description", "default", "examples", "deprecated", "$comment")
"""Keys that say nothing of what a value may be."""
Schema = Mapping[str, Any]


def texts(leaves: list[Schema], kinds: frozenset[str]) -> tuple[list[str], list[str], list[Schema]]:
    """Divide what a value may be, by `leaves_of`: choices, lexemes in Lark, and schemas of JSON.

    All three are empty where no value can be written as text.

    Args:
      kinds: types as which a text may be read.
    Raises:
      ValueError: a schema cannot be followed in a text.
    """
    choices, lexemes, others = list[str](), list[str](), list[Schema]()
    for leaf in leaves:
        kind = leaf.get("type")
        if kind in ("array", "object"):
            others += [leaf] if satisfiable(leaf) else []
        elif "enum" in leaf or "const" in leaf:
            choices += _choices(leaf, kinds)
        elif kind in WRITTEN:
            if limits := [key for key in OF_NUMBERS if key in leaf]:
                raise ValueError(f"{limits[0]} of a number cannot be followed beside a string")
            lexemes.append(WRITTEN[kind])
        else:
            lexemes.append(_string(leaf, kinds))
    return choices, lexemes, others


def leaves_of(schema: Any, root: Schema, depth: int = values.DEPTH) -> Iterator[Schema]:
    """Yield schemas of one type each, by one of which a value must be.

    Raises:
      ValueError: the schema says what cannot be followed.
    """
    own = dict(schema) if isinstance(schema, Mapping) else {}
    if wrong := [key for key in NOT_FOLLOWED if key in own]:
        raise ValueError(f"{wrong[0]!r} cannot be followed")
    if not depth:
        raise ValueError("it is nested too deep, or within itself")
    if (reference := own.pop("$ref", None)) is not None:
        target = values.at(root, str(reference))
        if not isinstance(target, Mapping):
            raise ValueError(f"{reference!r} is nowhere in the schema")
        yield from leaves_of(_both(target, own), root, depth - 1)
    elif "allOf" in own:
        first, *rest = own.pop("allOf")
        own |= {"allOf": rest} if rest else {}
        yield from leaves_of(_both(first, own), root, depth - 1)
    elif key := next((key for key in ("anyOf", "oneOf") if key in own), None):
        choices = own.pop(key)
        parts = [_both(part, own) for part in choices]
        leaves = [leaf for part in parts for leaf in leaves_of(part, root, depth - 1)]
        _check_apart(leaves if key == "oneOf" else [])
        yield from leaves
    else:
        given = own.pop("type", None)
        names = given if isinstance(given, list) else [given]
        names = [*names, "null"] if own.pop("nullable", None) is True and given else names
        for name in dict.fromkeys(names):
            yield own if name is None else {**own, "type": values.ALIASES.get(name, name)}


def _check_apart(leaves: list[Schema]) -> None:
    """Raise ValueError where a value may be by two of these."""
    kinds = [x.get("type") for x in leaves if "enum" not in x and "const" not in x]
    kinds = ["number" if kind == "integer" else kind for kind in kinds]
    if len({*kinds}) < len(kinds):
        raise ValueError("'oneOf' of schemas that have a type in common cannot be followed")


def _both(part: Any, own: Schema) -> dict[str, Any]:
    """Write two schemas as one."""
    part = part if isinstance(part, Mapping) else {}
    for key in part.keys() & own.keys() - {*SAID_BESIDE}:
        if part[key] != own[key]:
            raise ValueError(f"{key!r} is said twice")
    return {**own, **part}


def _choices(leaf: Schema, kinds: frozenset[str]) -> list[str]:
    """List the texts of `enum` or `const` that the schema allows, and that are read back as what
    they are."""
    own, form = leaf.get("type"), leaf.get("format")
    rest = {key: x for key, x in leaf.items() if key != "type"}
    if "pattern" in leaf:
        rest["pattern"] = f"^(?:{searched(leaf['pattern'])})$"
    if form in FORMATS:
        del rest["format"]
    texts = []
    for x in leaf.get("enum", [leaf.get("const")]):
        whole = isinstance(x, float) and x.is_integer()
        text = x if isinstance(x, str) else json.dumps(int(x) if whole else x, ensure_ascii=False)
        kind = "integer" if whole else values.type_of(x)
        fits = own in (None, kind) or (own, kind) == ("number", "integer")
        read = values.strict(values.as_json(text, kinds))
        same = read == x or (x is None and "null" in kinds)
        formed = form not in FORMATS or not isinstance(x, str) or is_of_format(x, form)
        if fits and same and formed and satisfiable({**rest, "enum": [x]}):
            texts.append(text)
    return texts


def _string(leaf: Schema, kinds: frozenset[str]) -> str:
    """Write the lexeme of a string that does not look like another type."""
    own = {key: leaf[key] for key in OF_STRINGS if key in leaf}
    parts = list(_parts(own)) or [ANY_TEXT]
    return " & ".join([*parts, *(f"~{LOOKS[x]}" for x in LOOKS if x in kinds)])


def _parts(own: Schema) -> Iterator[str]:
    """Yield terminals all of which a string is by its schema."""
    pattern = searched(own["pattern"]) if "pattern" in own else None
    if own:
        again = {} if pattern is None else {"pattern": f"^(?:{pattern})$"}
        checked_grammar("json_schema", json.dumps({"type": "string", **own, **again}))
    most = [own[x] for x in ("maxLength",) if x in own]
    most += [LONGEST[x] for x in (own.get("format"),) if x in LONGEST]
    if most or "minLength" in own:
        yield f"/(?s:.{{{own.get('minLength', 0)},{min(most, default='')}}})/"
    if pattern is not None:
        yield f"/{pattern}/"
    if own.get("format") in FORMATS:
        yield f"/{FORMATS[own['format']]}/"
