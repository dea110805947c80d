# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint folder, as one set of tensors. Knows no models."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxcp import mxfp4

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The open safetensors files of a folder, as one set of tensors."""

    files: Mapping[str, Any]  # tensor name -> open file
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]

    def read(self, name: str) -> np.ndarray:
        """The tensor; one in MXFP4 as the bfloat16 that it stands for."""
        if name in self.files:
            return self.files[name].get_tensor(name)
        parts = (f"{name}{suffix}" for suffix in mxfp4.SUFFIXES)
        return mxfp4.unpack(*(self.files[part].get_tensor(part) for part in parts))


@contextlib.contextmanager
def open_checkpoint(path: str | os.PathLike) -> Iterator[Checkpoint]:
    """Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names."""
    files, shapes, dtypes = {}, {}, {}
    with contextlib.ExitStack() as stack:
        for file in _files(Path(path)):
            try:
                handle = stack.enter_context(safe_open(file, framework="numpy"))
            except SafetensorError as error:
                raise ValueError(
                    f"needed a whole safetensors file; got {file} ({file.stat().st_size} bytes), "
                    f"which is truncated or no safetensors: {error}. Copy it again"
                ) from error
            for name in handle.keys():
                header = handle.get_slice(name)
                files[name] = handle
                shapes[name], dtypes[name] = tuple(header.get_shape()), header.get_dtype()
        for name in mxfp4.packed(dtypes):
            blocks, scales = (f"{name}{suffix}" for suffix in mxfp4.SUFFIXES)
            shapes[name], dtypes[name] = mxfp4.shape(shapes[blocks], shapes[scales]), mxfp4.NAME
            for part in (blocks, scales):
                del shapes[part], dtypes[part]
        yield Checkpoint(files, shapes, dtypes)


def _files(folder: Path) -> list[Path]:
    if Path(folder, WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not Path(folder, INDEX).exists():
        raise FileNotFoundError(
            f"needed {WEIGHTS} or {INDEX} beside {folder / CONFIG}; neither is there"
        )
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"needed a weight_map (tensor name -> file) in {folder / INDEX}; it has none"
        )
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not Path(folder, shard).exists()]
    if absent:
        raise FileNotFoundError(
            f"{folder / INDEX} names {len(shards)} files; {len(absent)} are not there: "
            f"{', '.join(absent)}. Copy them too"
        )
    return [folder / shard for shard in shards]


def read_json(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"needed JSON; got {file}: {error}. Copy it again") from error
    if not isinstance(fields, dict):
        raise ValueError(f"needed a JSON object; got {file} with a {type(fields).__name__}")
    return fields
