# SPDX-License-Identifier: Apache-2.0
"""`jaxcp quantize`: a checkpoint with the weights of its experts, or of all layers, quantized.

Takes one tensor at a time and writes files cut as those of the source. Names and number formats
are in `jaxcp.weights.formats`; rounding is done in NumPy, so no device is needed.
"""

import jaxcp.flax_version  # noqa: F401  (before flax)

# isort: split
import dataclasses
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from jaxcp import models
from jaxcp.input_files import open_regular
from jaxcp.layers.quantized import of_experts
from jaxcp.layers.stack import of_each_layer
from jaxcp.models.weight_table import sources
from jaxcp.weights import abstract_model
from jaxcp.weights.config_file import fitted, load_config, naming
from jaxcp.weights.files import (
    CONFIG,
    FORMATS,
    INDEX,
    WEIGHTS,
    Checkpoint,
    open_checkpoint,
    read_json,
)
from jaxcp.weights.formats import joined, powers
from jaxcp.weights.quantized import summed_axis
from jaxcp.weights.stream import progress_bar
from pallas_kernels.number_formats import (
    E2M1_LARGEST,
    E4M3_LARGEST,
    INT4_LARGEST,
    INT8_LARGEST,
    LEAST,
    to_e2m1,
    to_int4,
    to_ue8m0,
)

log = logging.getLogger(__name__)

Weights = Literal["int8", "fp8", "nvfp4", "mxfp8", "int4"]
Only = Literal["experts", "all"]
GROUPS = {"mxfp8": (32,), "nvfp4": (16,), "int4": (128, 64, 32)}
"""Weights that share a scale; of several the first that divides a tensor's."""
NAMES = {np.dtype(dtype): name for name, dtype in FORMATS.items()}
COPIED = (".json", ".jinja", ".txt", ".model")


