# SPDX-License-Identifier: Apache-2.0
"""Grammars of calls that a model is made to make, each in the form that its template taught it.

A grammar is a text in llguidance's Lark. Markers that are tokens of the vocabulary stand in it as
such; what is free text between them can be none of them. Arguments follow the schema of the
function: as JSON wholly; between tags by its properties, which of them are required, and by types,
`enum` and `const` of values, and no argument comes that the schema does not name. A `pattern` and
the like of a string that is written as plain text are not looked at.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxcp.text.tools import harmony, values
from jaxcp.text.tools.reader import SYMBOL, Symbols
from jaxcp.text.tools.tagged import Tags

SEPARATORS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""White space in arguments that are JSON, as `json.dumps` and templates write it."""
ANY_TEXT = "/(?s:.*)/"
Schema = Mapping[str, Any]


class Rules:
    """Rules of a grammar, by names of their own.

    Args:
      ids: the id of a token, by the token.
    """

    def __init__(self, symbols: Symbols, ids: Callable[[str], int | None]):
        self._tokens = {symbol: f"<[{ids(token)}]>" for token, symbol in symbols.tokens.items()}
        self._symbols, self._lines = symbols, list[str]()

    def add(self, body: str, options: str = "") -> str:
        """Add a rule, and give its name."""
        name = f"r{len(self._lines)}"
        self._lines.append(f"{name}{options}: {body}")
        return name

    def add_terminal(self, body: str) -> str:
        """Add what one lexeme is made of, and give its name."""
        name = f"T{len(self._lines)}"
        self._lines.append(f"{name}: {body}")
        return name

    def json(self, schema: Any) -> str:
        """Add a rule for JSON by a schema."""
        if isinstance(schema, bool):
            schema = {} if schema else {"not": {}}
        return self.add(f"%json {json.dumps(schema)}")

    def parts(self, text: str) -> list[str]:
        """Divide text with markers in it: tokens as a grammar names them, and other text as it is.

        Text is told from tokens by `is_token`.
        """
        pieces = SYMBOL.split(self._symbols.spell(text))
        return [self._tokens.get(piece, piece) for piece in pieces if piece]

    def written(self, text: str) -> str:
        """Write text that may have markers in it."""
        return " ".join(x if is_token(x) else json.dumps(x) for x in self.parts(text))

    def grammar(self, start: str) -> str:
        """Write the grammar that begins with `start`."""
        return "\n".join([f"start: {start}", *self._lines])


def is_token(part: str) -> bool:
    """Tell whether a part of a grammar names a token."""
    return part.startswith("<[")


def tagged_calls(
    rules: Rules, tags: Tags, schemas: Mapping[str, Schema], *, several: bool
) -> str | None:
    """Give the rule of a call, or of `several`, of any of these functions.

    Returns:
      The name of the rule; None where the format has no calls.
    """
    if not tags.call:
        return None
    write = _json_call if tags.json else _call_of_tags
    one = rules.add(" | ".join(write(rules, tags, name, schemas[name]) for name in schemas))
    if tags.newlines:  # every call stands by itself, a newline between two
        group = one
        if tags.group:
            begin, end = rules.written(f"{tags.group[0]}\n"), rules.written(f"\n{tags.group_end}")
            group = rules.add(f"{begin} {one} {end}")
        return rules.add(f'{group} ("\\n" {group})*') if several else group
    begin, end = rules.written(f"{tags.group[0]}\n"), rules.written(tags.group_end)
    line = rules.add(f'{one} "\\n"')  # of two lexemes that begin alike the shorter is not seen
    return rules.add(f"{begin} {line}{'+' if several else ''} {end}")


def harmony_calls(rules: Rules, schemas: Mapping[str, Schema]) -> str:
    """Give the rule of a call of one of these functions, behind the name of its author.

    The form has a call a turn, whose recipient stands before its channel or after it.
    """
    calls = []
    for name, schema in schemas.items():
        to, channel = f" to={harmony.FUNCTIONS}{name}", f"{harmony.CHANNEL}commentary"
        before = rules.written(f"{to}{channel} json{harmony.MESSAGE}")
        after = rules.written(f"{channel}{to} {harmony.CONSTRAIN}json{harmony.MESSAGE}")
        head = rules.add(f"{before} | {after}")
        calls.append(f"{head} {rules.json(_of_arguments(schema))}")
    return rules.add(" | ".join(calls))


