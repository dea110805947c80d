# SPDX-License-Identifier: Apache-2.0
"""Quantized tensors as checkpoints store them: values, and beside them scales under other names.

    X.weight           X.weight_scale [1], [out] or [out, 1]     int8, fp8: Hy3-FP8 and many others
    X.weight           X.weight_scale_inv [out/128, in/128]      fp8_block: DeepSeek-V3
    X.weight           X.scale [out/128, in/128]                 fp8_block: DeepSeek-V4
    X.weight           X.weight_scale [out, in/32] E8M0          mxfp8
    X.weight [in/2]    X.scale [out, in/32] E8M0                 mxfp4: DeepSeek-V4's experts
    X.weight [in/2]    X.weight_scale [out, in/16] E4M3, X.weight_scale_2 [1]       nvfp4
    X_blocks [E, out, in/32, 16]   X_scales [E, out, in/32] bytes         mxfp4: gpt-oss's experts

A weight is its value times its scale (times the second one). Two values of 4 bits lie in a byte,
the lower half first. Dtypes and shapes tell the formats apart; the `quantization_config` of a
config.json is not read. Static scales of activations (`X.input_scale`) and of caches are not used:
neither is quantized here, which is more exact.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

import ml_dtypes
import numpy as np

from pallas_kernels.number_formats import E2M1

FORMATS = ("int8", "fp8", "fp8_block", "mxfp8", "mxfp4", "nvfp4")
SCALES = ("{}_scale_inv", "{}_scale", "{stem}.scale")
SECOND = "{}_scale_2"
UNUSED = ("input_scale", "k_scale", "v_scale", "q_scale")
FLOATS = ("F32", "BF16", "F16")
Shape = tuple[int, ...]
VALUES = np.array(E2M1, np.float32)


@dataclasses.dataclass(frozen=True)
class Packed:
    """A quantized tensor of `shape`; a `block` of its last two axes shares a scale."""

    format: str
    name: str
    shape: Shape
    block: tuple[int, int]
    scale: str
    second: str | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(name for name in (self.name, self.scale, self.second) if name)

    def scales(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """Read the scales, one a block: float32 `[..., ceil(out / block), ceil(in / block)]`."""
        grid = (-(-n // b) for n, b in zip(self.shape[-2:], self.block, strict=True))
        return powers(read(self.scale)).reshape(*self.shape[:-2], *grid)

    def unpacked(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """Widen to float32: values times scales."""
        values, spread = read(self.name), self.scales(read)
        exact = VALUES[halves(values)] if self.is_halves else values.astype(np.float32)
        for axis, (size, block) in enumerate(zip(self.shape[-2:], self.block, strict=True)):
            spread = spread.repeat(block, axis - 2).take(range(size), axis - 2)
        exact *= spread
        return exact if self.second is None else exact * read(self.second).astype(np.float32)

    @property
    def is_halves(self) -> bool:
        """True where a byte holds two values."""
        return self.format in ("mxfp4", "nvfp4")


def halves(values: np.ndarray) -> np.ndarray:
    """Codes of 4 bits, two in a byte along the last axis."""
    raw = values.view(np.uint8)
    both = np.stack([raw & 0x0F, raw >> 4], axis=-1)
    return both.reshape(*values.shape[:-1], 2 * values.shape[-1])


def joined(codes: np.ndarray) -> np.ndarray:
    """The bytes that `halves` takes apart."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def powers(scales: np.ndarray) -> np.ndarray:
    """Float32 of scales in E8M0, which a file may call bytes; others as they are."""
    stored = scales.view(ml_dtypes.float8_e8m0fnu) if scales.dtype == np.uint8 else scales
    return stored.astype(np.float32)


def find(
    shapes: Mapping[str, Shape], dtypes: Mapping[str, str]
) -> tuple[dict[str, Packed], dict[str, str]]:
    """Find the quantized tensors of a checkpoint, by name, and those that lack a part, with a word
    on what they lack."""
    packed, lacking = {}, {}
    for name, dtype in dtypes.items():
        if dtype not in ("F8_E4M3", "I8", "U8") or len(shapes[name]) < 2:
            continue
        stem = name.removesuffix(".weight")
        options = [pattern.format(name, stem=stem) for pattern in SCALES]
        scale = next((option for option in options if option in dtypes), None)
        if scale is None:
            if dtype == "F8_E4M3" and not name.endswith(("_scale_inv", "_scale", ".scale")):
                lacking[name] = f"{dtype} {shapes[name]} without {', '.join(options)}"
            continue
        tensor = _of(name, scale, shapes, dtypes)
        if tensor is None:
            lacking[name] = (
                f"{dtype} {shapes[name]} with {scale} {dtypes[scale]} {shapes[scale]}: "
                "no known format"
            )
        else:
            packed[name] = tensor
    return packed, lacking


