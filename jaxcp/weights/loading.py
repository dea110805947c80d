# SPDX-License-Identifier: Apache-2.0
"""Loads a checkpoint folder: config.json, *.safetensors and, where there is one, tokenizer.json.

Knows files and placement; the tables of models/*/weights.py say which tensor is which leaf.
"""

import collections
import dataclasses
import functools
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxcp import models
from jaxcp.layers.stack import is_stacked, members, of_one_layer
from jaxcp.models.base import LanguageModel
from jaxcp.models.weight_table import Piece, Source, in_layers, sources, spelling_of
from jaxcp.sharding import DEFAULT, Rules, sharding_of
from jaxcp.text.folder import read_tokenizer
from jaxcp.text.generation import read_generation, read_stop_tokens
from jaxcp.text.tokenizer import Tokenizer
from jaxcp.weights import declared
from jaxcp.weights.config_file import fitted, load_config, naming
from jaxcp.weights.files import CONFIG, Checkpoint, open_checkpoint
from jaxcp.weights.formats import FORMATS, GPT_OSS
from jaxcp.weights.integers import Integers
from jaxcp.weights.placement import indivisible
from jaxcp.weights.quantized import (
    QuantizedSource,
    quantized_source,
    stackable,
    stream_quantized,
    summed_axis,
)
from jaxcp.weights.stream import counted, progress_bar, stream

log = logging.getLogger(__name__)

DTYPES = ("F32", "BF16", "F16", GPT_OSS, *FORMATS)
INTEGERS = ("I64", "I32")
LISTED = 50  # a kind of problem: the error about 47,000 wrong tensors must stay readable


def load(
    path: str | os.PathLike,
    dtype: jax.typing.DTypeLike | None = None,
    *,
    rules: Rules = DEFAULT,
    allow_nonfinite: bool = False,
    progress: bool | None = None,
    widen: bool = False,
) -> tuple[LanguageModel, Tokenizer | None]:
    """Load the model and the tokenizer (None without a tokenizer.json) of a checkpoint folder.

    Tensors stream into their shards: the host holds the shards of its devices, and a bounded piece
    of one tensor. Under `jax.set_mesh` every leaf is put on the mesh with the model's own sharding.

    Quantized weights (see `jaxcp.weights.formats`) stay quantized in memory where their layer has
    a product for them. Where it has none, which a log line says, they are widened to the model's
    dtype.

    `model.stop_tokens` are the ids that end an answer (`eos_token_id`). `tokenizer.chat` writes
    conversations in the checkpoint's own form, where it has one.

    Args:
      dtype: of parameters and computation; None keeps each tensor's own. Quantized weights stay as
        they are. The router's selection bias stays float32, and so do the parameters with which a
        model computes in float32 whatever its dtype.
      rules: which axes of a parameter lie over which of the mesh's; `Rules(experts="seq")` spreads
        experts over the devices that hold the sequence.
      allow_nonfinite: take NaN and Inf in tensors.
      progress: show a bar; None shows one for a big checkpoint on a terminal.
      widen: widen all quantized weights.
    Raises:
      FileNotFoundError: config.json, the safetensors or a shard that the index names is not there.
      ValueError: a file cannot be read, the model_type is unknown, or tensors are missing, left
        over, of a wrong shape or of a number format that is not float (all listed at once); NaN
        or Inf in tensors, unless `allow_nonfinite`; or the mesh does not divide a leaf.
      NotImplementedError: config.json asks for something that the family does not do.
    """
    config = load_config(path)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=jnp.dtype(dtype).name)
    family = models.family_of(config)
    stop_tokens, generation = read_stop_tokens(path, config.vocab_size), read_generation(path)
    checkpoint = open_checkpoint(path)
    _check_declared(path, checkpoint)
    config = fitted(path, config, checkpoint.shapes.keys())
    with naming(Path(path, CONFIG)):
        graph, state = nnx.split(models.abstract_model(config))
    leaves = [_Leaf(keys, variable) for keys, variable in nnx.to_flat_state(state)]
    if problem := indivisible(((leaf.name, leaf.variable) for leaf in leaves), rules):
        raise ValueError(f"needed a mesh that divides {problem}")
    shapes = {name: leaf.shape_of_layer for leaf in leaves for name in leaf.layers}
    chosen = sources(family.table(config), shapes, checkpoint.shapes)
    ignored = family.weights.left_out(checkpoint.shapes.keys(), config)
    if ignored:
        log.info("%s: left out %d tensors, such as %s", path, len(ignored), min(ignored))
    copies = family.copies(config)
    _check(path, checkpoint, chosen, ignored, copies)
    _check_turned(leaves, chosen, checkpoint)
    of_leaf = {leaf.name: [chosen[layer] for layer in leaf.layers] for leaf in leaves}
    dtypes = {
        leaf.name: _final_dtype(leaf.variable, of_leaf[leaf.name], checkpoint, config, dtype)
        for leaf in leaves
    }
    kept = {} if widen else _quantized(leaves, chosen, checkpoint, rules)
    _log_widened(path, of_leaf, checkpoint, kept)
    read: dict = {}
    nonfinite: collections.Counter = collections.Counter()
    with progress_bar(_bytes(leaves, dtypes, kept), progress) as advance:
        for leaf in leaves:
            final, stacked = dtypes[leaf.name], is_stacked(leaf.variable)
            if leaf.name in kept:
                of_bytes = functools.partial(counted, advance=advance)
                value, odd = stream_quantized(kept[leaf.name], of_bytes, stacked=stacked)
            else:
                pieces = (chosen[layer].pieces(layer, checkpoint.read) for layer in leaf.layers)
                joined = in_layers(pieces) if stacked else next(pieces)
                joined = counted(joined, final.itemsize, advance)
                value, odd = _stream(leaf.name, joined, leaf.variable, final, rules)
            nonfinite.update({(tensor, final): n for tensor, n in odd.items()})
            read[leaf.keys] = leaf.variable.replace(value)
    if not allow_nonfinite:
        _check_finite(path, checkpoint, nonfinite)
    model = nnx.merge(graph, nnx.from_flat_state(list(read.items())))
    again = copies.keys() & checkpoint.shapes.keys() - family.weights.COPIES.keys()
    model.spelling = tuple(sorted({*spelling_of(chosen), *again}))
    model.stop_tokens, model.generation = stop_tokens, generation
    return model, read_tokenizer(path)


