# SPDX-License-Identifier: Apache-2.0
"""The rules that clients' interfaces have for schemas of strict tools."""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxcp.serve.errors import wrong

SCHEMAS = ("properties", "$defs", "definitions")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")


def check_strict(schema: Mapping[str, Any] | None, place: str, *, all_required: bool) -> None:
    """Check that a schema says of every object which properties it has.

    Args:
      schema: of the arguments of a function; None for one that takes none.
      place: the field of the request that it stands in.
      all_required: OpenAI's rule that every property is required; one that may be missing is
        written as a type with "null".
    Raises:
      Refusal: it does not.
    """
    if not schema:
        return
    if schema.get("type") != "object":
        raise wrong(f'{place}: a strict tool needs "type": "object"', place)
    try:
        parts = list(_parts(schema, place))
    except RecursionError as error:
        raise wrong(f"{place} is nested too deep", place) from error
    for where, part in parts:
        kinds = part.get("type")
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if "properties" not in part and "object" not in kinds:
            continue
        if part.get("additionalProperties") is not False:
            raise wrong(f'{where}: a strict tool needs "additionalProperties": false', where)
        properties, required = part.get("properties") or {}, part.get("required") or ()
        if not isinstance(properties, Mapping) or not isinstance(required, list | tuple):
            raise wrong(f"{where}: needs an object as properties, a list as required", where)
        missing = [name for name in properties if name not in required]
        if all_required and missing:
            raise wrong(
                f"{where}: a strict tool needs every property in required; {', '.join(missing)} is "
                'not there. Let its type be ["string", "null"] or the like where it may be missing',
                where,
            )


def _parts(schema: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield a schema and all within it, each with its place."""
    if not isinstance(schema, Mapping):
        return
    yield place, schema
    for key in SCHEMAS:
        own = schema.get(key)
        for name, part in own.items() if isinstance(own, Mapping) else ():
            yield from _parts(part, f"{place}.{key}.{name}")
    for key in LISTS:
        own = schema.get(key)
        for number, part in enumerate(own if isinstance(own, list) else ()):
            yield from _parts(part, f"{place}.{key}[{number}]")
    yield from _parts(schema.get("items"), f"{place}.items")
