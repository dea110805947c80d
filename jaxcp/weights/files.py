# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint folder, as one set of tensors. Knows no models."""

import collections
import dataclasses
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import ml_dtypes
import numpy as np

from jaxcp.input_files import LARGE_JSON_BYTES, open_regular, read_json, strict_json
from jaxcp.weights import formats, integers
from jaxcp.weights.declared import declared, gptq_offset
from jaxcp.weights.formats import Packed

log = logging.getLogger(__name__)

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TOKENIZER = "tokenizer.json"
INDEX = f"{WEIGHTS}.index.json"
FORMATS = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
    "BOOL": np.bool_, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}  # fmt: skip
"""NumPy dtypes by their names in safetensors, whose own NumPy reader has none of 8 bits."""
PICKLED = ".bin", ".pt", ".pth", ".ckpt"
NAME_LENGTH = 500
"""Longest name of a tensor or file that is taken: names are printed where something is wrong."""
AXES = 8
LISTED = 50


class CheckpointFileError(ValueError):
    """A file of a checkpoint cannot be read; the message names it."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor's place: `start` bytes from the beginning of `file`."""

    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def view(self) -> np.ndarray:
        """Map the tensor's part of the file; nothing is read before it is used."""
        if self.dtype not in FORMATS:
            raise CheckpointFileError(
                f"needed tensors in {', '.join(FORMATS)}; {self.file} has one in {self.dtype:.20}"
            )
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
    """The quantized tensors; `shapes` has the shape of their weights, `dtypes` their format."""
    lacking: Mapping[str, str]
    """Quantized tensors that are not whole, and what each lacks."""
    turned: Mapping[str, Packed]
    """MXFP4 tensors as gpt-oss has them: `[..., out, in]` where `shapes` has `[..., in, out]`."""
    _unpacked: dict[str, np.ndarray] = dataclasses.field(default_factory=dict, repr=False)

    def raw(self, name: str) -> np.ndarray:
        """View the tensor that the file has under this name, whatever it is part of."""
        return self.stored[name].view()

    def read(self, name: str) -> np.ndarray:
        """View the tensor in its file; a quantized one is widened, MXFP4 to bfloat16 (exact), any
        other format to float32."""
        if name in self.packed:
            return self.packed[name].unpacked(self.raw)
        if name in self.stored:
            return self.stored[name].view()
        if name not in self._unpacked:  # leaves that share a tensor are read one after the other
            self._unpacked.clear()  # first: the host holds one
            parts = (self.stored[f"{name}{suffix}"].view() for suffix in formats.GPT_OSS_PARTS)
            self._unpacked[name] = formats.gpt_oss_unpacked(*parts)
        return self._unpacked[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, or of a part of a quantized one."""
        return self.shapes[name] if name in self.shapes else self.stored[name].shape

    @property
    def formats(self) -> set[str]:
        """Names of the formats that tensors are quantized in."""
        return {tensor.format for tensor in (*self.packed.values(), *self.turned.values())}

    def dtype(self, name: str) -> np.dtype:
        """The dtype of the array that `read` returns."""
        if name in self.packed:
            return np.dtype(np.float32)
        is_packed = self.dtypes[name] == formats.GPT_OSS
        return np.dtype(ml_dtypes.bfloat16 if is_packed else FORMATS[self.dtypes[name]])


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Open `model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Reads headers alone; tensors are read when they are used. Nothing in the folder is trusted: the
    names in the index must be of files in this folder or in folders of it. A link in the folder is
    followed wherever it leads, because the hub's cache is made of them
    (`snapshots/*/model.safetensors` leads to `../../blobs/`); if it leads to anything but a whole
    safetensors file, the error shows nothing of its contents.

    Raises:
      FileNotFoundError: a file is not there.
      ValueError: a file is truncated or no safetensors, or two tensors share bytes or a name;
        the message names the file.
    """
    stored = _stored_tensors(Path(path))
    shapes = {name: at.shape for name, at in stored.items()}
    dtypes = {name: at.dtype for name, at in stored.items()}
    turned = {}
    for name in formats.gpt_oss_packed(dtypes):
        blocks, scales = (f"{name}{suffix}" for suffix in formats.GPT_OSS_PARTS)
        if name in dtypes:
            raise CheckpointFileError(
                f"needed each weight once; {stored[blocks].file} has {blocks}, and "
                f"{stored[name].file} has {name}. Copy the checkpoint again"
            )
        try:
            shapes[name] = formats.gpt_oss_shape(shapes[blocks], shapes[scales])
        except ValueError as error:
            raise CheckpointFileError(f"{stored[blocks].file}: {name}: {error}") from error
        dtypes[name] = formats.GPT_OSS
        experts, size, out = shapes[name]
        turned[name] = Packed("mxfp4", blocks, (experts, out, size), (1, 32), scales)
        for part in (blocks, scales):
            del shapes[part], dtypes[part]
    packed, lacking = formats.find(shapes, dtypes)
    offset = gptq_offset(declared(path)) if any(x.endswith(".qweight") for x in dtypes) else None
    whole = integers.find(shapes, dtypes, lambda name: stored[name].view(), offset)
    packed, lacking = {**packed, **whole[0]}, {**lacking, **whole[1]}
    of_parts = collections.Counter(part for x in packed.values() for part in x.parts)
    for name, tensor in packed.items():
        for part in tensor.parts:
            if of_parts[part] > 1:
                raise CheckpointFileError(
                    f"needed each tensor in one weight; {part} in {stored[part].file} is "
                    f"part of {name} and of another. Copy the checkpoint again"
                )
            del shapes[part], dtypes[part]
        shapes[name], dtypes[name] = tensor.shape, tensor.format
    unused = [name for name, shape in shapes.items() if formats.is_unused(name, shape)]
    for name in unused:
        del shapes[name], dtypes[name]
    if unused:
        log.info(
            "%s: activations and caches are not quantized; %d static scales are not used, such as "
            "%s", path, len(unused), unused[0],
        )  # fmt: skip
    return Checkpoint(stored, shapes, dtypes, packed, lacking, turned)


def what_to_do(path: Path) -> str:
    """Say what to do with the weights at a path that are no safetensors; nothing where there are
    none."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in sorted(files, key=lambda file: "model" not in file.name):
        if file.suffix in PICKLED and file.is_file():
            return (
                f". {file.name} is pickled, and to read it could run anything: once, transformers' "
                "from_pretrained(DIR) and save_pretrained(OUT) make safetensors of it; load OUT"
            )
        if file.suffix == ".gguf" and file.is_file():
            return f". {file.name} is not read: load the folder of safetensors that it was made of"
    return ""


def _stored_tensors(folder: Path) -> dict[str, Stored]:
    """Find each tensor; one that lies in two files is read from the one that the index names."""
    if Path(folder, WEIGHTS).exists():
        return _tensors(folder / WEIGHTS)
    weight_map = _weight_map(folder)
    stored: dict[str, Stored] = {}
    for shard in sorted(set(weight_map.values())):
        for name, at in _tensors(folder / shard).items():
            if name not in stored or weight_map.get(name) == shard:
                stored[name] = at
            elif stored[name].file != folder / weight_map.get(name, ""):
                raise CheckpointFileError(
                    f"needed each tensor once; {name} is in {stored[name].file} and in {at.file}, "
                    f"and {INDEX} names neither for it. Copy the checkpoint again"
                )
    return stored


def _tensors(file: Path) -> dict[str, Stored]:
    """Read the header of a file: its length in 8 bytes, then JSON."""
    size = None
    try:
        with open_regular(file) as (handle, size):
            length = int.from_bytes(handle.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("its header would be longer than the file")
            if length > LARGE_JSON_BYTES:
                raise ValueError(f"its header has {length:,} bytes; {LARGE_JSON_BYTES:,} are read")
            header = strict_json(handle.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        header.pop("__metadata__", None)
        tensors = {name: _stored(file, 8 + length, name, x) for name, x in header.items()}
        _check_extents(tensors, size)
    except ValueError as error:
        if size is None:  # it was not opened, and the error says so
            raise
        raise CheckpointFileError(
            f"needed a whole safetensors file; got {file} ({size} bytes), which is truncated or "
            f"no safetensors: {error}. Copy it again"
        ) from error
    return tensors


def _stored(file: Path, begin: int, name: str, fields: Any) -> Stored:
    """Locate the tensor of which the header says `fields`; offsets count from `begin`."""
    if len(name) > NAME_LENGTH or not name.isprintable():
        raise ValueError(f"a tensor's name is not printable, or longer than {NAME_LENGTH}")
    fields = fields if isinstance(fields, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not _are_integers(shape) or not _are_integers(offsets):
        raise ValueError(f"{name} needs a dtype, and a shape and data_offsets of integers")
    if len(shape) > AXES or len(offsets) != 2:
        raise ValueError(f"{name} has {len(shape)} axes and {len(offsets)} data_offsets")
    if offsets[0] < 0 or offsets[1] < offsets[0] or min(shape, default=0) < 0:
        raise ValueError(f"{name} {tuple(shape)} lies at bytes {offsets[0]} to {offsets[1]}")
    nbytes = offsets[1] - offsets[0]
    known = FORMATS.get(dtype)
    if known is not None and math.prod(shape) * np.dtype(known).itemsize != nbytes:
        raise ValueError(f"{name} {dtype} {tuple(shape)} has {nbytes} bytes")
    return Stored(file, begin + offsets[0], dtype, tuple(shape), nbytes)


def _are_integers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def _check_extents(tensors: Mapping[str, Stored], size: int) -> None:
    """Raise ValueError where a tensor ends behind the file, or two share bytes."""
    end, last = 0, ""
    for name, at in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if at.nbytes and at.start < end:
            raise ValueError(f"{last} and {name} lie on the same bytes")
        if at.start + at.nbytes > size:
            raise ValueError(f"{name} ends at byte {at.start + at.nbytes}")
        if at.nbytes:
            end, last = at.start + at.nbytes, name


def _weight_map(folder: Path) -> dict[str, str]:
    """Read from the index which file has which tensor."""
    if not Path(folder, INDEX).exists():
        raise FileNotFoundError(
            f"needed {WEIGHTS} or {INDEX} beside {folder / CONFIG}; neither is there"
            f"{what_to_do(folder)}"
        )
    weight_map = read_json(folder / INDEX, LARGE_JSON_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"needed a weight_map (tensor name -> file) in {folder / INDEX}; it has none"
        )
    if outside := [x for x in weight_map.values() if not _is_inside(x)]:
        raise ValueError(
            f"needed names of files in the folder of {folder / INDEX}; its weight_map leads to "
            f"{outside[0]!r:.100}, which it may not"
        )
    shards = set(weight_map.values())
    absent = sorted(shard for shard in shards if not os.path.exists(folder / shard))
    if absent:
        raise FileNotFoundError(
            f"{folder / INDEX} names {len(shards)} files; {len(absent)} are not there: "
            f"{', '.join(absent[:LISTED])}. Copy them too"
        )
    return weight_map


def _is_inside(shard: Any) -> bool:
    """Tell whether it names a file in the folder, by this system's paths and by others'."""
    if not isinstance(shard, str) or len(shard) > NAME_LENGTH or not shard.isprintable():
        return False
    paths = PurePosixPath(shard), PureWindowsPath(shard)
    return not any(path.anchor or ".." in path.parts for path in paths)
