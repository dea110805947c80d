# SPDX-License-Identifier: Apache-2.0
"""Fields of a run by their paths, as `optimizer.learning_rate=1e-3`: listed, read, replaced.

A value is read as the field's type says; the new config is checked as any other.
"""

import ast
import dataclasses
import difflib
import pathlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxcp.context_parallel import STRATEGIES
from jaxcp.training.config import TrainConfig

WHOLE = ("data", "eval_data")
"""Fields that a glob or a folder may take the place of, whatever source they have."""


class Field(NamedTuple):
    """A field of a config or of one inside it."""

    path: str
    kind: str
    """Its type, as written."""
    value: Any


def fields_of(config: Any, prefix: str = "") -> Iterator[Field]:
    """List the fields of a config, those of configs inside it by their paths."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), f"{prefix}{field.name}"
        if _has_fields(value):
            yield from fields_of(value, f"{path}.")
        else:
            yield Field(path, _written(hints[field.name]), value)


def override(config: TrainConfig, settings: Sequence[str]) -> TrainConfig:
    """Replace fields of a config by `PATH=VALUE` settings, all at once.

    A field that a config works out of others where it is None, as `GPTConfig.mlp_dim`, follows
    them, unless it had another value.

    Raises:
      ValueError: a setting without `=`, a field that is not there (with those of a similar name), a
        value that is not of its type, or a config that cannot be.

    >>> override(config, ["optimizer.learning_rate=1e-3", "steps=500", "strategy=USP(ulysses=2)"])
    """
    tree: dict[str, Any] = {}
    for setting in settings:
        path, sign, text = setting.partition("=")
        if not sign:
            raise ValueError(f"--set takes FIELD=VALUE, as steps=500; got {setting!r}")
        *inner, name = _checked_path(config, path).split(".")
        here, place = config, tree
        for part in inner:
            here, place = getattr(here, part), place.setdefault(part, {})
        place[name] = _read(typing.get_type_hints(type(here))[name], text, path)
    return _replaced(config, tree)


def _replaced(config: Any, tree: Mapping[str, Any]) -> Any:
    changes = {
        name: _replaced(getattr(config, name), value) if isinstance(value, dict) else value
        for name, value in tree.items()
    }
    return dataclasses.replace(config, **dict.fromkeys(_derived(config)) | changes)


def _derived(config: Any) -> list[str]:
    """Fields that are as the config would work them out by itself."""

    def itself(name: str) -> bool:
        try:
            return dataclasses.replace(config, **{name: None}) == config
        except ValueError:  # it cannot be without
            return False

    given = [field.name for field in dataclasses.fields(config) if field.default is None]
    return [name for name in given if getattr(config, name) is not None and itself(name)]


def _checked_path(config: Any, path: str) -> str:
    known = [field.path for field in fields_of(config)]
    if path in known or path in WHOLE:
        return path
    inside = [name for name in known if name.startswith(f"{path}.")]
    if inside:
        raise ValueError(f"{path} is made of fields; set one of {', '.join(inside)}")
    last = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(path, known, n=3, cutoff=0.6)
    near += [last[x] for x in difflib.get_close_matches(path.rpartition(".")[2], last, n=3)]
    hint = f"; near it are {', '.join(dict.fromkeys(near))}" if near else ""
    raise ValueError(f"the run has no field {path!r}{hint}. `jaxcp train RUN --help` lists them")


def _read(hint: Any, text: str, path: str) -> Any:
    members = typing.get_args(hint) if _is_union(hint) else (hint,)
    # "none" is no string where there may be none
    for member in sorted(members, key=lambda member: member is not types.NoneType):
        try:
            return _read_as(member, text)
        except (ValueError, SyntaxError, TypeError):
            continue
    raise ValueError(f"{path} needs {_written(hint)}; got {text!r}")


def _read_as(kind: Any, text: str) -> Any:
    """Read a value of one type; any error says that it is none."""
    origin = typing.get_origin(kind)
    if kind is types.NoneType or (kind is Any and text.lower() == "none"):
        return None if text.lower() == "none" else _no()
    if kind is bool:
        return text == "true" if text in ("true", "false") else _no()
    if kind in (int, float, str):
        return kind(text)
    if kind is pathlib.Path:
        return pathlib.Path(text)
    if origin is typing.Literal:
        values = {str(x): x for x in typing.get_args(kind)}
        return values[text] if text in values else _no()
    if origin is tuple:
        return _read_tuple(typing.get_args(kind), ast.literal_eval(text))
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, ast.literal_eval(text))
    return read_strategy(text) if kind is Any else _no()


def _read_tuple(kinds: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        value = (value,)
    if kinds[-1:] == (Ellipsis,):
        kinds = kinds[:1] * len(value)
    return tuple(_read_as(kind, str(x)) for kind, x in zip(kinds, value, strict=True))


def _read_fields(kind: Any, values: Sequence[Any]) -> Any:
    """Make a config of the values of its first fields, in their order."""
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    pairs = zip(names[: len(values)], values, strict=True)
    return kind(**{name: _read(hints[name], str(value), name) for name, value in pairs})


def read_strategy(text: str) -> Any:
    """Read a strategy as a person writes it: `Ring`, or `USP(ulysses=2)`.

    Raises:
      ValueError: there is no such strategy, or it has no such option.
    """
    known = {strategy.__name__: strategy for strategy in STRATEGIES}
    try:
        node = ast.parse(text, mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        chosen = known[getattr(call.func, "id", "")]
        return chosen(**{str(word.arg): ast.literal_eval(word.value) for word in call.keywords})
    except (KeyError, SyntaxError, TypeError, ValueError) as error:
        names = ", ".join(known)
        raise ValueError(
            f"a strategy is one of {names}, with options as USP(ulysses=2); got {text!r:.100}"
        ) from error


def _no() -> Any:
    raise ValueError


def _has_fields(value: Any) -> bool:
    """Tell whether a value is a config; strategies are written as a whole."""
    return (
        dataclasses.is_dataclass(value)
        and not isinstance(value, STRATEGIES)
        and bool(dataclasses.fields(value))
    )


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _written(hint: Any) -> str:
    if _is_union(hint):
        return " | ".join(map(_written, typing.get_args(hint)))
    if hint is Any:
        return "a strategy, as Ring or USP(ulysses=2), or none"
    if hint is types.NoneType:
        return "none"
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    return str(hint).replace("typing.", "")
