# SPDX-License-Identifier: Apache-2.0
"""Loads a checkpoint folder: config.json, *.safetensors and, where there is one, tokenizer.json.

Knows files and placement. Which tensor is which leaf is the family's table, models/*/weights.py.
"""

import collections
import dataclasses
import functools
import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxcp import models
from jaxcp.models.base import LanguageModel
from jaxcp.models.weight_table import Piece, Source, sources, spelling_of
from jaxcp.sharding import DEFAULT, Rules, sharding_of
from jaxcp.text.tokenizer import Tokenizer
from jaxcp.weights import mxfp4
from jaxcp.weights.config_file import fitted, load_config, naming
from jaxcp.weights.files import CONFIG, TOKENIZER, Checkpoint, open_checkpoint
from jaxcp.weights.formats import FORMATS
from jaxcp.weights.placement import indivisible
from jaxcp.weights.quantized import QuantizedSource, quantized_source, stream_quantized
from jaxcp.weights.stop_tokens import read_stop_tokens
from jaxcp.weights.stream import counted, progress_bar, stream

log = logging.getLogger(__name__)

DTYPES = ("F32", "BF16", "F16", mxfp4.NAME, *FORMATS)
INTEGERS = ("I64", "I32")
LISTED = 50  # of each kind of problem: a wrong checkpoint of 47,000 tensors must stay readable


def load(
    path: str | os.PathLike,
    dtype: jax.typing.DTypeLike | None = None,
    *,
    rules: Rules = DEFAULT,
    allow_nonfinite: bool = False,
    progress: bool | None = None,
    widen: bool = False,
) -> tuple[LanguageModel, Tokenizer | None]:
    """The model and the tokenizer (None when there is no tokenizer.json) of a checkpoint folder.

    Tensors stream into their shards: the host holds what its devices will, and a bounded piece.
    `progress` shows a bar; None does so for a big checkpoint on a terminal.

    Quantized weights (see `jaxcp.weights.formats`) stay so in memory wherever the layer can use
    them as they are; those of the others, which a log line names, and all with `widen`, get the
    model's dtype. `dtype` is then that of the computation and of what is not quantized.

    Under `jax.set_mesh` every leaf is put on the mesh with the model's own sharding. `dtype` is
    that of the parameters and of the computation; None keeps each tensor's own. The router's
    selection bias stays float32, and so does what a model computes in float32 whatever its dtype.
    `rules`: which axes of a parameter lie over which of the mesh's; `Rules(experts="seq")` spreads
    experts over the devices that hold the sequence.

    `model.stop_tokens` are the ids that end an answer (`eos_token_id`).

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
    stop_tokens = read_stop_tokens(path, config.vocab_size)
    checkpoint = open_checkpoint(path)
    config = fitted(path, config, checkpoint.shapes.keys())
    with naming(Path(path, CONFIG)):
        graph, state = nnx.split(models.abstract_model(config))
    flat = [(".".join(map(str, keys)), keys, leaf) for keys, leaf in nnx.to_flat_state(state)]
    if problem := indivisible(((name, leaf) for name, _, leaf in flat), rules):
        raise ValueError(f"needed a mesh that divides {problem}")
    shapes = {name: leaf.shape for name, _, leaf in flat}
    found = sources(family.table(config), shapes, checkpoint.shapes)
    ignored = family.weights.left_out(checkpoint.shapes.keys(), config)
    if ignored:
        log.info("%s: left out %d tensors, such as %s", path, len(ignored), min(ignored))
    copies = family.copies(config)
    _check(path, checkpoint, found, ignored, copies)
    dtypes = {n: _final_dtype(leaf, found[n], checkpoint, config, dtype) for n, _, leaf in flat}
    kept = {} if widen else _quantized(flat, found, checkpoint, rules)
    _log_widened(path, found, checkpoint, kept)
    sizes = {n: math.prod(shapes[n]) * dtypes[n].itemsize for n in shapes}
    total = sum((sizes | {n: leaf.nbytes for n, leaf in kept.items()}).values())
    read: dict = {}
    strange: collections.Counter = collections.Counter()
    with progress_bar(total, progress) as advance:
        for name, keys, leaf in flat:
            final = dtypes[name]
            if name in kept:
                of_bytes = functools.partial(counted, advance=advance)
                value, of_leaf = stream_quantized(kept[name], of_bytes)
            else:
                pieces = counted(found[name].pieces(name, checkpoint.read), final.itemsize, advance)
                value, of_leaf = _stream(name, pieces, leaf, final, rules)
            strange.update({(tensor, final): n for tensor, n in of_leaf.items()})
            read[keys] = leaf.replace(value)
    if not allow_nonfinite:
        _check_finite(path, checkpoint, strange)
    model = nnx.merge(graph, nnx.from_flat_state(list(read.items())))
    again = copies.keys() & checkpoint.shapes.keys() - family.weights.COPIES.keys()
    model.spelling = tuple(sorted({*spelling_of(found), *again}))
    model.stop_tokens = stop_tokens
    tokenizer = Path(path, TOKENIZER)
    return model, Tokenizer.from_file(tokenizer) if tokenizer.exists() else None


def _check_finite(path, checkpoint: Checkpoint, strange: Mapping[tuple[str, Any], int]) -> None:
    """Raise ValueError for `strange`: how many numbers of a tensor, as a dtype, are NaN or Inf."""
    if not strange:
        return
    lines = [
        f"{name} {checkpoint.shape(name)}: {count} of them, as {final}"
        for (name, final), count in strange.items()
    ]
    raise ValueError(
        f"needed finite weights; {path} has {_listed('tensors with NaN or Inf', lines)}\n"
        "Copy the checkpoint again, choose a dtype with a wider range, "
        "or load it with allow_nonfinite=True"
    )


def _quantized(flat, found, checkpoint: Checkpoint, rules: Rules) -> dict[str, QuantizedSource]:
    """Of the leaves that stay quantized, by name."""
    if not checkpoint.packed and not checkpoint.turned:
        return {}
    every = {
        name: quantized_source(leaf, name, found[name], checkpoint, rules) for name, _, leaf in flat
    }
    return {name: source for name, source in every.items() if source is not None}


def _log_widened(path, found, checkpoint: Checkpoint, kept) -> None:
    held = {**checkpoint.packed, **checkpoint.turned}
    wide = [n for n, x in found.items() if n not in kept and x.names[0] in held]
    if wide:
        log.warning("%s: widened when read, %d leaves: %s", path, len(wide), ", ".join(wide))


def _final_dtype(leaf: nnx.Variable, source: Source, checkpoint: Checkpoint, config, dtype) -> Any:
    """Of a leaf: its own where it is no parameter, else the one asked for, else the tensors'; the
    model's where those are quantized."""
    if not isinstance(leaf, nnx.Param):
        return jnp.dtype(leaf.dtype)
    if dtype is None and not checkpoint.packed.keys().isdisjoint(source.names):
        dtype = config.dtype
    if dtype is not None:
        return jnp.dtype(jnp.float32 if leaf.get_metadata().get("keep_float32") else dtype)
    return np.result_type(*{checkpoint.dtype(name) for name in source.names})


