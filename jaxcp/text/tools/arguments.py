# SPDX-License-Identifier: Apache-2.0
"""Grammars of arguments that stand between tags, each by the schema of its property.

They come in the order of the properties, the required ones always, and none that the schema does
not name. A value follows the schema of its property.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxcp.text.tools import values
from jaxcp.text.tools.rules import ANY_TEXT, Rules, ended, is_token
from jaxcp.text.tools.strings import Schema, leaves_of, texts
from jaxcp.text.tools.tagged import Tags

SEPARATORS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""White space in arguments that are JSON, as `json.dumps` and templates write it."""
KEY = '/[^<>"\\n]+/'
NOT_OF_TAGS = (
    "$ref", "allOf", "anyOf", "oneOf", "not", "if", "then", "else", "patternProperties",
    "propertyNames", "minProperties", "maxProperties", "dependentRequired", "dependentSchemas",
    "dependencies", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
"""Keys of a schema of arguments that rule over more than one of them."""


def call_of_tags(rules: Rules, tags: Tags, name: str, schema: Schema | None) -> str:
    """Add the rule of a call behind the tag that begins it; without a schema arguments are any.

    Raises:
      ValueError: the schema says what such arguments cannot be held to.
    """
    arguments = (
        [f"{_any_argument(rules, tags)}*"]
        if schema is None
        else _arguments(rules, tags, name, schema)
    )
    begin = rules.written(f"{name}{tags.name_end}\n")
    arguments = arguments or ['"\\n"?']  # some templates write an empty line
    return rules.add(" ".join([begin, *arguments, rules.written(tags.call_end)]))


def without(rules: Rules, tags: Iterable[str]) -> str:
    """Write the lexeme of any text that has none of these tags in it."""
    spelled = _spelled(rules, tags)
    if not spelled:
        return ANY_TEXT
    tag = "|".join(re.escape(x).replace("/", r"\/") for x in spelled)
    return f"{ANY_TEXT} & ~/(?s:.*)({tag})(?s:.*)/"


def _arguments(rules: Rules, tags: Tags, name: str, schema: Schema) -> list[str]:
    properties, required = schema.get("properties") or {}, schema.get("required") or ()
    names = required if isinstance(required, list | tuple) else [None]
    if not isinstance(properties, Mapping) or not all(isinstance(x, str) for x in names):
        raise ValueError(
            f"the schema of the function {name} needs an object as properties, and a list of names "
            f"as required; got {properties!r:.100} and {required!r:.100}"
        )
    if undescribed := [key for key in required if key not in properties]:
        raise ValueError(
            f"the arguments {', '.join(undescribed)} of the function {name} are required, and its "
            "schema does not say what they are: add them to its properties"
        )
    if beside := [key for key in NOT_OF_TAGS if key in schema]:
        raise ValueError(
            f"{beside[0]!r} of the arguments of the function {name} cannot be followed by this "
            "model, which writes each between tags: name them in properties and required alone"
        )
    arguments = []
    for key in properties:
        try:
            one = _argument(rules, tags, key, schema)
        except (TypeError, ValueError) as error:  # a schema that is none
            raise ValueError(f"the argument {key!r} of the function {name}: {error}") from error
        arguments.append(one if key in required else f"{one}?")
    return arguments


def _any_argument(rules: Rules, tags: Tags) -> str:
    """Add the rule of an argument that no schema describes."""
    key = ended(rules, rules.add_terminal(KEY), tags.key_end)
    text = rules.add_terminal(_without_tags(rules, tags))
    ways = []
    for tag, kind in tags.value.items():
        value = (
            f"{rules.json({})} {rules.written(tags.value_end)}"
            if kind == "json"
            else ended(rules, text, tags.value_end)
        )
        begin = f"{rules.written(tags.key)} {key} {rules.written(_gap(tag) + tag)}"
        ways.append(f'{begin} {value} "\\n"')
    return rules.add(" | ".join(ways))


def _gap(tag: str) -> str:
    return "" if tag[0].isspace() else "\n"  # a tag alone begins a line


def _argument(rules: Rules, tags: Tags, key: str, schema: Schema) -> str:
    """Add the rule of an argument, up to the end of its line."""
    kinds = values.types_of(schema, key)
    ways = []
    for tag, kind in tags.value.items():
        begin = rules.written(f"{tags.key}{key}{tags.key_end}{_gap(tag)}{tag}")
        as_text = kind == "string" or (kind == "schema" and "string" in kinds)
        if (kind == "string" and "string" not in kinds) or (
            kind == "json" and kinds == values.STRING
        ):
            continue
        value = (
            _text(rules, tags, schema, key, values.STRING if kind == "string" else kinds)
            if as_text
            else _json(rules, schema["properties"][key], schema)
        )
        if value is None:
            continue
        end = "" if as_text else f" {rules.written(tags.value_end)}"
        ways.append(f'{begin} {value}{end} "\\n"')
    if not ways:
        own = schema["properties"][key]
        raise ValueError(f"none of the values by {own!r:.200} can be written as text")
    return rules.add(" | ".join(ways))


def _json(rules: Rules, own: Any, schema: Schema) -> str:
    """Add the rule of a value that is JSON, with what the whole schema defines."""
    defined = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    own = own if isinstance(own, Mapping) else {}
    return rules.json({**own, **defined, "x-guidance": SEPARATORS})


def _text(rules: Rules, tags: Tags, schema: Schema, key: str, kinds: frozenset[str]) -> str | None:
    """Add the rule of a value that is plain text, with the tag that ends it, if there is one."""
    leaves = list(leaves_of(schema["properties"][key], schema))
    if kinds == values.STRING:
        leaves = [leaf for leaf in leaves if leaf.get("type") in (None, "string")]
    choices, lexemes, others = texts(leaves, kinds)
    never = _spelled(rules, _tags_of_calls(tags))
    never += [part for part in rules.parts(tags.value_end)[:1] if not is_token(part)]
    choices = [text for text in choices if not any(tag in text for tag in never)]
    end = rules.written(tags.value_end)
    ways = [f"{_json(rules, leaf, schema)} {end}" for leaf in others]
    if lexemes:
        lexemes += [json.dumps(choice) for choice in choices if choice]
        whole = " | ".join(f"({lexeme})" for lexeme in lexemes)
        text = rules.add_terminal(f"({whole}) & {_without_tags(rules, tags)}")
        ways.append(ended(rules, text, tags.value_end))
    elif choices:
        ways.append(f"({' | '.join(map(json.dumps, choices))}) {end}")
    return rules.add(" | ".join(ways)) if ways else None


def _without_tags(rules: Rules, tags: Tags) -> str:
    """Write the lexeme of any text that has no tag in it by which a call would be none."""
    return without(rules, _tags_of_calls(tags))


def _tags_of_calls(tags: Tags) -> list[str]:
    of_calls = [*tags.group, tags.group_end, tags.call, tags.call_end, tags.key]
    return [*of_calls, tags.think, tags.think_end]


def _spelled(rules: Rules, tags: Iterable[str]) -> list[str]:
    """List the tags that are text alone, each once."""
    texts = [tag.strip() for tag in tags if tag and not any(map(is_token, rules.parts(tag)))]
    return [*dict.fromkeys(texts)]
