# SPDX-License-Identifier: Apache-2.0
"""Grammars of calls, each in the form that the model's template taught it: of those that it must
make, and of those that it may make beside text.

A grammar is a text in llguidance's Lark. Markers that are tokens of the vocabulary stand in it as
such; what is free text between them can be none of them. Arguments follow the schema of their
function, and are any where it is None (between tags: `jaxcp.text.tools.arguments`).
"""

from collections.abc import Mapping
from typing import Any

from jaxcp.text.tools import harmony, values
from jaxcp.text.tools.arguments import SEPARATORS, Schema, call_of_tags, without
from jaxcp.text.tools.rules import ANY_TEXT, Rules, ended
from jaxcp.text.tools.tagged import Tags

Schemas = Mapping[str, Schema | None]


def tagged_calls(rules: Rules, tags: Tags, schemas: Schemas, *, several: bool) -> str | None:
    """Give the rule of a call, or of `several`, of any of these functions.

    Returns:
      The name of the rule; None where the format has no calls.
    """
    if not tags.call:
        return None
    begin, one = (
        rules.written(tags.call if tags.json else tags.group[0]),
        _one(rules, tags, schemas),
    )
    group = _group(rules, tags, begin, one, several=several)
    # every call stands by itself, a newline between two
    return rules.add(f'{group} ("\\n" {group})*') if tags.newlines and several else group


def text_or_tagged_calls(
    rules: Rules, tags: Tags, schemas: Schemas, *, several: bool
) -> str | None:
    """Give the rule of any text, and of calls of these functions in it.

    Returns:
      The name of the rule; None where the format has no calls.
    """
    if not tags.call:
        return None
    text = rules.add_terminal(without(rules, [*tags.group, tags.call]))
    one, bare = _one(rules, tags, schemas), ended(rules, text, tags.call)
    calls = f"{bare} {one}"  # without a tag around them, which models forget
    if not tags.json:
        begin = ended(rules, text, tags.group[-1])
        calls += f" | {_group(rules, tags, begin, one, several=several)}"
    return rules.add(f"({calls})* {text}" if several else f"{calls} | {text}")


def harmony_calls(rules: Rules, schemas: Schemas) -> str:
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


def harmony_messages(rules: Rules, schemas: Schemas) -> str:
    """Give the rule of messages, the last of which may be a call of one of these functions.

    It begins behind the name of the author of the first.
    """
    text, end = rules.add_terminal(ANY_TEXT), rules.written(f"{harmony.END}{harmony.AUTHOR}")
    thought, *said = (
        f"{rules.written(f'{harmony.CHANNEL}{channel}{harmony.MESSAGE}')} {text}"
        for channel in ("analysis", "commentary", "final")
    )
    before = rules.add(f"({' | '.join([thought, *said])}) {end}")
    return rules.add(f"{before}* ({' | '.join([*said, harmony_calls(rules, schemas)])})")


def _one(rules: Rules, tags: Tags, schemas: Schemas) -> str:
    """Add the rule of a call of any of these functions, behind the tag that begins it."""
    write = _json_call if tags.json else call_of_tags
    return rules.add(" | ".join(write(rules, tags, name, schemas[name]) for name in schemas))


def _group(rules: Rules, tags: Tags, begin: str, one: str, *, several: bool) -> str:
    """Add the rule of calls, or of one, from `begin` on, which opens them."""
    if tags.json:
        return rules.add(f"{begin} {one}")
    one = f"{rules.written(tags.call)} {one}"
    if tags.newlines:
        end = rules.written(f"\n{tags.group_end}")
        return rules.add(f'{begin} "\\n" {one} {end}')
    line = rules.add(f'{one} "\\n"')  # of two lexemes that begin alike the shorter is not seen
    return rules.add(
        f'{begin} "\\n" {line}{"+" if several else ""} {rules.written(tags.group_end)}'
    )


def _json_call(rules: Rules, tags: Tags, name: str, schema: Schema | None) -> str:
    begin = rules.written(f'\n{{"name": {values.quoted(name)}, "arguments": ')
    end = rules.written(f"}}\n{tags.call_end}")
    return rules.add(f"{begin} {rules.json(_of_arguments(schema))} {end}")


def _of_arguments(schema: Schema | None) -> dict[str, Any]:
    """The schema of an object of arguments, closed unless it says otherwise."""
    if schema is None:
        return {"type": "object"}
    closed = {"additionalProperties": False} if "properties" in schema else {}
    return {**closed, **schema, "type": "object", "x-guidance": SEPARATORS}