def _of(name, scale, shapes, dtypes) -> Packed | None:
    shape, grid, kind = shapes[name], shapes[scale], dtypes[scale]
    second = SECOND.format(name)
    if dtypes[name] == "F8_E4M3" and kind in (*FLOATS, "F8_E8M0"):
        if kind in FLOATS and (block := _channels(shape, grid)):
            return Packed("fp8", name, shape, block, scale)
        if grid == tuple(-(-n // 128) for n in shape):
            return Packed("fp8_block", name, shape, (128, 128), scale)
    if dtypes[name] == "F8_E4M3" and kind in ("F8_E8M0", "U8"):
        block = _groups(shape, grid, 32)
        return block and Packed("mxfp8", name, shape, block, scale)
    if dtypes[name] == "I8" and kind in FLOATS:
        block = _channels(shape, grid)
        return block and Packed("int8", name, shape, block, scale)
    wide = (*shape[:-1], 2 * shape[-1])
    if kind in ("F8_E8M0", "U8") and grid == (*wide[:-1], wide[-1] // 32):
        return Packed("mxfp4", name, wide, (1, 32), scale)
    halves = dtypes[name] == "U8" and kind == "F8_E4M3" and grid == (*wide[:-1], wide[-1] // 16)
    if halves and math.prod(shapes.get(second, (0,))) == 1:
        return Packed("nvfp4", name, wide, (1, 16), scale, second)
    return None


def _channels(shape, grid) -> tuple[int, int] | None:
    """The block of a tensor with one scale in all, or one for each index of one of two axes."""
    rows, columns = shape[-2:]
    if math.prod(grid) == 1 and len(shape) == 2:
        return rows, columns
    if grid in ((*shape[:-1],), (*shape[:-1], 1)):
        return 1, columns
    return (rows, 1) if grid == (*shape[:-2], 1, columns) else None


def _groups(shape, grid, size) -> tuple[int, int] | None:
    """The block of a tensor of which `size` values along one of the last two axes share a scale."""
    rows, columns = shape[-2:]
    if grid == (*shape[:-1], columns // size) and columns % size == 0:
        return 1, size
    if grid == (*shape[:-2], rows // size, columns) and rows % size == 0:
        return size, 1
    return None


def is_unused(name: str, shape: Shape) -> bool:
    """Tell whether a tensor is a static scale of activations or of a cache."""
    return math.prod(shape) == 1 and name.split(".")[-1] in UNUSED


# gpt-oss's experts: two tensors in place of one, without `.weight` and with a name of their own.

GPT_OSS = "MXFP4"
GPT_OSS_PARTS = "_blocks", "_scales"


def gpt_oss_packed(dtypes: Mapping[str, str]) -> Iterable[str]:
    """Names of the tensors that come in two parts."""
    blocks, scales = GPT_OSS_PARTS
    names = [name.removesuffix(blocks) for name in dtypes if name.endswith(blocks)]
    return [n for n in names if dtypes[n + blocks] == dtypes.get(n + scales) == "U8"]


def gpt_oss_shape(blocks: Shape, scales: Shape) -> Shape:
    """The shape `[E, in, out]` of the tensor that they stand for, as gpt-oss has it unpacked.

    Raises:
      ValueError: parts that do not belong together.
    """
    if len(blocks) != 4 or blocks[:-1] != scales or blocks[-1] != 16:
        raise ValueError(
            "MXFP4: blocks are [E, out, in / 32, 16] and scales [E, out, in / 32]; "
            f"got {blocks} and {scales}"
        )
    experts, out, groups, _ = blocks
    return experts, 32 * groups, out


def gpt_oss_unpacked(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """`[E, in, out]` in bfloat16, which holds every value exactly."""
    result = np.empty(gpt_oss_shape(blocks.shape, scales.shape), ml_dtypes.bfloat16)
    for expert in range(len(blocks)):  # one at a time: memory
        exact = VALUES[halves(blocks[expert])] * powers(scales[expert])[..., None]
        result[expert] = exact.reshape(len(exact), -1).T.astype(ml_dtypes.bfloat16)
    return result
