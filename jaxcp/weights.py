# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: a folder with config.json, *.safetensors and, where there is one, tokenizer.json.

Knows files and placement. Which tensor is which leaf is the family's table, models/*/weights.py.
"""

import jaxcp.flax_version  # noqa: F401  (before flax)

# isort: split
import collections
import dataclasses
import functools
import json
import logging
import math
import os
import shutil
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from jaxcp import models, mxfp4
from jaxcp.checkpoint_files import CONFIG, INDEX, WEIGHTS, Checkpoint, open_checkpoint
from jaxcp.config_file import fitted, load_config, naming
from jaxcp.models.base import LanguageModel
from jaxcp.models.weight_table import Piece, Source, sources, spelling_of
from jaxcp.quantised import quantised_names
from jaxcp.quantised_files import FORMATS
from jaxcp.quantised_load import QuantisedSource, quantised_source, stream_quantised
from jaxcp.sharding import indivisible, sharding_of
from jaxcp.streaming import counted, progress_bar, stream
from jaxcp.tokenizer import Tokenizer

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer.json"
DTYPES = ("F32", "BF16", "F16", mxfp4.NAME, *FORMATS)
INTEGERS = ("I64", "I32")
SHARD_BYTES = 5_000_000_000
LISTED = 50  # of each kind of problem: a wrong checkpoint of 47,000 tensors must stay readable


def load(
    path: str | os.PathLike,
    dtype: jax.typing.DTypeLike | None = None,
    *,
    experts: str = "expert",
    allow_nonfinite: bool = False,
    progress: bool | None = None,
    widen: bool = False,
) -> tuple[LanguageModel, Tokenizer | None]:
    """The model and the tokenizer (None when there is no tokenizer.json) of a checkpoint folder.

    Tensors stream into their shards: the host holds what its devices will, and a bounded piece.
    `progress` shows a bar; None does so for a big checkpoint on a terminal.

    Quantised weights (see `jaxcp.quantised_files`) stay so in memory wherever the layer can use
    them as they are; those of the others, which a log line names, and all with `widen`, get the
    model's dtype. `dtype` is then that of the computation and of what is not quantised.

    Under `jax.set_mesh` every leaf is put on the mesh with the model's own sharding. `dtype` is
    that of the parameters and of the computation; None keeps each tensor's own. The router's
    selection bias stays float32, and so does what a model computes in float32 whatever its dtype.
    `experts`: the mesh axis over which experts lie, see `jaxcp.sharding.place`.

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
    checkpoint = open_checkpoint(path)
    config = fitted(path, config, checkpoint.shapes.keys())
    with naming(Path(path, CONFIG)):
        graph, state = nnx.split(abstract_model(config))
    flat = [(".".join(map(str, keys)), keys, leaf) for keys, leaf in nnx.to_flat_state(state)]
    if problem := indivisible(((name, leaf) for name, _, leaf in flat), experts):
        raise ValueError(f"needed a mesh that divides {problem}")
    shapes = {name: leaf.shape for name, _, leaf in flat}
    found = sources(family.table(config), shapes, checkpoint.shapes)
    ignored = family.weights.left_out(checkpoint.shapes.keys(), config)
    if ignored:
        log.info("%s: left out %d tensors, such as %s", path, len(ignored), min(ignored))
    copies = family.copies(config)
    _check(path, checkpoint, found, ignored, copies)
    dtypes = {n: _final_dtype(leaf, found[n], checkpoint, config, dtype) for n, _, leaf in flat}
    kept = {} if widen else _quantised(flat, found, checkpoint, experts)
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
                value, of_leaf = stream_quantised(kept[name], of_bytes)
            else:
                pieces = counted(found[name].pieces(name, checkpoint.read), final.itemsize, advance)
                value, of_leaf = _stream(name, pieces, leaf, final, experts)
            strange.update({(tensor, final): n for tensor, n in of_leaf.items()})
            read[keys] = leaf.replace(value)
    if not allow_nonfinite:
        _check_finite(path, checkpoint, strange)
    model = nnx.merge(graph, nnx.from_flat_state(list(read.items())))
    again = copies.keys() & checkpoint.shapes.keys() - family.weights.COPIES.keys()
    model.spelling = tuple(sorted({*spelling_of(found), *again}))
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