class _Leaf(NamedTuple):
    """A leaf of the model without its array."""

    keys: tuple
    variable: nnx.Variable

    @property
    def name(self) -> str:
        return ".".join(map(str, self.keys))

    @property
    def layers(self) -> list[str]:
        """The name that each layer's part would have by itself; of no stack, its own."""
        return members(self.name)

    @property
    def shape_of_layer(self) -> tuple[int, ...]:
        return of_one_layer(self.variable).shape


def _bytes(leaves: Sequence[_Leaf], dtypes: Mapping[str, Any], kept: Mapping[str, Any]) -> int:
    """Count the bytes that the leaves will take; those that stay quantized, as they are."""
    return sum(
        sum(source.nbytes for source in kept[leaf.name])
        if leaf.name in kept
        else math.prod(leaf.variable.shape) * dtypes[leaf.name].itemsize
        for leaf in leaves
    )


def _check_declared(path, checkpoint: Checkpoint) -> None:
    """Raise where the tensors are not quantized as config.json says."""
    declared.check(path, checkpoint.formats, whole=not checkpoint.lacking)
    integers = (x for x in checkpoint.packed.values() if isinstance(x, Integers))
    declared.check_groups(path, integers)


def _check_finite(path, checkpoint: Checkpoint, nonfinite: Mapping[tuple[str, Any], int]) -> None:
    """Raise ValueError if `nonfinite` counts any NaN or Inf: `{(tensor, dtype): count}`."""
    if not nonfinite:
        return
    lines = [
        f"{name} {checkpoint.shape(name)}: {count} of them, as {final}"
        for (name, final), count in nonfinite.items()
    ]
    raise ValueError(
        f"needed finite weights; {path} has {_listed('tensors with NaN or Inf', lines)}\n"
        "Copy the checkpoint again, choose a dtype with a wider range, "
        "or load it with allow_nonfinite=True"
    )


def _check_turned(
    leaves: Sequence[_Leaf], chosen: Mapping[str, Source], checkpoint: Checkpoint
) -> None:
    """Raise NotImplementedError for integers in int32 where the family's tensors are `[in, out]`:
    they are read as `[out, in]`."""
    for leaf in leaves:
        one = of_one_layer(leaf.variable)
        for layer in leaf.layers:
            tensor = checkpoint.packed.get(chosen[layer].names[0])
            if isinstance(tensor, Integers) and summed_axis(one, layer, chosen[layer]) == -2:
                raise NotImplementedError(
                    f"{tensor.name}: GPTQ, AWQ and compressed-tensors are not read where weights "
                    "are [in, out], as GPT-2's. Load the plain checkpoint, or `jaxcp quantize` it"
                )