def _json_call(rules: Rules, tags: Tags, name: str, schema: Schema) -> str:
    begin = rules.written(f'{tags.call}\n{{"name": {values.quoted(name)}, "arguments": ')
    end = rules.written(f"}}\n{tags.call_end}")
    return rules.add(f"{begin} {rules.json(_of_arguments(schema))} {end}")


def _of_arguments(schema: Schema) -> dict[str, Any]:
    """The schema of an object of arguments, closed unless it says otherwise."""
    closed = {"additionalProperties": False} if "properties" in schema else {}
    return {**closed, **schema, "type": "object", "x-guidance": SEPARATORS}


def _call_of_tags(rules: Rules, tags: Tags, name: str, schema: Schema) -> str:
    properties, required = schema.get("properties") or {}, schema.get("required") or ()
    if undescribed := [key for key in required if key not in properties]:
        raise ValueError(
            f"the arguments {', '.join(undescribed)} of the function {name} are required, and its "
            "schema does not say what they are: add them to its properties"
        )
    arguments = []
    for key in properties:
        one = _argument(rules, tags, key, schema)
        arguments.append(one if key in required else f"{one}?")
    begin = rules.written(f"{tags.call}{name}{tags.name_end}\n")
    arguments = arguments or ['"\\n"?']  # some templates write an empty line
    return rules.add(" ".join([begin, *arguments, rules.written(tags.call_end)]))


def _argument(rules: Rules, tags: Tags, key: str, schema: Schema) -> str:
    """Add the rule of an argument, up to the end of its line."""
    kinds = values.types_of(schema, key)
    ways = []
    for tag, kind in tags.value.items():
        gap = "" if tag[0].isspace() else "\n"  # a tag alone begins a line
        begin = rules.written(f"{tags.key}{key}{tags.key_end}{gap}{tag}")
        as_text = kind == "string" or (kind == "schema" and "string" in kinds)
        if (kind == "string" and "string" not in kinds) or (
            kind == "json" and kinds == values.STRING
        ):
            continue
        value = _text(rules, tags, key, schema) if as_text else _json(rules, key, schema)
        end = "" if as_text else f" {rules.written(tags.value_end)}"
        ways.append(f'{begin} {value}{end} "\\n"')
    return rules.add(" | ".join(ways))


def _json(rules: Rules, key: str, schema: Schema) -> str:
    """Add the rule of a value that is JSON, with what the whole schema defines."""
    defined = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    own = schema["properties"][key]
    own = own if isinstance(own, Mapping) else {}
    return rules.json({**own, **defined, "x-guidance": SEPARATORS})


def _text(rules: Rules, tags: Tags, key: str, schema: Schema) -> str:
    """Add the rule of a value that is plain text, with the tag that ends it."""
    kinds, end = values.types_of(schema, key), rules.parts(tags.value_end)
    own = schema["properties"][key]
    own = own if isinstance(own, Mapping) else {}
    choices = own["enum"] if isinstance(own.get("enum"), list) else None
    choices = [own["const"]] if "const" in own else choices
    if choices is not None:
        texts = [x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in choices]
        readable = [
            text for text, x in zip(texts, choices, strict=True)
            if values.strict(values.as_json(text, kinds)) == x or (x is None and "null" in kinds)
        ]  # fmt: skip
        if not readable:
            raise ValueError(
                f"none of the values {choices!r:.200} of {key!r} can be written as text"
            )
        return rules.add(
            f"({' | '.join(map(json.dumps, readable))}) {rules.written(tags.value_end)}"
        )
    text = rules.add_terminal(_without_tags(rules, tags))
    if is_token(end[0]):
        return rules.add(f"{text} {rules.written(tags.value_end)}")
    # what ends it as text is part of its lexeme: a lexeme does not know what follows
    if len(end) == 1:
        return rules.add(text, f"[suffix={json.dumps(end[0])}]")
    with_end = rules.add_terminal(f"{text} {json.dumps(end[0])}")
    return rules.add(" ".join([with_end, *(x if is_token(x) else json.dumps(x) for x in end[1:])]))


def _without_tags(rules: Rules, tags: Tags) -> str:
    """Write the lexeme of any text that has no tag in it by which a call would be none."""
    all_tags = [*tags.group, tags.group_end, tags.call, tags.call_end, tags.key, tags.think]
    all_tags += [tags.think_end]
    spelled = [tag.strip() for tag in all_tags if tag and not any(map(is_token, rules.parts(tag)))]
    if not spelled:
        return ANY_TEXT
    tag = "|".join(re.escape(x).replace("/", r"\/") for x in dict.fromkeys(spelled))
    return f"{ANY_TEXT} & ~/(?s:.*)({tag})(?s:.*)/"
