# SPDX-License-Identifier: Apache-2.0
"""Makes quantized leaves of a checkpoint's quantized tensors; they stay quantized in memory."""

import jaxcp.flax_version  # noqa: F401  (before flax)

# isort: split
import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxcp.layers.quantized import (
    as_leaf,
    can_be_quantized,
    matrix_spec,
    misfit,
    of_experts,
    partition,
)
from jaxcp.models.weight_table import Piece, Row, Source, in_layers
from jaxcp.sharding import Rules, sharding_of
from jaxcp.weights.files import Checkpoint
from jaxcp.weights.formats import Packed
from jaxcp.weights.integers import Integers, alike
from jaxcp.weights.stream import stream
from pallas_kernels import Quantized
from pallas_kernels.grouped_matmul.quantized import BLOCK, PACKED, pack

E8M0 = ml_dtypes.float8_e8m0fnu

Make = Callable[[Packed, Callable[[str], np.ndarray]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Part:
    """A field of `Quantized`: its shape, and `make`, which computes it from the tensor `name`."""

    shape: tuple[int, ...]
    dtype: Any
    name: Callable[[Packed], str]
    make: Make


@dataclasses.dataclass(frozen=True)
class QuantizedSource:
    """The tensors of a quantized leaf, and the parts that they become on the mesh."""

    variable: nnx.Variable
    spec: P
    tensors: tuple[Packed, ...]
    parts: dict[str, _Part]
    packed: int
    read: Callable[[str], np.ndarray]

    @property
    def abstract(self) -> Any:
        return self.leaf(
            {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in self.parts.items()}
        )

    @property
    def shapes(self) -> dict[str, tuple]:
        """The shape and dtype of each part."""
        return {name: (part.shape, part.dtype) for name, part in self.parts.items()}

    @property
    def nbytes(self) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.abstract))

    def leaf(self, arrays: dict[str, Any]) -> Any:
        return as_leaf(self.variable, Quantized(**arrays, packed=self.packed))

    def pieces(self, name: str) -> Iterator[Piece]:
        part = self.parts[name]
        shape = (1, *part.shape[1:])
        for i, (tensor, read) in enumerate(self._matrices()):
            make = functools.partial(part.make, tensor, read)
            yield Piece(part.name(tensor), (i, 0, 0), shape, make)

    def _matrices(self) -> Iterator[tuple[Packed, Callable[[str], np.ndarray]]]:
        """Yield the matrices one at a time, also those that are stacked in one tensor."""
        for tensor in self.tensors:
            if len(tensor.shape) == 2:
                yield tensor, self.read
                continue
            for e in range(tensor.shape[0]):
                of_one = functools.partial(_at, self.read, tensor.second, e)
                yield dataclasses.replace(tensor, shape=tensor.shape[1:]), of_one


