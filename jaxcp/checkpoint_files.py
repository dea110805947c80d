# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint folder, as one set of tensors. Knows no models."""

import dataclasses
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxcp import mxfp4, quantised_files
from jaxcp.quantised_files import Packed

log = logging.getLogger(__name__)

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
FORMATS = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
    "BOOL": np.bool_, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}  # fmt: skip
"""What safetensors calls a format; its own numpy reader has none of 8 bits."""


class CheckpointFileError(ValueError):
    """A file of a checkpoint cannot be read; the message names it."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies: `start` bytes from the beginning of `file`."""

    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]

    def view(self) -> np.ndarray:
        """The file's own pages; nothing is read before it is used."""
        if 0 in self.shape:
            return np.empty(self.shape, FORMATS[self.dtype])
        try:
            return np.memmap(self.file, FORMATS[self.dtype], "r", self.start, self.shape)
        except (ValueError, OSError) as error:  # it was whole when its header was read
            raise CheckpointFileError(
                f"needed {self.file} as it was when it was opened: {error}. Copy it again"
            ) from error


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of a folder, as one set of tensors."""

    stored: Mapping[str, Stored]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    packed: Mapping[str, Packed]
    """Those that are quantised; `shapes` has the shape of the weights, `dtypes` their format."""
    lacking: Mapping[str, str]
    """What is missing of quantised tensors that are not whole."""
    turned: Mapping[str, Packed]
    """Of gpt-oss's in MXFP4, which lie as `[..., out, in]` where `shapes` has `[..., in, out]`."""
    _unpacked: dict[str, np.ndarray] = dataclasses.field(default_factory=dict, repr=False)

    def raw(self, name: str) -> np.ndarray:
        """What the file has under this name, as a view of it."""
        return self.stored[name].view()

    def read(self, name: str) -> np.ndarray:
        """The tensor, as a view of its file; one in MXFP4 as the bfloat16 that it stands for,
        and one quantised in another way as float32."""
        if name in self.packed:
            return self.packed[name].unpacked(self.raw)
        if name in self.stored:
            return self.stored[name].view()
        if name not in self._unpacked:  # leaves that share a tensor are read one after the other
            self._unpacked.clear()  # first: the host holds one
            parts = (self.stored[f"{name}{suffix}"].view() for suffix in mxfp4.SUFFIXES)
            self._unpacked[name] = mxfp4.unpack(*parts)
        return self._unpacked[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, or of a part of a quantised one."""
        return self.shapes[name] if name in self.shapes else self.stored[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Of what `read` gives."""
        if name in self.packed:
            return np.dtype(np.float32)
        is_packed = self.dtypes[name] == mxfp4.NAME
        return np.dtype(ml_dtypes.bfloat16 if is_packed else FORMATS[self.dtypes[name]])


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """What is in `model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Reads headers; tensors are read when they are used.

    Raises:
      FileNotFoundError: a file is not there.
      ValueError: a file is truncated or no safetensors; the message names it.
    """
    stored = {name: at for file in _files(Path(path)) for name, at in _tensors(file)}
    shapes = {name: at.shape for name, at in stored.items()}
    dtypes = {name: at.dtype for name, at in stored.items()}
    turned = {}
    for name in mxfp4.packed(dtypes):
        blocks, scales = (f"{name}{suffix}" for suffix in mxfp4.SUFFIXES)
        shapes[name], dtypes[name] = mxfp4.shape(shapes[blocks], shapes[scales]), mxfp4.NAME
        experts, size, out = shapes[name]
        turned[name] = Packed("mxfp4", blocks, (experts, out, size), (1, 32), scales)
        for part in (blocks, scales):
            del shapes[part], dtypes[part]
    packed, lacking = quantised_files.find(shapes, dtypes)
    for name, tensor in packed.items():
        shapes[name], dtypes[name] = tensor.shape, tensor.format
        for part in tensor.parts[1:]:
            del shapes[part], dtypes[part]
    unused = [name for name, shape in shapes.items() if quantised_files.is_unused(name, shape)]
    for name in unused:
        del shapes[name], dtypes[name]
    if unused:
        log.info(
            "%s: activations and caches are not quantised; %d static scales are not used, such as "
            "%s", path, len(unused), unused[0],
        )  # fmt: skip
    return Checkpoint(stored, shapes, dtypes, packed, lacking, turned)


def _tensors(file: Path) -> Iterator[tuple[str, Stored]]:
    """From the header: its length in 8 bytes, then JSON; offsets count from its end."""
    size = file.stat().st_size
    try:
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        for name, fields in header.items():
            begin, end = fields["data_offsets"]
            at = Stored(file, 8 + length + begin, fields["dtype"], tuple(fields["shape"]))
            if begin < 0 or end < begin or min(at.shape, default=0) < 0:
                raise ValueError(f"{name} {at.shape} lies at bytes {begin} to {end}")
            _check_extent(name, at, end - begin, size)
            yield name, at
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointFileError(
            f"needed a whole safetensors file; got {file} ({size} bytes), which is truncated or "
            f"no safetensors: {error}. Copy it again"
        ) from error


def _check_extent(name: str, at: Stored, nbytes: int, size: int) -> None:
    if at.start + nbytes > size:
        raise ValueError(f"{name} ends at byte {at.start + nbytes}")
    known = FORMATS.get(at.dtype)
    if known is not None and math.prod(at.shape) * np.dtype(known).itemsize != nbytes:
        raise ValueError(f"{name} {at.dtype} {at.shape} has {nbytes} bytes")


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
