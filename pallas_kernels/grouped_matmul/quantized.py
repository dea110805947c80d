# SPDX-License-Identifier: Apache-2.0
"""Weights of 8 or 4 bits with scales: products read the narrow values and sum in float32."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.number_formats import (
    E2M1_LARGEST,
    E4M3_LARGEST,
    INT4_LARGEST,
    LARGEST,
    LEAST,
    four_times_e2m1,
    from_int4,
    to_e2m1,
    to_float32,
    to_int4,
    to_ue8m0,
)

BLOCK = 128  # rows and columns that share a scale, as in DeepSeek-V3 (arXiv 2412.19437, 3.3.2)
GROUPS = (16, 32, 64, BLOCK)  # rows of one column that share a scale
FORMATS = {"mxfp8": 32, "mxfp4": 32, "nvfp4": 16, "int4": BLOCK}
PACKED = 256  # most rows that are packed together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """Quantized weights: `(values - zeros) * scales * channel_scales`, each spread over its block.

    `values`: int8 or float8_e4m3fn `[E, D, F]`; or with `packed` `[E, D / 2, F]`, uint8 of two e2m1
    or int8 of two int4: of `packed` rows the first half lie in the low bits, the second in the high
    bits, so that a slice of whole `packed` rows can be read alone. `packed` is a power of two, at
    most 256.

    `scales`: `[E, 1, F]` for one a channel, `[E, ceil(D / 128), ceil(F / 128)]` for one a block, or
    `[E, D / g, F]` for g = 16, 32, 64 or 128 rows of a column; float32, bfloat16, float8_e4m3fn or,
    as exponents of 2 plus 127, uint8. `zeros`: int8 as `scales`, what is taken from values of int4
    first, or None. `channel_scales`: float32 `[E, 1, F]`, or None.

    For a stack of layers every array is `[L, E, ...]`.

    A pytree; no gradient flows into it.
    """

    values: Array
    scales: Array
    channel_scales: Array | None = None
    packed: int = dataclasses.field(default=0, metadata={"static": True})
    zeros: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, d, f = self.values.shape
        return *lead, 2 * d if self.packed else d, f

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def by_channel(self) -> bool:
        """One scale a channel; a matrix of 128 x 1 or less has both forms, with one meaning."""
        return self.scales.shape[-2:] == (1, self.values.shape[-1])

    @property
    def scales_are_final(self) -> bool:
        """Tell whether `operand` gives the scales as they are stored."""
        return self.by_channel and self.scales.dtype == jnp.float32 and self.channel_scales is None

    @property
    def group(self) -> int:
        """Rows that share a scale."""
        d, f = self.shape[-2:]
        if self.by_channel:
            return d
        tall, wide = self.scales.shape[-2:]
        return d // tall if wide == f and d % tall == 0 and d // tall in GROUPS else BLOCK

    @property
    def has_gradient(self) -> bool:
        """Tell whether there is a transposed product: scales lie along whole columns or blocks."""
        wide = self.scales.shape[-1]
        return not self.packed and (
            self.by_channel or (not self.is_fine and wide == -(-self.shape[-1] // BLOCK))
        )

    @property
    def is_fine(self) -> bool:
        """Tell whether a kernel makes whole weights, in the rows' dtype, before it multiplies. In
        bfloat16 that is exact of what `quantize` gives, but of integers, whose scales are any."""
        return bool(self.packed) or self.group < min(BLOCK, self.shape[-2])


def quantize(
    weights: Float[Array, "E D F"], format=jnp.int8, *, block: bool = False, group: int = BLOCK
) -> Quantized:
    """Round to the nearest; of the weights that share a scale the greatest becomes the format's.

    Args:
      format: int8 or float8_e4m3fn; "mxfp8" (e4m3), "mxfp4" (e2m1), both with a power of two for
        32 rows; "nvfp4" (e2m1 with an e4m3 scale for 16 rows, and one a channel); or "int4" with a
        float32 scale for `group` rows: 16, 32, 64 or 128.
      block: int8 and float8_e4m3fn have a scale for every 128 x 128 block, not every column.
    Raises:
      ValueError: another format; rows that are no multiple of those that share a scale.

    >>> quantize(jnp.ones((2, 256, 384)), jnp.float8_e4m3fn, block=True).scales.shape
    (2, 2, 3)
    >>> quantize(jnp.ones((2, 256, 384)), "mxfp4").values.shape
    (2, 128, 384)
    """
    exact = weights.astype(jnp.float32)
    if isinstance(format, str) and format in FORMATS:
        return _in_groups(exact, format, group if format == "int4" else FORMATS[format])
    largest = _largest(format)
    exact_blocks = jnp.abs(_blocks(exact) if block else exact)
    greatest = exact_blocks.max((2, 4)) if block else exact_blocks.max(1, keepdims=True)
    scales = jnp.where(greatest > 0, greatest / largest, 1.0)
    scaled = exact / spread(scales, weights.shape)
    if jnp.dtype(format) == jnp.int8:
        scaled = jnp.round(scaled)
    # a quotient may round to just above the greatest, which e4m3fn would make NaN
    return Quantized(jnp.clip(scaled, -largest, largest).astype(format), scales)


def _in_groups(exact, format, group):
    e, d, f = exact.shape
    if group not in GROUPS:
        raise ValueError(f"{format}: one of {GROUPS} rows share a scale; got group={group}")
    if d % group:
        raise ValueError(f"{format}: {group} rows share a scale; got {exact.shape}")
    grouped = exact.reshape(e, d // group, group, f)
    greatest = jnp.abs(grouped).max(2)
    if format == "nvfp4":
        whole = greatest.max(1, keepdims=True) / (E4M3_LARGEST * E2M1_LARGEST)
        whole = jnp.maximum(whole, LEAST)
        scales = (greatest / E2M1_LARGEST / whole).astype(jnp.float8_e4m3fn)
        unit = to_float32(scales) * whole
    elif format == "int4":
        whole, scales = None, jnp.where(greatest > 0, greatest / INT4_LARGEST, 1.0)
        unit = scales
    else:
        largest = E4M3_LARGEST if format == "mxfp8" else E2M1_LARGEST
        whole, scales = None, to_ue8m0(greatest / largest)
        unit = to_float32(scales)
    scaled = (grouped / jnp.where(unit > 0, unit, 1.0)[:, :, None]).reshape(e, d, f)
    if format == "mxfp8":
        return Quantized(scaled.astype(jnp.float8_e4m3fn), scales)
    packed = math.gcd(d, PACKED)
    if format == "int4":
        return Quantized(pack(to_int4(scaled), packed).view(jnp.int8), scales, whole, packed)
    return Quantized(pack(to_e2m1(scaled), packed), scales, whole, packed)


def decoded(dtype):
    """`(decode, factor)` of packed values in `dtype`: `decode(int32, high=)` gives a value in
    float32, divided by `factor`."""
    return (from_int4, 1.0) if dtype == jnp.int8 else (four_times_e2m1, 0.25)


def pack(codes, packed: int):
    """Pack uint8 codes of 4 bits `[..., D, F]`, jax's or NumPy's: `[..., D / 2, F]`, two a byte."""
    *rest, d, f = codes.shape
    if packed % 2 or d % packed:
        raise ValueError(f"{packed} rows, an even number, are packed together; got {codes.shape}")
    halves = codes.reshape(*rest, d // packed, 2, packed // 2, f)
    both = halves[..., 0, :, :] | halves[..., 1, :, :] << 4
    return both.reshape(*rest, d // 2, f)


def unpack(values, packed: int):
    """Undo `pack`."""
    *rest, half, f = values.shape
    blocks = values.reshape(*rest, 2 * half // packed, packed // 2, f)
    return jnp.concatenate([blocks & 15, blocks >> 4], axis=-2).reshape(*rest, 2 * half, f)


def dequantize(weights: Quantized, dtype=jnp.float32) -> Float[Array, "E D F"]:
    """The matrices that the values and scales stand for.

    >>> dequantize(quantize(jnp.ones((2, 256, 384)), "mxfp4")).shape
    (2, 256, 384)
    """
    if weights.packed:
        codes = unpack(weights.values.view(jnp.uint8), weights.packed)
        decode, factor = decoded(weights.values.dtype)
        exact = factor * decode(codes.astype(jnp.int32))
    else:
        exact = weights.values.astype(jnp.float32)
    if weights.zeros is not None:
        exact -= spread(weights.zeros.astype(jnp.float32), weights.shape)
    exact *= spread(to_float32(weights.scales), weights.shape)
    if weights.channel_scales is not None:
        exact *= weights.channel_scales
    return exact.astype(dtype)


def spread(scales, shape):
    """Repeat scales of blocks or groups to `shape`; return `[E, 1, F]` as they are."""
    (tall, wide), (d, f) = scales.shape[1:], shape[1:]
    if (tall, wide) == (1, f):
        return scales
    if wide == f and d % tall == 0 and d // tall in GROUPS:
        return scales.repeat(d // tall, axis=1)
    return columns(scales, f).repeat(BLOCK, axis=1)[:, :d]


def columns(scales, width):
    """Repeat scales to one entry a column: `[E, blocks of rows, width]`."""
    if scales.shape[2] == width:
        return scales
    return scales.repeat(BLOCK, axis=2)[:, :, :width]


def check(weights: Quantized) -> None:
    """Raises ValueError: values or scales of a wrong dtype or shape."""
    *lead, d, f = weights.shape
    together = weights.packed
    is_packed = weights.values.dtype in (np.uint8, np.int8)
    if together and (not is_packed or PACKED % together or d % together):
        raise ValueError(
            f"packed values are uint8 or int8, a power of two of rows to {PACKED} together, which "
            f"divides rows; got {weights.values.dtype}, packed={together} of {d} rows"
        )
    if not weights.packed:
        _largest(weights.values.dtype)
    forms = [(*lead, 1, f), (*lead, -(-d // BLOCK), -(-f // BLOCK))]
    forms += [(*lead, d // group, f) for group in GROUPS if d % group == 0]
    kinds = (jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn, jnp.uint8)
    if weights.scales.shape not in forms or weights.scales.dtype not in kinds:
        raise ValueError(
            f"scales of {weights.shape} are float32, bfloat16, float8_e4m3fn or uint8, of {forms}; "
            f"got {weights.scales.dtype} {weights.scales.shape}"
        )
    zeros, is_int4 = weights.zeros, weights.packed and weights.values.dtype == np.int8
    form = (weights.scales.shape, np.int8)
    if zeros is not None and not (is_int4 and (zeros.shape, zeros.dtype) == form):
        raise ValueError(
            f"zeros are of int4, int8 {weights.scales.shape} as scales; got {zeros.dtype} "
            f"{zeros.shape} beside values in {weights.values.dtype}"
        )
    whole = weights.channel_scales
    if whole is not None and not (weights.is_fine or weights.by_channel):
        raise ValueError("channel_scales go with scales of 16 or 32 rows; fold them into scales")
    if whole is not None and (whole.shape != forms[0] or whole.dtype != jnp.float32):
        raise ValueError(f"channel_scales are float32 {forms[0]}; got {whole.dtype} {whole.shape}")


def _largest(dtype):
    name = jnp.dtype(dtype).name
    if name not in LARGEST:
        raise ValueError(f"quantized weights are {', '.join(LARGEST)}; got {name}")
    return LARGEST[name]


def _blocks(x):
    e, d, f = x.shape
    tall, wide = -(-d // BLOCK), -(-f // BLOCK)
    x = jnp.pad(x, ((0, 0), (0, tall * BLOCK - d), (0, wide * BLOCK - f)))
    return x.reshape(e, tall, BLOCK, wide, BLOCK)


def operand(weights, *, transpose: bool):
    """The `(values, scales)` for a kernel; scales `[E, groups of summed rows, columns]`, or None.

    Scales by channel take no part in a transposed product: they lie along the axis that it sums
    over, and its caller has multiplied the other side by them. For fine groups see
    `fine_operands`.
    """
    if not isinstance(weights, Quantized):
        return weights, None
    scales = _whole_scales(weights)
    if not transpose:
        return weights.values, columns(scales, weights.shape[2])
    if weights.by_channel:
        return weights.values, None
    return weights.values, columns(scales.swapaxes(1, 2), weights.shape[1])


def fine_operands(weights: Quantized):
    """`(values, scales [E, D / group, F] in their dtype, channel scales [E, 1, F])`, and zeros as
    scales if there are any.

    Where there are no channel scales, ones `[1, 1, F]` that all matrices share.
    """
    whole = weights.channel_scales
    ones = jnp.ones((1, 1, weights.shape[-1])) if whole is None else whole
    zeros = () if weights.zeros is None else (weights.zeros,)
    return weights.values, weights.scales, ones, *zeros


def _whole_scales(weights):
    scales = to_float32(weights.scales)
    return scales if weights.channel_scales is None else scales * weights.channel_scales


def channel_scales(weights: Quantized):
    """The scales, float32 `[E, 1, F]`, of weights that have one a channel."""
    assert weights.by_channel
    return _whole_scales(weights)
