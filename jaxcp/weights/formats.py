# SPDX-License-Identifier: Apache-2.0
"""Quantized tensors as checkpoints store them: values, and beside them scales under other names.

    X.weight           X.weight_scale [1], [out] or [out, 1]     int8, fp8: Hy3-FP8 and many others
                       X.weight_zero_point                       the same, of asymmetric int8
    X.weight           X.weight_scale_inv [out/128, in/128]      fp8_block: DeepSeek-V3
    X.weight           X.scale [out/128, in/128]                 fp8_block: DeepSeek-V4
    X.weight           X.weight_scale [out, in/32] E8M0          mxfp8
    X.weight [in/2]    X.scale [out, in/32] E8M0                 mxfp4: DeepSeek-V4's experts
    X.weight [in/2]    X.weight_scale [out, in/16] E4M3, X.weight_scale_2 [1]       nvfp4
    X.weight [in/2]    X.weight_scale [out, in/g] float          int4: what `jaxcp quantize` writes
    X.weight_packed    X.weight_scale as above, X.weight_global_scale [1], which divides  the two
    X_blocks [E, out, in/32, 16]   X_scales [E, out, in/32] bytes         mxfp4: gpt-oss's experts

A weight is its value times its scale (times the second one). Two values of 4 bits lie in a byte,
the lower half first. Dtypes and shapes tell the formats apart; `jaxcp.weights.declared` compares
them with the `quantization_config` of config.json. Integers in int32 (compressed-tensors, AWQ,
GPTQ) are in `jaxcp.weights.integers`. Static scales of activations (`X.input_scale`) and of caches
are not used: neither is quantized here, which is more exact.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

import ml_dtypes
import numpy as np

from pallas_kernels.number_formats import E2M1

FORMATS = ("int8", "fp8", "fp8_block", "mxfp8", "mxfp4", "nvfp4", "int4")
SCALES = ("{}_scale_inv", "{}_scale", "{stem}.scale")
PACKED = "_packed"
"""End of a name in compressed-tensors, of values that share items."""
UNUSED = (
    "input_scale", "input_zero_point", "input_global_scale", "k_scale", "v_scale", "q_scale"
)  # fmt: skip
FLOATS = ("F32", "BF16", "F16")
Shape = tuple[int, ...]
VALUES = np.array(E2M1, np.float32)
INT4 = np.array([*range(8), *range(-8, 0)], np.float32)
"""Values of int4 by their code, as `VALUES` has those of e2m1."""
GROUPS = 128, 64, 32, 16
"""Values of int4 that can share a scale; and of other integers in memory."""


@dataclasses.dataclass(frozen=True)
class Packed:
    """A quantized tensor of `shape`; a `block` of its last two axes shares a scale.

    `name`, `scale`, `second` and `zero` are tensors of the file. The second scale multiplies, or
    `divides`; zero points are taken from values.
    """

    format: str
    name: str
    shape: Shape
    block: tuple[int, int]
    scale: str
    second: str | None = None
    divides: bool = False
    zero: str | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(name for name in (self.name, self.scale, self.second, self.zero) if name)

    def kept(self, read: Callable[[str], np.ndarray]) -> "Packed | None":
        """The tensor as it can stay in memory; None where it is widened."""
        del read
        return None if self.zero else self

    def dtype(self, read: Callable[[str], np.ndarray]) -> np.dtype:
        """The dtype of values in memory; of 4 bits, that of two together."""
        if self.is_halves:
            return np.dtype(np.int8 if self.format == "int4" else np.uint8)
        return read(self.name).dtype

    def values(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """Read the values, of `shape`; of 4 bits, their codes."""
        stored = read(self.name)
        return halves(stored) if self.is_halves else stored

    def whole(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """Read the second scale as the float32 that multiplies."""
        scale = read(str(self.second)).astype(np.float32)
        with np.errstate(divide="ignore"):  # what is not finite is counted, and named
            return 1 / scale if self.divides else scale

    def scales(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """Read the scales, one a block: float32 `[..., ceil(out / block), ceil(in / block)]`."""
        return powers(read(self.scale)).reshape(self._grid)

    def unpacked(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """Widen to float32: values times scales."""
        values = self.values(read)
        table = INT4 if self.format == "int4" else VALUES
        exact = table[values] if self.is_halves else values.astype(np.float32)
        if self.zero is not None:
            exact -= self._spread(read(self.zero).astype(np.float32).reshape(self._grid))
        scales = self.scales(read)
        if self.divides:
            with np.errstate(divide="ignore", invalid="ignore"):
                scales = scales / read(str(self.second)).astype(np.float32)
        exact *= self._spread(scales)
        return exact if self.second is None or self.divides else exact * self.whole(read)

    @property
    def _grid(self) -> Shape:
        grid = (-(-n // b) for n, b in zip(self.shape[-2:], self.block, strict=True))
        return *self.shape[:-2], *grid

    def _spread(self, grid: np.ndarray) -> np.ndarray:
        """Repeat what blocks share."""
        for axis, (size, block) in enumerate(zip(self.shape[-2:], self.block, strict=True)):
            grid = grid.repeat(block, axis - 2).take(range(size), axis - 2)
        return grid

    @property
    def is_halves(self) -> bool:
        """True where a byte holds two values."""
        return self.format in ("mxfp4", "nvfp4", "int4")


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
    """Find the quantized tensors of a checkpoint, by the names of their weights, and those that
    lack a part, with a word on what they lack."""
    packed, lacking = {}, {}
    for name, dtype in dtypes.items():
        if dtype not in ("F8_E4M3", "I8", "U8") or len(shapes[name]) < 2:
            continue
        weight = name.removesuffix(PACKED)
        options = [
            pattern.format(weight, stem=weight.removesuffix(".weight")) for pattern in SCALES
        ]
        scale = next((option for option in options if option in dtypes), None)
        if scale is None:
            if dtype == "F8_E4M3" and not name.endswith(("_scale_inv", "_scale", ".scale")):
                lacking[name] = f"{dtype} {shapes[name]} without {', '.join(options)}"
            continue
        tensor = _of(name, scale, shapes, dtypes)
        if weight != name and weight in dtypes:
            lacking[name] = f"{dtype} {shapes[name]} beside {weight}, which is the same weight"
        elif tensor is None:
            lacking[name] = (
                f"{dtype} {shapes[name]} with {scale} {dtypes[scale]} {shapes[scale]}: "
                "no known format"
            )
        else:
            packed[weight] = tensor
    return packed, lacking


def _of(name, scale, shapes, dtypes) -> Packed | None:
    shape, grid, kind = shapes[name], shapes[scale], dtypes[scale]
    if dtypes[name] == "F8_E4M3" and kind in (*FLOATS, "F8_E8M0"):
        if kind in FLOATS and (block := _channels(shape, grid)):
            return Packed("fp8", name, shape, block, scale)
        if grid == (*shape[:-2], *(-(-n // 128) for n in shape[-2:])):
            return Packed("fp8_block", name, shape, (128, 128), scale)
    if dtypes[name] == "F8_E4M3" and kind in ("F8_E8M0", "U8"):
        block = _groups(shape, grid, 32)
        return block and Packed("mxfp8", name, shape, block, scale)
    if dtypes[name] == "I8" and kind in FLOATS:
        block, zero = _channels(shape, grid), f"{name}_zero_point"
        if zero in shapes and shapes[zero] != grid:
            return None
        points = zero if zero in shapes else None
        return block and Packed("int8", name, shape, block, scale, zero=points)
    wide = (*shape[:-1], 2 * shape[-1])
    if kind in ("F8_E8M0", "U8") and grid == (*wide[:-1], wide[-1] // 32):
        return Packed("mxfp4", name, wide, (1, 32), scale)
    if dtypes[name] == "U8" and kind in ("F32", "BF16"):
        sizes = [n for n in GROUPS if wide[-1] % n == 0 and grid == (*wide[:-1], wide[-1] // n)]
        return Packed("int4", name, wide, (1, sizes[0]), scale) if sizes else None
    halves = dtypes[name] == "U8" and kind == "F8_E4M3" and grid == (*wide[:-1], wide[-1] // 16)
    divides = name.endswith(PACKED)
    second = f"{name.removesuffix(PACKED)}_global_scale" if divides else f"{name}_scale_2"
    if halves and math.prod(shapes.get(second, (0,))) == 1:
        return Packed("nvfp4", name, wide, (1, 16), scale, second, divides)
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