def _stream(name: str, pieces: Iterable[Piece], leaf: nnx.Variable, dtype: Any, rules: Rules):
    if jax.sharding.get_abstract_mesh().empty:
        return stream(pieces, leaf.shape, dtype, None)
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), sharding_of(leaf, rules))
    return stream(pieces, leaf.shape, dtype, sharding)


def _check(
    path: str | os.PathLike,
    checkpoint: Checkpoint,
    found: Mapping[str, Source],
    ignored: frozenset[str],
    copies: Mapping[str, str],
) -> None:
    """Raises one ValueError that lists everything wrong with the tensors of a checkpoint."""
    wanted = {name: source.shape for source in found.values() for name in source.names}
    tables = {name for x in found.values() if x.row.stored_as for name in x.names}
    have = checkpoint.shapes
    problems = {
        "missing": [f"{name} {shape}" for name, shape in wanted.items() if name not in have],
        "left over": [
            f"{name} {shape}"
            for name, shape in have.items()
            if name not in wanted and name not in ignored and name not in copies
        ],
        "of a wrong shape": [
            f"{name}: expected {shape}, got {have[name]}"
            for name, shape in wanted.items()
            if name in have and have[name] != shape
        ],
        "of a quantized tensor, not whole": [f"{n}: {x}" for n, x in checkpoint.lacking.items()],
        f"not in {', '.join(DTYPES)}": [
            f"{name}: {checkpoint.dtypes[name]}"
            for name in wanted
            if name in have
            and name not in tables
            and name not in checkpoint.lacking
            and checkpoint.dtypes[name] not in DTYPES
        ],
        f"not in {', '.join(INTEGERS)}": [
            f"{name}: {checkpoint.dtypes[name]}"
            for name in sorted(tables)
            if name in have and checkpoint.dtypes[name] not in INTEGERS
        ],
    }
    if not any(problems.values()):
        problems["not the tensor that the model ties it to"] = [
            f"{name} (is not {found[leaf].names[0]})"
            for name, leaf in copies.items()
            if name in have
            and not np.array_equal(checkpoint.read(name), checkpoint.read(found[leaf].names[0]))
        ]
    lines = [f"  {_listed(kind, items)}" for kind, items in problems.items() if items]
    if lines:
        raise ValueError(
            f"the tensors of {path} do not fit its {CONFIG}:\n"
            + "\n".join(lines)
            + f"\nUse the {CONFIG} and the safetensors of one checkpoint"
        )


def _listed(kind: str, items: list[str]) -> str:
    """`3 missing:` and the names, or as many as can be read."""
    return "\n    ".join(
        [f"{len(items)} {kind}:", *items[:LISTED], *["..."][: len(items) > LISTED]]
    )