def _quantised(flat, found, checkpoint: Checkpoint, experts) -> dict[str, QuantisedSource]:
    """Of the leaves that stay quantised, by name."""
    if not checkpoint.packed and not checkpoint.turned:
        return {}
    every = {
        name: quantised_source(leaf, name, found[name], checkpoint, experts)
        for name, _, leaf in flat
    }
    return {name: source for name, source in every.items() if source is not None}


def _log_widened(path, found, checkpoint: Checkpoint, kept) -> None:
    held = {**checkpoint.packed, **checkpoint.turned}
    wide = [n for n, x in found.items() if n not in kept and x.names[0] in held]
    if wide:
        log.warning("%s: widened when read, %d leaves: %s", path, len(wide), ", ".join(wide))


def _final_dtype(leaf: nnx.Variable, source: Source, checkpoint: Checkpoint, config, dtype) -> Any:
    """Of a leaf: its own where it is no parameter, else the one asked for, else the tensors'; the
    model's where those are quantised."""
    if not isinstance(leaf, nnx.Param):
        return jnp.dtype(leaf.dtype)
    if dtype is None and not checkpoint.packed.keys().isdisjoint(source.names):
        dtype = config.dtype
    if dtype is not None:
        return jnp.dtype(jnp.float32 if leaf.get_metadata().get("keep_float32") else dtype)
    return np.result_type(*{checkpoint.dtype(name) for name in source.names})


def _stream(name: str, pieces: Iterable[Piece], leaf: nnx.Variable, dtype: Any, experts: str):
    if jax.sharding.get_abstract_mesh().empty:
        return stream(pieces, leaf.shape, dtype, None)
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), sharding_of(leaf, experts))
    return stream(pieces, leaf.shape, dtype, sharding)


def abstract_model(config: Any) -> LanguageModel:
    """The model of `config` with `jax.ShapeDtypeStruct` leaves: to count or compile, not to run.

    Raises:
      ValueError: the config is of no family that jaxcp knows.

    >>> sum(x.size for x in jax.tree.leaves(jaxcp.abstract_model(jaxcp.load_config(path))))
    """
    model_class = models.family_of(config).model_class

    def build():
        # One key for all: nnx.Rngs counts its draws in a traced variable, and tracing that costs
        # the square of their number (20 s instead of 1 s for Hy3's 80 layers).
        key = jax.random.key(0)
        return model_class(config, rngs=types.SimpleNamespace(params=lambda: key))

    return nnx.eval_shape(build)


