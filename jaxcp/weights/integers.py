# SPDX-License-Identifier: Apache-2.0
"""Integers of 4 and 8 bits that lie in int32, as compressed-tensors, GPTQ and AWQ store a weight.

    X.weight_packed [out, in b/32]  X.weight_scale [out, groups]  X.weight_shape: [out, in]
        perhaps X.weight_zero_point [out b/32, groups], X.weight_g_idx [in]
    X.qweight [in b/32, out]   X.scales [groups, out]  X.qzeros [groups, out b/32]  X.g_idx [in]
    X.qweight [in, out/8]      X.scales [groups, out]  X.qzeros [groups, out/8]        AWQ

A weight is its code less the zero point of its group, times the group's scale; without zero points
that is half of what the bits hold. The lowest bits come first, AWQ's columns in the order of
`AWQ_ORDER`. `g_idx` is the group of each input. GPTQ's first format stores zero points less one.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from jaxcp.weights.formats import FLOATS, GROUPS, PACKED, Packed, Shape, halves

AWQ_ORDER = 0, 2, 4, 6, 1, 3, 5, 7
WORD = 32
WORDS, INDICES = ("I32", "U32"), ("I32", "I64")
Read = Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Integers(Packed):
    """A tensor `[out, in]` of integers of `bits`; `order` is its `g_idx`, `sizes` its shape.

    `along`: "in" where an int32 holds values of one output, "out" where those of one input, "awq"
    in AWQ's order. `offset` is added to zero points as they are stored. `has_zeros`: in memory they
    lie beside int4 values, which else are less them.
    """

    bits: int = 4
    along: str = "in"
    order: str | None = None
    sizes: str | None = None
    offset: int = 0
    has_zeros: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        return (*super().parts, *(name for name in (self.order, self.sizes) if name))

    def kept(self, read: Read) -> "Integers | None":
        """The tensor as it can stay in memory: 4 bits where they have a form for groups, else 8.

        None where groups are no runs of inputs, or values less zero points need more than 8 bits.
        """
        if not self._is_ordered(read):
            return None
        is_middle = self.zero is None or (self._zeros(read) == self._middle).all()
        options = {"int4": self.bits == 4, "int8": self.bits == 4 or is_middle}
        for format in (name for name, fits in options.items() if fits):
            found = dataclasses.replace(
                self, format=format, zero=None if is_middle else self.zero, order=None,
                has_zeros=format == "int4" and not is_middle,
            )  # fmt: skip
            if found.group:
                return found
        return None

    @property
    def _middle(self) -> int:
        """The code of zero where there are no zero points."""
        return 1 << self.bits - 1

    @property
    def group(self) -> int:
        """The inputs that share a scale in memory, which repeats coarser scales; 0 where it has no
        form for them."""
        summed, group = self.shape[1], self.block[1]
        if group == summed and not self.is_halves:
            return group
        return next((n for n in GROUPS if group % n == 0), 0)

    def dtype(self, read: Read) -> np.dtype:
        """The dtype of values in memory, of two together where they have 4 bits."""
        del read
        return np.dtype(np.int8)

    def values(self, read: Read) -> np.ndarray:
        """Read the values, of `shape`: int8, or as int4 their codes in two's complement."""
        if self.is_halves:
            return self._codes(read) ^ 8  # less 8, which is the middle
        return self._signed(read).astype(np.int8)

    def zeros(self, read: Read) -> np.ndarray:
        """Read what is taken from int4 values, int8 `[out, groups]`."""
        if self.zero is None:
            return np.zeros((self.shape[0], self.shape[1] // self.block[1]), np.int8)
        return (self._zeros(read) - self._middle).astype(np.int8)

    def scales(self, read: Read) -> np.ndarray:
        """Read the scales, float32 `[out, groups]`."""
        stored = read(self.scale).astype(np.float32)
        stored = stored if self.along == "in" else stored.T
        rows, columns = self.shape[0], self.shape[1] // self.block[1]
        return np.broadcast_to(stored.reshape(-1, columns), (rows, columns))

    def unpacked(self, read: Read) -> np.ndarray:
        """Widen to float32: values times scales."""
        return self._signed(read) * self._of_inputs(self.scales(read), read)

    def _codes(self, read: Read) -> np.ndarray:
        """The values as they are stored, uint8 `[out, in]`."""
        words = read(self.name)
        if self.along == "in":
            return _codes(words, self.bits)[:, : self.shape[1]]
        if self.along == "out":
            return _codes(words.T, self.bits)
        return _in_order(_codes(words, self.bits)).T

    def _signed(self, read: Read) -> np.ndarray:
        codes = self._codes(read).astype(np.int16)
        if self.zero is None:
            return codes - np.int16(self._middle)
        return codes - self._of_inputs(self._zeros(read), read)

    def _zeros(self, read: Read) -> np.ndarray:
        """The zero points, int16 `[out, groups]`."""
        words = read(str(self.zero))
        if self.along == "in":
            return _codes(words.T, self.bits).T[: self.shape[0]].astype(np.int16)
        codes = _codes(words, self.bits)
        codes = (_in_order(codes) if self.along == "awq" else codes).T.astype(np.int16)
        return (codes + self.offset) & ((1 << self.bits) - 1)

    def _of_inputs(self, of_groups: np.ndarray, read: Read) -> np.ndarray:
        """Spread `[out, groups]` over the inputs."""
        if self.order is None:
            return of_groups.repeat(self.block[1], 1)
        order = read(self.order)
        if order.min() < 0 or order.max() >= of_groups.shape[1]:
            raise ValueError(
                f"{self.order} needs groups from 0 to {of_groups.shape[1] - 1}; it has "
                f"{order.min()} to {order.max()}. Copy the checkpoint again"
            )
        return of_groups[:, order]

    def _is_ordered(self, read: Read) -> bool:
        """Tell whether groups are runs of inputs, one after another."""
        summed, group = self.shape[1], self.block[1]
        if self.order is None:
            return True
        return np.array_equal(read(self.order), np.arange(summed) // group)


def alike(tensors: Iterable[Packed]) -> list[Packed]:
    """The tensors in one form: of 8 bits where not all integers are of 4, with zero points where
    one of them has some."""
    every = list(tensors)
    integers = [x for x in every if isinstance(x, Integers)]
    if not integers or len(integers) < len(every):
        return every
    has_zeros = any(x.has_zeros for x in integers)
    formats = {x.format for x in integers}
    if formats == {"int4"}:
        return [dataclasses.replace(x, has_zeros=has_zeros) for x in integers]
    return [dataclasses.replace(x, format="int8", has_zeros=False) for x in integers]


def find(
    shapes: Mapping[str, Shape], dtypes: Mapping[str, str], read: Read, offset: int | None
) -> tuple[dict[str, Integers], dict[str, str]]:
    """Find tensors by the names of their weights, and those that lack a part, with a word on it.

    `offset`: what config.json says is to be added to GPTQ's zero points; None if it does not say.
    """
    packed, lacking = {}, {}
    for name, dtype in dtypes.items():
        stem = name.removesuffix("qweight")
        weight = name.removesuffix(PACKED) if name.endswith(PACKED) else f"{stem}weight"
        if dtype not in WORDS or weight == name or len(shapes[name]) != 2:
            continue
        if name.endswith(PACKED):
            tensor = _compressed(name, weight, shapes, dtypes, read)
        elif stem != name:
            tensor = _grouped(name, stem, shapes, dtypes, offset)
        else:
            continue
        if weight in dtypes:
            lacking[name] = f"{dtype} {shapes[name]} beside {weight}, which is the same weight"
        elif isinstance(tensor, str):
            lacking[name] = f"{dtype} {shapes[name]}: {tensor}"
        else:
            packed[weight] = tensor
    return packed, lacking


def _compressed(name, weight, shapes, dtypes, read) -> Integers | str:
    """A tensor in compressed-tensors' pack-quantized, or what is wrong with it."""
    scale, sizes = f"{weight}_scale", f"{weight}_shape"
    is_whole = dtypes.get(scale) in FLOATS and dtypes.get(sizes) in INDICES
    if not is_whole or shapes[sizes] != (2,):
        return f"needs {scale} of floats and {sizes} of two integers"
    out, summed = (int(n) for n in read(sizes))
    rows, words = shapes[name]
    fitting = [n for n in (4, 8) if words == -(-summed * n // WORD)]
    grid = (rows, 1) if shapes[scale] in ((), (1,), (rows,)) else shapes[scale]
    fits = summed > 0 and out == rows == grid[0] and len(grid) == 2 and len(fitting) == 1
    if not fits or not grid[1] or summed % grid[1]:
        return f"of {sizes} ({out}, {summed}), with {scale} {shapes[scale]}: no known format"
    (bits,) = fitting
    zero = _present(f"{weight}_zero_point", dtypes)
    order = _present(f"{weight}_g_idx", dtypes)
    points = WORDS, (-(-rows * bits // WORD), grid[1])
    for part, (kinds, shape) in ((zero, points), (order, (INDICES, (summed,)))):
        if part and (dtypes[part] not in kinds or shapes[part] != shape):
            return f"with {part} {dtypes[part]} {shapes[part]}: no known format"
    return Integers(
        f"int{bits}", name, (rows, summed), (1, summed // grid[1]), scale,
        zero=zero, bits=bits, order=order, sizes=sizes,
    )  # fmt: skip


def _grouped(name, stem, shapes, dtypes, offset) -> Integers | str:
    """A tensor in GPTQ's or AWQ's format, or what is wrong with it."""
    scale, zero, order = f"{stem}scales", f"{stem}qzeros", _present(f"{stem}g_idx", dtypes)
    if dtypes.get(scale) not in FLOATS or dtypes.get(zero) not in WORDS:
        return f"needs {scale} of floats and {zero} of integers"
    if order and (dtypes[order] not in INDICES or len(shapes[order]) != 1):
        return f"with {order} {dtypes[order]} {shapes[order]}: no known format"
    (tall, wide), grid = shapes[name], shapes[scale]
    groups, out = grid if len(grid) == 2 else (0, 0)
    along = "out" if order else "awq"
    summed = shapes[order][0] if order else tall
    bits = tall * WORD // max(summed, 1) if order else 4
    words = (summed * bits // WORD, out) if order else (summed, out * bits // WORD)
    is_whole = groups and summed % groups == 0 and bits in (4, 8) and out * bits % WORD == 0
    if not is_whole or (tall, wide) != words or shapes[zero] != (groups, out * bits // WORD):
        return f"with {scale} {grid}, {zero} {shapes[zero]} and no other order: no known format"
    if order and offset is None:
        return (
            "of GPTQ, needs a quantization_config of quant_method gptq with its checkpoint_format"
        )
    return Integers(
        f"int{bits}", name, (out, summed), (1, summed // groups), scale,
        zero=zero, bits=bits, along=along, order=order, offset=offset if order else 0,
    )  # fmt: skip


def _present(name: str, dtypes: Mapping[str, str]) -> str | None:
    return name if name in dtypes else None


def _codes(words: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned integers of `bits` in the int32 along the last axis, the lowest first."""
    raw = np.ascontiguousarray(words).view(np.uint8)
    return halves(raw) if bits == 4 else raw


def _in_order(codes: np.ndarray) -> np.ndarray:
    """Codes along the last axis out of the order that AWQ has them in."""
    whole = codes.reshape(*codes.shape[:-1], -1, len(AWQ_ORDER))
    return whole[..., np.argsort(AWQ_ORDER)].reshape(codes.shape)
