# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint folder: config.json, *.safetensors and tokenizer.json, all or nothing."""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from jaxcp import models
from jaxcp.layers.quantized import quantized_names
from jaxcp.layers.stack import is_stacked, members
from jaxcp.models.weight_table import Source, sources
from jaxcp.text.generation import GENERATION, generation_config
from jaxcp.text.tokenizer import Tokenizer
from jaxcp.weights.config_file import fitted, load_config
from jaxcp.weights.files import CONFIG, INDEX, TOKENIZER, WEIGHTS, open_checkpoint

SHARD_BYTES = 5_000_000_000


def save(
    model: Any,
    out: str | os.PathLike,
    tokenizer: Tokenizer | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json, safetensors and tokenizer.json, tensors under the names that were loaded.

    Writes generation_config.json too: what the checkpoint that was loaded has there (`temperature`,
    `top_p` and all else), and the tokens that end an answer where config.json names others. Fields
    that `out` alone has in that file stay.

    Weights of more than `shard_bytes` become several files of about as many bytes, and an index;
    the host holds one at a time.

    Atomic: files are renamed to their places when all are complete, so a save that is killed
    leaves what was there. Into a folder that already holds a checkpoint of the same
    configuration, the new weights replace the old ones.

    Raises:
      ValueError: `out` is a file, holds a checkpoint of another configuration, or one in several
        files, or one that would become several.
      NotImplementedError: the model is spread over several processes, or has quantized weights.
    """
    out = Path(os.path.abspath(out))
    keep_config = _check_target(out, model.config)
    generation = generation_config(
        out, getattr(model, "stop_tokens", ()), model.config.vocab_size,
        getattr(model, "generation", ""),
    )  # fmt: skip
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
            _write_json(staging / CONFIG, models.config_to_dict(model.config))
        if generation is not None:
            _write_json(staging / GENERATION, generation)
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
    """Tell whether `out` has this config.json; raise where saving would destroy something."""
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
    there, saved = models.config_to_dict(there), models.config_to_dict(config)
    if there != saved:  # remat and the like are not in the file
        raise ValueError(
            f"needed a folder without a checkpoint of another configuration; {out}/{CONFIG} "
            "differs from the model's config. Name another folder, or remove this one first"
        )
    return True


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """An array of a model; `row` of a stack, whose other rows stay on the device."""

    array: jax.Array
    row: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape if self.row is None else self.array.shape[1:]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.array.dtype.itemsize

    def read(self) -> np.ndarray:
        return np.asarray(self.array if self.row is None else self.array[self.row])


def _leaves(model: Any) -> dict[str, _Leaf]:
    if fixed := quantized_names(model):
        raise NotImplementedError(
            f"save writes plain weights; {len(fixed)} of this model are quantized, such as "
            f"{fixed[0]}. `jaxcp quantize` makes a quantized checkpoint of one with plain weights"
        )
    leaves = {}
    for keys, variable in nnx.to_flat_state(nnx.state(model)):
        stacked = is_stacked(variable)
        for row, name in enumerate(members(".".join(map(str, keys)))):
            leaves[name] = _Leaf(variable.get_value(), row if stacked else None)
    if not all(leaf.array.is_fully_addressable for leaf in leaves.values()):
        raise NotImplementedError(
            "save cannot gather a model that is spread over several processes; "
            "bring its leaves to one process first, or use the training checkpoints"
        )
    return leaves


def _shards(model: Any, leaves: Mapping[str, _Leaf], shard_bytes: int) -> list[list[Source]]:
    """The sources of a model, each once, in the order of its leaves, cut into files."""
    family = models.family_of(model.config)
    table = family.table(model.config)
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    chosen = sources(table, shapes, spelling=getattr(model, "spelling", ()))
    for name, leaf in family.copies(model.config).items():
        if name in model.spelling:
            chosen[name] = dataclasses.replace(chosen[leaf], pattern=name, names=(name,))
    shards: list[list[Source]] = [[]]
    nbytes = 0
    for source in {source.names[0]: source for source in chosen.values()}.values():
        size = sum(leaves[path].nbytes for path, _ in source.leaves)
        if shards[-1] and nbytes + size > shard_bytes:
            shards, nbytes = [*shards, []], 0
        shards[-1].append(source)
        nbytes += size
    return shards


def _write_weights(folder: Path, shards: list[list[Source]], leaves: Mapping[str, _Leaf]) -> None:
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if shards[1:] else WEIGHTS
        tensors: dict[str, np.ndarray] = {}
        for source in shard:
            tensors.update(source.write(lambda path: leaves[path].read()))
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