def save(
    model: Any,
    out: str | os.PathLike,
    tokenizer: Tokenizer | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config.json, safetensors and tokenizer.json, under the names they were loaded from.

    Weights of more than `shard_bytes` become several files of about as many bytes, and an index;
    the host holds one at a time.

    Atomic: files are renamed to their places when all are complete, so a save that is killed
    leaves what was there. Into a folder that already holds a checkpoint of the same
    configuration, the new weights replace the old ones.

    Raises:
      ValueError: `out` is a file, holds a checkpoint of another configuration, or one in several
        files, or one that would become several.
      NotImplementedError: the model is spread over several processes, or has quantised weights.
    """
    out = Path(os.path.abspath(out))
    keep_config = _check_target(out, model.config)
    leaves = _leaves(model)
    shards = _shards(model, leaves, shard_bytes)
    if len(shards) > 1 and Path(out, WEIGHTS).exists():
        raise ValueError(
            f"needed a folder without {WEIGHTS} for weights in {len(shards)} files; "
            f"{out} has one. Name another"
        )
    # Same filesystem as `out`, and a fixed name: the next save clears what a killed one has left.
    staging = out / ".saving" if out.is_dir() else out.parent / f".{out.name}.saving"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        if not keep_config:
            _write_json(staging / CONFIG, model.config.to_hf())
        if tokenizer is not None:
            tokenizer.save(staging / TOKENIZER)
        _write_weights(staging, shards, leaves)
        for file in staging.iterdir():
            file.chmod(0o644)  # safetensors writes for the owner only
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        if out.exists():
            for file in sorted(staging.iterdir(), key=lambda file: file.name == INDEX):
                os.replace(file, out / file.name)
        else:
            os.rename(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_target(out: Path, config: Any) -> bool:
    """Whether `out` already has this config.json. Raises where saving would destroy something."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"needed a folder to save to; {out} is a file. Name another")
    if Path(out, INDEX).exists():
        raise ValueError(
            f"needed a folder without a sharded checkpoint; {out} has {INDEX}. Name another"
        )
    if not Path(out, CONFIG).exists():
        return False
    there = load_config(out)
    if Path(out, WEIGHTS).exists():
        there = fitted(out, there, open_checkpoint(out).shapes.keys())
    if there.to_hf() != config.to_hf():  # remat and the like are not in the file
        raise ValueError(
            f"needed a folder without a checkpoint of another configuration; {out}/{CONFIG} "
            "differs from the model's config. Name another folder, or remove this one first"
        )
    return True


def _leaves(model: Any) -> dict[str, jax.Array]:
    if fixed := quantised_names(model):
        raise NotImplementedError(
            f"save writes plain weights; {len(fixed)} of this model are quantised, such as "
            f"{fixed[0]}. `jaxcp quantize` makes a quantised checkpoint of one with plain weights"
        )
    flat = nnx.to_flat_state(nnx.state(model))
    leaves = {".".join(map(str, keys)): leaf.get_value() for keys, leaf in flat}
    if not all(leaf.is_fully_addressable for leaf in leaves.values()):
        raise NotImplementedError(
            "save cannot gather a model that is spread over several processes; "
            "bring its leaves to one process first, or use the training checkpoints"
        )
    return leaves


def _shards(model: Any, leaves: Mapping[str, jax.Array], shard_bytes: int) -> list[list[Source]]:
    """The sources of a model, each once, in the order of its leaves, cut into files."""
    family = models.family_of(model.config)
    table = family.table(model.config)
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    found = sources(table, shapes, spelling=getattr(model, "spelling", ()))
    for name, leaf in family.copies(model.config).items():
        if name in model.spelling:
            found[name] = dataclasses.replace(found[leaf], pattern=name, names=(name,))
    shards: list[list[Source]] = [[]]
    held = 0
    for source in {source.names[0]: source for source in found.values()}.values():
        size = sum(leaves[path].nbytes for path, _ in source.leaves)
        if shards[-1] and held + size > shard_bytes:
            shards, held = [*shards, []], 0
        shards[-1].append(source)
        held += size
    return shards


def _write_weights(
    folder: Path, shards: list[list[Source]], leaves: Mapping[str, jax.Array]
) -> None:
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if shards[1:] else WEIGHTS
        tensors: dict[str, np.ndarray] = {}
        for source in shard:
            tensors.update(source.write(lambda path: np.asarray(leaves[path])))
        # save_file writes the memory of an array not in C order as if it were: wrong values.
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    if shards[1:]:
        size = sum(leaf.nbytes for leaf in leaves.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _write_json(file: Path, contents: Mapping[str, Any]) -> None:
    text = json.dumps(contents, indent=2, sort_keys=True)
    file.write_text(text + "\n", encoding="utf-8")


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
        "of a quantised tensor, not whole": [f"{n}: {x}" for n, x in checkpoint.lacking.items()],
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
