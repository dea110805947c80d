# SPDX-License-Identifier: Apache-2.0
"""Reads the config.json of a checkpoint folder, and checks its sizes before they are used."""

import contextlib
import dataclasses
import math
import os
import re
import typing
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxcp import models
from jaxcp.weights.files import CONFIG, read_json, what_to_do
from jaxcp.weights.stored_dtype import stored_dtype

MOST_LAYERS = 10_000
"""Bound on the layers that a config.json may ask for; no model has a fiftieth of it."""
COUNTS_LAYERS = re.compile("layer|dense_replace")
LISTED_LAYERS = 256
"""A config of at most so many layers is tried whatever tensors there are: all missing ones are
then listed."""
MOST_TENSORS = 1 << 17
"""Bound on layers times experts, for a checkpoint that has fewer tensors than that."""
SIZES = range(1 << 31)
RANGES = {
    **dict.fromkeys(("num_experts", "experts.count"), range(1, 1 << 16)),
    **dict.fromkeys(("vocab_size", "embed_dim", "num_heads", "num_kv_heads"), SIZES[1:]),
    **dict.fromkeys(("head_dim", "latent.rope_dim"), SIZES[1:]),
    "ngram.width": range(1, 1 << 10),
}
"""Ranges of a configuration's integers; those without a row are `SIZES`."""
MESSAGE = 2_000
OF_A_RUN = "resolved.json"
"""A file that every run of training has in its folder, and no checkpoint."""
HUB_ID = r"\w[\w.-]*(/[\w.-]+)?"
NO_PATH = ". A hub id is no path: fetch it (hf download ORG/NAME --local-dir DIR) and load DIR"
WRONG_VALUES = AttributeError, TypeError, LookupError, ArithmeticError, ValueError, StopIteration


def load_config(path: str | os.PathLike) -> Any:
    """The config object (`DenseConfig`, `HybridMoEConfig`) of a checkpoint folder; no weights read.

    A config.json without dtype means that of the tensors, and without tensors that of the family.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: the folder is that of a run; config.json is no strict JSON object, has a value of
        a wrong type or beyond all sizes, or is of a model that jaxcp does not know.
      NotImplementedError: config.json asks for something that the family does not do.
    """
    file = Path(path, CONFIG)
    if not file.exists():
        raise FileNotFoundError(
            f"needed a checkpoint folder with {CONFIG} and *.safetensors; {file} is not there"
            + what_to_do(Path(path))
            + ("" if Path(path).exists() or not re.fullmatch(HUB_ID, str(path)) else NO_PATH)
        )
    if Path(path, OF_A_RUN).exists():
        raise ValueError(
            f"{path} is the folder of a run: its checkpoint is {Path(path, 'model')}, which is "
            "there when the run has ended"
        )
    fields = read_json(file)
    if not (fields.get("dtype") or fields.get("torch_dtype")):
        fields |= {"dtype": dtype} if (dtype := stored_dtype(path)) else {}
    with naming(file):
        _check_layers(fields)
        config = models.config_from_dict(fields)
        if wrong := list(_misfits(config)):
            raise ValueError(f"needed values of the right kind; got {', '.join(wrong)}")
    return config


def fitted(path: str | os.PathLike, config: Any, names: Collection[str]) -> Any:
    """Return `config` without the optional parts that a checkpoint with these tensors lacks.

    Raises:
      ValueError: it has far more layers, or experts, than there are tensors. A module of that size
        would take all memory before anybody could say what is missing.
    """
    config = models.family_of(config).fit(config, names)
    numbers = (next(filter(str.isdecimal, name.split(".")), None) for name in names)
    layers = len(set(numbers) - {None})
    experts = getattr(config, "num_experts", 0) or getattr(config, "experts", None)
    tensors = config.num_layers * getattr(experts, "count", experts or 1)
    if config.num_layers > max(layers, LISTED_LAYERS) or tensors > max(MOST_TENSORS, len(names)):
        raise ValueError(
            f"the tensors of {path} do not fit its {CONFIG}: they are {len(names):,}, of at most "
            f"{layers:,} layers, and it speaks of {config.num_layers:,} layers with {tensors:,} "
            "tensors or more. Use the two of one checkpoint"
        )
    return config


@contextlib.contextmanager
def naming(file: str | os.PathLike) -> Iterator[None]:
    """Turn an error that values of `file` cause inside the `with` into a ValueError that names it.

    Nobody can check every value before it is used; one of a wrong type fails anywhere.
    """
    try:
        yield
    except NotImplementedError as error:
        raise NotImplementedError(f"{file}: {_said(error)}") from error
    except WRONG_VALUES as error:
        raise ValueError(f"{file}: {_said(error)}") from error


def _said(error: Exception) -> str:
    """Describe what went wrong, however long the file has made it, in bounded length."""
    named = isinstance(error, ValueError | NotImplementedError)
    text = str(error) if named else f"a value does not fit, {type(error).__name__}: {error}"
    return text if len(text) < MESSAGE else f"{text[:MESSAGE]}..."


def _check_layers(fields: Mapping[str, Any]) -> None:
    """Bound the counts of layers before a family reads them: it may make lists of that length."""
    for key, value in fields.items():
        if isinstance(value, int) and value > MOST_LAYERS and COUNTS_LAYERS.search(key):
            raise ValueError(f"needed at most {MOST_LAYERS:,} layers; got {key:.50}={value}")
        if key == "text_config" and isinstance(value, Mapping):
            _check_layers(value)


def _misfits(config: Any, path: str = "") -> Iterator[str]:
    """Describe the fields of a configuration that have another type than declared, or are out of
    range."""
    kinds = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name, value = f"{path}{field.name}", getattr(config, field.name)
        options = typing.get_args(kinds[field.name]) or (kinds[field.name],)
        if dataclasses.is_dataclass(value):
            yield from _misfits(value, f"{name}.")
        elif not any(_is(value, kind, name) for kind in options):
            expected = " or ".join(kind.__name__ for kind in options)
            limits = RANGES.get(name, SIZES) if int in options else None
            within = f" from {limits[0]} to {limits[-1]}" if limits else ""
            yield f"{name}={value!r:.50} (needed {expected}{within})"


def _is(value: Any, kind: Any, name: str) -> bool:
    if kind is int:
        return type(value) is int and value in RANGES.get(name, SIZES)
    if kind is float:
        at_least = 0 if name.endswith("eps") else -math.inf
        return type(value) in (int, float) and at_least <= value < math.inf
    if name == "dtype":
        return value is None if kind is type(None) else _is_float_format(value)
    return isinstance(value, kind)


def _is_float_format(name: Any) -> bool:
    try:
        return isinstance(name, str) and bool(jnp.issubdtype(jnp.dtype(name), jnp.floating))
    except TypeError:
        return False