def quantized_source(
    variable: nnx.Variable, path: str, source: Source, checkpoint: Checkpoint, rules: Rules
) -> QuantizedSource | None:
    """The source of a quantized leaf; None if its tensors are plain or its layer cannot use them.

    Raises:
      ValueError: some of the leaf's tensors are quantized and others not, or in another format;
        or the mesh in scope does not divide the leaf, or cuts through values that share a scale.
    """
    stored = {**checkpoint.packed, **checkpoint.turned}
    packed = [stored.get(name) for name in source.names]
    kept = [x.kept(checkpoint.raw) for x in packed if x is not None]
    if None in kept:
        return None
    packed = alike(x for x in kept if x is not None) + [None] * packed.count(None)
    kinds = {x and _kind(x, checkpoint) for x in packed}
    if len(kinds) > 1:
        raise ValueError(
            f"needed {path} to be quantized in one way; its tensors {source.names[0]} ... are "
            f"{', '.join(sorted(str(kind) for kind in kinds))}"
        )
    tensors = tuple(x for x in packed if x is not None)
    layout = _Layout.of(variable, path, source)
    if layout is not None and source.names[0] in checkpoint.turned:
        layout = dataclasses.replace(layout, flip=not layout.flip)
    if not tensors or layout is None or (tensors[0].is_halves and not layout.flip):
        return None
    if not layout.can_cut(tensors[0]):
        return None
    spec, mesh = sharding_of(variable, rules), jax.sharding.get_abstract_mesh().shape
    e, d, f = matrix_shape(variable)
    _, *axes = spec if of_experts(variable) else matrix_spec(
        tuple(variable.shape), variable.get_metadata()["summed"], spec
    )  # fmt: skip
    tall, wide = (mesh.get(axis, 1) for axis in axes)
    halves = math.gcd(d // tall, PACKED) if tensors[0].is_halves else 0
    parts = _parts(tensors[0], layout, (e, d, f), halves, f // wide, checkpoint)
    result = QuantizedSource(variable, spec, tensors, parts, halves, checkpoint.raw)
    if problem := misfit(result.abstract, spec, dict(mesh)):
        raise ValueError(f"needed a mesh that divides {path} {problem}")
    return result


def _kind(tensor: Packed, checkpoint: Checkpoint) -> str:
    """Name what the tensors of a leaf have in common: the dtype of scales too, if they keep it."""
    rows, columns = tensor.block
    name = f"{tensor.format} with a scale for {rows} x {columns}"
    if not tensor.is_halves and not isinstance(tensor, Integers):
        return name
    dtype = checkpoint.raw(tensor.scale).dtype
    return f"{name} in {np.dtype(np.uint8) if dtype == E8M0 else dtype}"


def _parts(first: Packed, layout, shape, halves: int, width: int, checkpoint) -> dict[str, _Part]:
    """The fields of a leaf of matrices `shape [E, D, F]`, of which a device has `width` columns."""
    e, d, f = shape
    rows = -(-d // layout.of_rows(first.block))
    name, scale = (lambda x: x.name), (lambda x: x.scale)
    stored = first.dtype(checkpoint.raw)
    if halves:
        repacked = functools.partial(layout.repacked, halves)
        parts = {"values": _Part((e, d // 2, f), stored, name, repacked)}
    else:
        parts = {"values": _Part(shape, stored, name, layout.values)}
    if isinstance(first, Integers):
        kind = checkpoint.raw(first.scale).dtype
        kind = kind if kind == ml_dtypes.bfloat16 else np.dtype(np.float32)
        rows = d // first.group
        parts["scales"] = _Part((e, rows, f), kind, scale, functools.partial(layout.grouped, kind))
        if first.has_zeros:
            zeros = functools.partial(layout.grouped, np.dtype(np.int8))
            parts["zeros"] = _Part(
                (e, rows, f), np.dtype(np.int8), lambda x: x.zero or x.scale, zeros
            )
        return parts
    in_blocks, whole = first.format == "fp8_block", layout.cuts_between(first)
    if in_blocks and whole and (d % BLOCK or width == f or width % BLOCK == 0):
        columns = -(-f // layout.of_columns(first.block))
        parts["scales"] = _Part((e, rows, columns), np.dtype(np.float32), scale, layout.blocks)
    elif in_blocks or first.format in ("int8", "fp8"):
        parts["scales"] = _Part((e, rows, f), np.dtype(np.float32), scale, layout.scales)
    else:
        kind = checkpoint.raw(first.scale).dtype
        kind = np.dtype(np.uint8) if kind == E8M0 else kind
        parts["scales"] = _Part((e, rows, f), kind, scale, layout.raw_scales)
    if first.second is not None:
        parts["channel_scales"] = _Part(
            (e, 1, f), np.dtype(np.float32), lambda x: x.second or x.scale, layout.whole
        )
    return parts


def _at(read, whole, e, name):
    return read(name) if name == whole else read(name)[e]


def summed_axis(variable: nnx.Variable, path: str, source: Source) -> int | None:
    """The axis of a leaf's tensors that a product sums over, -2 or -1.

    None where the leaf cannot be quantized from such tensors.
    """
    layout = _Layout.of(variable, path, source)
    return None if layout is None else -1 if layout.flip else -2


def matrix_shape(variable: nnx.Variable) -> tuple[int, int, int]:
    """`[E, D, F]` of a leaf that can be quantized; E is 1 for a linear layer."""
    first, summed = of_experts(variable), variable.get_metadata()["summed"]
    shape, middle = tuple(variable.shape), first + summed
    sizes = shape[:first], shape[first:middle], shape[middle:]
    return tuple(int(np.prod(size)) for size in sizes)  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The order of a leaf's axes D and F in a tensor, and the leaf's part of it."""

    flip: bool  # [out, in], as torch has it
    cut: slice  # the leaf's part of the tensor, along the outputs

    @classmethod
    def of(cls, variable: nnx.Variable, path: str, source: Source) -> "_Layout | None":
        if not can_be_quantized(variable):
            return None
        row = source.row
        outputs = _outputs(row, variable)
        if outputs is None or (len(source.leaves) > 1 and row.join != outputs):
            return None
        if row.turns > 1:  # no slice of the outputs: widened
            return None
        last = len(row.groups) - row.per_expert - 1
        alone = len(source.leaves) == 1
        place = source.place(path)
        assert isinstance(place, slice)
        return cls(outputs != last, slice(None) if alone else place)

    def of_rows(self, block):
        return block[1] if self.flip else block[0]

    def of_columns(self, block):
        return block[0] if self.flip else block[1]

    def cuts_between(self, tensor: Packed) -> bool:
        """Tell whether the leaf's part of the tensor begins and ends where blocks do."""
        size = tensor.shape[-2 if self.flip else -1]
        first, end, step = self.cut.indices(size)
        together = self.of_columns(tensor.block)
        return step == 1 and first % together == 0 and (end == size or end % together == 0)

    def can_cut(self, tensor: Packed) -> bool:
        """Tell whether the part's scales have a form in memory: of blocks, or one a column."""
        rows = tensor.shape[-1 if self.flip else -2]
        return tensor.format != "fp8_block" or rows % BLOCK == 0 or self.cuts_between(tensor)

    def _leaf(self, array, together: int = 1):
        """The leaf's part of an array of which an entry stands for so many columns."""
        if self.flip:
            array = array.swapaxes(-1, -2)
        first, end, step = self.cut.indices(array.shape[-1] * together)
        array = array[..., first // together : -(-end // together) : step]
        return array if array.ndim == 3 else array[None]

    def values(self, tensor: Packed, read):
        return self._leaf(tensor.values(read))

    def repacked(self, packed: int, tensor: Packed, read):
        """Halves of bytes as `Quantized` has them."""
        codes = tensor.values(read).reshape(tensor.shape)
        return pack(self._leaf(codes), packed).view(tensor.dtype(read))

    def grouped(self, kind, tensor: Packed, read):
        """The scales of integers, or as int8 their zero points, one for each group in memory."""
        assert isinstance(tensor, Integers)
        stored = tensor.zeros(read) if kind == np.int8 else tensor.scales(read)
        return self._leaf(stored.repeat(tensor.block[1] // tensor.group, 1).astype(kind))

    def blocks(self, tensor: Packed, read):
        return self._leaf(tensor.scales(read), self.of_columns(tensor.block))

    def raw_scales(self, tensor: Packed, read):
        scales = read(tensor.scale)
        return self._leaf(scales.view(np.uint8) if scales.dtype == E8M0 else scales)

    def whole(self, tensor: Packed, read):
        e, f = tensor.shape[:-2], tensor.shape[-2 if self.flip else -1]
        scale = tensor.whole(read).reshape(())
        return self._leaf(np.broadcast_to(scale, (*e, f, 1) if self.flip else (*e, 1, f)))

    def scales(self, tensor: Packed, read):
        """The scales, one for each column."""
        scales, outputs = tensor.scales(read), -2 if self.flip else -1
        size, block = tensor.shape[outputs], self.of_columns(tensor.block)
        return self._leaf(scales.repeat(block, outputs).take(range(size), outputs))


def _outputs(row: Row, variable: nnx.Variable) -> int | None:
    """The index of a tensor's axis F, where D is its other one; None if its axes are others."""
    axes, first = row.leaf_axes.split(), int(of_experts(variable))
    middle = first + variable.get_metadata()["summed"]
    groups = row.groups[row.per_expert :]
    sums, makes = [axes[first:middle]], [axes[middle:]]
    lead = [axes[:1]] if first and not row.per_expert else []
    if groups == lead + makes + sums:
        return len(lead)
    return len(lead) + 1 if groups == lead + sums + makes else None


def stackable(sources: Iterable[QuantizedSource | None]) -> list[QuantizedSource]:
    """The sources of a stack's layers if they make one leaf: all quantized, in one way. Else
    none."""
    every = [source for source in sources]
    own = [source for source in every if source is not None]
    alike = {(source.packed, str(source.shapes)) for source in own}
    return own if len(own) == len(every) and len(alike) == 1 else []


def stream_quantized(
    sources: Sequence[QuantizedSource],
    counted: Callable[[Iterable[Piece], int], Iterable[Piece]],
    *,
    stacked: bool,
) -> tuple[Any, collections.Counter]:
    """Read the leaf onto the mesh in scope, and count the NaN and Inf of each tensor.

    `sources`: of each layer where the leaf is `stacked`, else one.
    """
    first = sources[0]
    specs = partition(first.abstract, first.spec)
    specs = specs if of_experts(first.variable) else specs.matrix
    arrays: dict[str, Any] = {}
    nonfinite: collections.Counter = collections.Counter()
    for name, part in first.parts.items():
        spec, shape = getattr(specs, name), part.shape
        pieces = (source.pieces(name) for source in sources)
        if stacked:
            spec, shape = P(None, *spec), (len(sources), *shape)
        joined = in_layers(pieces) if stacked else next(pieces)
        sharding = None
        if not jax.sharding.get_abstract_mesh().empty:
            sharding = jax.NamedSharding(jax.sharding.get_mesh(), spec)
        arrays[name], of_part = stream(
            counted(joined, part.dtype.itemsize), shape, part.dtype, sharding
        )
        nonfinite.update(of_part)
        if name == "scales" and part.dtype == np.uint8:
            for source in sources:
                for tensor in source.tensors:
                    exponents = source.read(tensor.scale).view(np.uint8)
                    nonfinite[tensor.scale] += int((exponents == 255).sum())
    return first.leaf(arrays), +nonfinite