@dataclasses.dataclass(frozen=True)
class Quantized:
    """The result of `quantize`: bytes before and after, tensors quantized and not."""

    bytes_before: int
    bytes_after: int
    quantized: tuple[str, ...]
    skipped: tuple[str, ...]
    """Tensors left as they were: their rows are no multiple of the values that share a scale."""


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of the new checkpoint; `make` computes its values."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def quantize(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    weights: Weights,
    only: Only = "all",
    progress: bool | None = None,
) -> Quantized:
    """Write `source` with quantized weights to the folder `out`, which `jaxcp.load` reads.

    int8 and fp8 (e4m3) have a float32 scale for each output; mxfp8 (e4m3) a power of two for 32
    weights that are summed; nvfp4 (e2m1) an e4m3 scale for 16 of them and a float32 one for the
    tensor; int4 a float32 scale for 128 of them, or 64 or 32 where those divide a row. Embeddings,
    the head, routers, norms and what a layer does not simply multiply by stay as they are. Atomic:
    `out` appears when all is written.

    Args:
      only: "experts": routed experts alone.
      progress: as `jaxcp.load` has it.
    Raises:
      FileNotFoundError, ValueError: as `jaxcp.load`; `source` is quantized already, holds NaN or
        Inf, or `out` is there and not empty.
    """
    source, out = Path(source), Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"needed an empty folder, or none yet; {out} is there. Name another")
    checkpoint = open_checkpoint(source)
    axes = _wanted(source, checkpoint, only)
    files, skipped = _planned(checkpoint, axes, weights)
    staging = out.parent / f".{out.name}.quantizing"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        _write_rest(source, staging, weights, only)
        total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
        with progress_bar(total, progress, "quantizing") as advance:
            for file, tensors in files.items():
                _write_file(staging / file, tensors, advance)
        if set(files) != {WEIGHTS}:
            _write_index(staging / INDEX, files, total)
        if out.exists():
            out.rmdir()
        os.rename(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    before = sum(math.prod(x.shape) * x.view().dtype.itemsize for x in checkpoint.stored.values())
    made = tuple(name for name in axes if name not in skipped)
    return Quantized(before, total, made, tuple(skipped))


def _wanted(path: Path, checkpoint: Checkpoint, only: Only) -> dict[str, int]:
    """The tensors to quantize, and the axis of each that a product sums over."""
    if checkpoint.packed or checkpoint.lacking:
        name = next(iter([*checkpoint.packed, *checkpoint.lacking]))
        raise ValueError(f"needed plain weights; {path} is quantized already, such as {name}")
    config = load_config(path)
    family = models.family_of(config)
    config = fitted(path, config, checkpoint.shapes.keys())
    with naming(path / CONFIG):
        leaves = of_each_layer(abstract_model(config))
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    chosen = sources(family.table(config), shapes, checkpoint.shapes)
    axes: dict[str, int] = {}
    for path_, source in chosen.items():
        variable = leaves[path_]
        axis = summed_axis(variable, path_, source)
        if axis is not None and (only == "all" or of_experts(variable)):
            names = [name for name in source.names if checkpoint.dtypes.get(name) in _PLAIN]
            axes |= dict.fromkeys(names, axis)
    return axes


_PLAIN = ("F32", "BF16", "F16")


def _planned(
    checkpoint: Checkpoint, axes: dict[str, int], weights: Weights
) -> tuple[dict[str, list[_Tensor]], list[str]]:
    """The tensors of each new file, by its name, and the names that cannot be quantized."""
    files: dict[str, list[_Tensor]] = {}
    skipped = []
    for name, at in checkpoint.stored.items():
        made: list[_Tensor] = []
        if name in axes:
            made = list(_parts(name, at.shape, axes[name], weights, at.view))
            skipped += [] if made else [name]
        tensors = files.setdefault(at.file.name, [])
        tensors += made or [_Tensor(name, at.view().dtype, at.shape, at.view)]
    for tensors in files.values():  # the largest items first: each then begins at a multiple of one
        tensors.sort(key=lambda tensor: -tensor.dtype.itemsize)
    if skipped:
        log.warning("%s: not quantized, %d tensors whose rows are no multiple of %d, such as %s",
                    weights, len(skipped), GROUPS[weights][-1], skipped[0])  # fmt: skip
    return files, skipped


def _parts(name, shape, axis, weights: Weights, view) -> Iterator[_Tensor]:
    """The tensors that take the place of one; none where it cannot be quantized."""
    group, packs = group_of(weights, shape[axis]), weights in ("nvfp4", "int4")
    # halves of a byte lie along the last axis, so that one must be summed over
    if not group or (packs and axis != -1):
        return
    scales, values = list(shape), list(shape)
    scales[axis] //= group
    values[-1] //= 2 if packs else 1
    dtypes = {
        "int8": (np.int8, np.float32), "fp8": (ml_dtypes.float8_e4m3fn, np.float32),
        "mxfp8": (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu),
        "nvfp4": (np.uint8, ml_dtypes.float8_e4m3fn), "int4": (np.uint8, np.float32),
    }[weights]  # fmt: skip

    def made(part):  # again for each part: they lie apart in the file, and none is held meanwhile
        return _made(name, view(), axis, weights)[part]

    yield _Tensor(name, np.dtype(dtypes[0]), tuple(values), lambda: made("values"))
    yield _Tensor(f"{name}_scale", np.dtype(dtypes[1]), tuple(scales), lambda: made("scales"))
    if weights == "nvfp4":
        yield _Tensor(f"{name}_scale_2", np.dtype(np.float32), (), lambda: made("whole"))


def _made(name, tensor: np.ndarray, axis: int, weights: Weights) -> dict[str, np.ndarray]:
    exact = tensor.astype(np.float32)
    if not np.isfinite(exact).all():
        raise ValueError(f"needed finite weights; {name} has NaN or Inf")
    rows = np.moveaxis(exact, axis, -1)
    made = quantized(rows, weights)
    for part in ("values", "scales"):
        made[part] = np.moveaxis(made[part], -1, axis)
    return made


def group_of(weights: Weights, size: int) -> int:
    """Count the weights that share a scale, of `size` that are summed; 0 if none of them divides.

    >>> group_of("int4", 192), group_of("int8", 192), group_of("nvfp4", 24)
    (64, 192, 0)
    """
    return next((n for n in GROUPS.get(weights, (size,)) if size % n == 0), 0)


def quantized(rows: np.ndarray, weights: Weights) -> dict[str, np.ndarray]:
    """Quantize float32 `[..., in]`, summed over `in`: `values`, `scales` and, of nvfp4, `whole`.

    >>> {k: v.shape for k, v in quantized(np.ones((4, 64), np.float32), "nvfp4").items()}
    {'values': (4, 32), 'scales': (4, 4), 'whole': ()}
    """
    group = group_of(weights, rows.shape[-1])
    grouped = rows.reshape((*rows.shape[:-1], -1, group))
    greatest = np.abs(grouped).max(-1, keepdims=True)
    if weights in ("int8", "fp8"):
        largest = INT8_LARGEST if weights == "int8" else E4M3_LARGEST
        scale = np.where(greatest > 0, greatest / np.float32(largest), np.float32(1))
        scaled = np.clip(grouped / scale, -largest, largest).reshape(rows.shape)
        values = np.rint(scaled).astype(np.int8) if weights == "int8" else _e4m3(scaled)
        return {"values": values, "scales": scale[..., 0]}
    if weights == "mxfp8":
        codes = to_ue8m0(greatest / E4M3_LARGEST)
        scaled = np.clip(grouped / powers(codes), -E4M3_LARGEST, E4M3_LARGEST)
        values = _e4m3(scaled).reshape(rows.shape)
        return {"values": values, "scales": codes[..., 0].view(ml_dtypes.float8_e8m0fnu)}
    if weights == "int4":
        scale = np.where(greatest > 0, greatest / np.float32(INT4_LARGEST), np.float32(1))
        codes = to_int4((grouped / scale).reshape(rows.shape))
        return {"values": joined(codes), "scales": scale[..., 0]}
    whole = np.float32(max(float(greatest.max()) / (E4M3_LARGEST * E2M1_LARGEST), LEAST))
    scales = _e4m3(greatest[..., 0] / E2M1_LARGEST / whole)
    unit = scales.astype(np.float32)[..., None] * whole
    scaled = (grouped / np.where(unit > 0, unit, 1)).reshape(rows.shape)
    return {"values": joined(to_e2m1(scaled)), "scales": scales, "whole": np.asarray(whole)}


def _e4m3(x):
    return x.astype(ml_dtypes.float8_e4m3fn)


def _write_rest(source: Path, folder: Path, weights: Weights, only: Only) -> None:
    """Write config.json with the format in it, and copy the files of the tokenizer."""
    for file in source.iterdir():
        if file.suffix in COPIED and file.name not in (CONFIG, INDEX) and not file.is_dir():
            _check_link(file, source)
            with open_regular(file) as (handle, _), open(folder / file.name, "wb") as copy:
                shutil.copyfileobj(handle, copy)
    fields = read_json(source / CONFIG)
    fields["quantization_config"] = {"quant_method": "jaxcp", "weights": weights, "only": only}
    _synced(folder / CONFIG, [(json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()])


def _check_link(file: Path, source: Path) -> None:
    """Raise ValueError for a link out of the folder: its target would be copied and handed on.

    Links to `blobs` beside the `snapshots` of the hub's cache are followed.
    """
    target, folder = file.resolve(), source.resolve()
    if not any(target.is_relative_to(x) for x in (folder, folder.parent.parent / "blobs")):
        raise ValueError(
            f"needed files of the checkpoint to copy; {file} is a link that leads out of its "
            "folder. Copy there what it leads to, or take it away"
        )


def _write_file(path: Path, tensors: list[_Tensor], advance: Callable[[int], None]) -> None:
    """Write a safetensors file: the length of the header in 8 bytes, the header, the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def pieces():
        yield len(text).to_bytes(8, "little")
        yield text
        for tensor in tensors:
            made = np.ascontiguousarray(tensor.make()).reshape(-1)
            assert (made.dtype, made.nbytes) == (tensor.dtype, tensor.nbytes), tensor.name
            yield made.view(np.uint8).data
            advance(tensor.nbytes)

    _synced(path, pieces())


def _write_index(path: Path, files: dict[str, list[_Tensor]], total: int) -> None:
    weight_map = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
    contents = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _synced(path, [(json.dumps(contents, indent=2, sort_keys=True) + "\n").encode()])


def _synced(path: Path, pieces) -> None:
    with open(path, "wb") as handle:
        for piece in pieces:
            handle.write(piece)
        handle.flush()
        os.fsync(handle.fileno())