def _quantized(
    leaves: Sequence[_Leaf],
    chosen: Mapping[str, Source],
    checkpoint: Checkpoint,
    rules: Rules,
) -> dict[str, list[QuantizedSource]]:
    """The sources of the leaves that stay quantized, by name: one, or one for each layer."""
    if not checkpoint.packed and not checkpoint.turned:
        return {}
    kept = {}
    for leaf in leaves:
        one = of_one_layer(leaf.variable)
        every = (
            quantized_source(one, layer, chosen[layer], checkpoint, rules) for layer in leaf.layers
        )
        if fitting := stackable(every):
            kept[leaf.name] = fitting
    return kept


def _log_widened(path, chosen: Mapping[str, list[Source]], checkpoint: Checkpoint, kept) -> None:
    packed = {**checkpoint.packed, **checkpoint.turned}
    wide = [
        name
        for name, every in chosen.items()
        if name not in kept and any(source.names[0] in packed for source in every)
    ]
    if wide:
        log.warning("%s: widened when read, %d leaves: %s", path, len(wide), ", ".join(wide))


def _final_dtype(
    leaf: nnx.Variable, every: Sequence[Source], checkpoint: Checkpoint, config, dtype
) -> Any:
    """The dtype of a leaf from these sources: its own where it is no parameter, else the one asked
    for, else the tensors'; the model's where those are quantized."""
    if not isinstance(leaf, nnx.Param):
        return jnp.dtype(leaf.dtype)
    names = {name for source in every for name in source.names}
    if dtype is None and not checkpoint.packed.keys().isdisjoint(names):
        dtype = config.dtype
    if dtype is not None:
        return jnp.dtype(jnp.float32 if leaf.get_metadata().get("keep_float32") else dtype)
    return np.result_type(*{checkpoint.dtype(name) for name in names})


def _stream(name: str, pieces: Iterable[Piece], leaf: nnx.Variable, dtype: Any, rules: Rules):
    if jax.sharding.get_abstract_mesh().empty:
        return stream(pieces, leaf.shape, dtype, None)
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), sharding_of(leaf, rules))
    return stream(pieces, leaf.shape, dtype, sharding)


def _check(
    path: str | os.PathLike,
    checkpoint: Checkpoint,
    chosen: Mapping[str, Source],
    left_out: frozenset[str],
    copies: Mapping[str, str],
) -> None:
    """Raise one ValueError that lists everything wrong with the tensors of a checkpoint."""
    expected = {name: source.shape for source in chosen.values() for name in source.names}
    tables = {name for x in chosen.values() if x.row.stored_as for name in x.names}
    present = checkpoint.shapes
    problems = {
        "missing": [f"{name} {shape}" for name, shape in expected.items() if name not in present],
        "left over": [
            f"{name} {shape}"
            for name, shape in present.items()
            if name not in expected and name not in left_out and name not in copies
        ],
        "of a wrong shape": [
            f"{name}: expected {shape}, got {present[name]}"
            for name, shape in expected.items()
            if name in present and present[name] != shape
        ],
        "of a quantized tensor, not whole": [f"{n}: {x}" for n, x in checkpoint.lacking.items()],
        f"not in {', '.join(DTYPES)}": [
            f"{name}: {checkpoint.dtypes[name]}"
            for name in expected
            if name in present
            and name not in tables
            and name not in checkpoint.lacking
            and checkpoint.dtypes[name] not in DTYPES
        ],
        f"not in {', '.join(INTEGERS)}": [
            f"{name}: {checkpoint.dtypes[name]}"
            for name in sorted(tables)
            if name in present and checkpoint.dtypes[name] not in INTEGERS
        ],
    }
    if not any(problems.values()):
        problems["not the tensor that the model ties it to"] = [
            f"{name} (is not {chosen[leaf].names[0]})"
            for name, leaf in copies.items()
            if name in present
            and not np.array_equal(checkpoint.read(name), checkpoint.read(chosen[leaf].names[0]))
        ]
    lines = [f"  {_listed(kind, items)}" for kind, items in problems.items() if items]
    if lines:
        raise ValueError(
            f"the tensors of {path} do not fit its {CONFIG}:\n"
            + "\n".join(lines)
            + f"\nUse the {CONFIG} and the safetensors of one checkpoint"
        )


def _listed(kind: str, items: list[str]) -> str:
    """Format `3 missing:` and the names, `LISTED` of them at most."""
    return "\n    ".join(
        [f"{len(items)} {kind}:", *items[:LISTED], *["..."][: len(items) > LISTED]]
    )
