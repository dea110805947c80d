# SPDX-License-Identifier: Apache-2.0
"""From the quantized tensors of a checkpoint to quantized leaves, which stay so in memory."""

import jaxcp.flax_version  # noqa: F401  (before flax)

# isort: split
import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
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
from jaxcp.models.weight_table import Piece, Row, Source
from jaxcp.sharding import Rules, sharding_of
from jaxcp.weights.files import Checkpoint
from jaxcp.weights.formats import Packed
from jaxcp.weights.stream import stream
from pallas_kernels.grouped_matmul.quantized import BLOCK, PACKED, Quantized, pack

E8M0 = ml_dtypes.float8_e8m0fnu

Make = Callable[[Packed, Callable[[str], np.ndarray]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Part:
    """A field of `Quantized`: what `make` takes out of the tensor that `name` says."""

    shape: tuple[int, ...]
    dtype: Any
    name: Callable[[Packed], str]
    make: Make


@dataclasses.dataclass(frozen=True)
class QuantizedSource:
    """Where the parts of a quantized leaf are, and with which shapes they will lie on the mesh."""

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
        """One at a time, also those that lie in one tensor."""
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
    """None where the leaf's tensors are plain, or its layer has no product for quantized ones.

    Raises:
      ValueError: some of the leaf's tensors are quantized and others not, or in another format;
        or the mesh in scope does not divide the leaf, or cuts through what shares a scale.
    """
    held = {**checkpoint.packed, **checkpoint.turned}
    packed = [held.get(name) for name in source.names]
    kinds = {x and (x.format, x.block) for x in packed}
    if len(kinds) > 1:
        raise ValueError(
            f"needed {path} to be quantized in one way; its tensors {source.names[0]} ... are "
            f"{', '.join(sorted(str(kind and kind[0]) for kind in kinds))}"
        )
    tensors = tuple(x for x in packed if x is not None)
    how = _Layout.of(variable, path, source)
    if how is not None and source.names[0] in checkpoint.turned:
        how = dataclasses.replace(how, flip=not how.flip)
    if not tensors or how is None or (tensors[0].is_halves and not how.flip):
        return None
    spec, mesh = sharding_of(variable, rules), jax.sharding.get_abstract_mesh().shape
    e, d, f = matrix_shape(variable)
    _, *axes = spec if of_experts(variable) else matrix_spec(
        tuple(variable.shape), variable.get_metadata()["summed"], spec
    )  # fmt: skip
    tall, wide = (mesh.get(axis, 1) for axis in axes)
    halves = math.gcd(d // tall, PACKED) if tensors[0].is_halves else 0
    parts = _parts(tensors[0], how, (e, d, f), halves, f // wide, checkpoint)
    found = QuantizedSource(variable, spec, tensors, parts, halves, checkpoint.raw)
    if problem := misfit(found.abstract, spec, dict(mesh)):
        raise ValueError(f"needed a mesh that divides {path} {problem}")
    return found


def _parts(first: Packed, how, shape, halves: int, width: int, checkpoint) -> dict[str, _Part]:
    """The fields of a leaf of matrices `shape`, of which a device has `width` columns."""
    e, d, f = shape
    rows = -(-d // how.of_rows(first.block))
    name, scale = (lambda x: x.name), (lambda x: x.scale)
    stored = checkpoint.raw(first.name).dtype
    if halves:
        repacked = functools.partial(how.repacked, halves)
        parts = {"values": _Part((e, d // 2, f), np.dtype(np.uint8), name, repacked)}
    else:
        parts = {"values": _Part(shape, stored, name, how.values)}
    in_blocks = first.format == "fp8_block"
    if in_blocks and (d % BLOCK or width == f or width % BLOCK == 0):
        columns = -(-f // how.of_columns(first.block))
        parts["scales"] = _Part((e, rows, columns), np.dtype(np.float32), scale, how.blocks)
    elif in_blocks or first.format in ("int8", "fp8"):
        parts["scales"] = _Part((e, rows, f), np.dtype(np.float32), scale, how.scales)
    else:
        kind = checkpoint.raw(first.scale).dtype
        kind = np.dtype(np.uint8) if kind == E8M0 else kind
        parts["scales"] = _Part((e, rows, f), kind, scale, how.raw_scales)
    if first.second is not None:
        parts["channel_scales"] = _Part(
            (e, 1, f), np.dtype(np.float32), lambda x: x.second or x.scale, how.whole
        )
    return parts


def _at(read, whole, e, name):
    return read(name) if name == whole else read(name)[e]


def summed_axis(variable: nnx.Variable, path: str, source: Source) -> int | None:
    """Which of the last two axes of a leaf's tensors is summed over, -2 or -1.

    None where the leaf cannot be quantized from such tensors.
    """
    how = _Layout.of(variable, path, source)
    return None if how is None else -1 if how.flip else -2


def matrix_shape(variable: nnx.Variable) -> tuple[int, int, int]:
    """`[E, D, F]` of a leaf that can be quantized; E is 1 for a linear layer."""
    first, summed = of_experts(variable), variable.get_metadata()["summed"]
    shape, middle = tuple(variable.shape), first + summed
    sizes = shape[:first], shape[first:middle], shape[middle:]
    return tuple(int(np.prod(size)) for size in sizes)  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How the last two axes of a tensor are the D and F of a leaf."""

    flip: bool  # [out, in], as torch has it
    cut: slice  # of the outputs: the leaf's part of the tensor

    @classmethod
    def of(cls, variable: nnx.Variable, path: str, source: Source) -> "_Layout | None":
        if not can_be_quantized(variable):
            return None
        row = source.row
        outputs = _outputs(row, variable)
        if outputs is None or (len(source.leaves) > 1 and row.join != outputs):
            return None
        last = len(row.groups) - row.per_expert - 1
        alone = len(source.leaves) == 1
        return cls(outputs != last, slice(None) if alone else source.place(path))

    def of_rows(self, block):
        return block[1] if self.flip else block[0]

    def of_columns(self, block):
        return block[0] if self.flip else block[1]

    def _leaf(self, array):
        if self.flip:
            array = array.swapaxes(-1, -2)
        array = array[..., self.cut]
        return array if array.ndim == 3 else array[None]

    def values(self, tensor: Packed, read):
        return self._leaf(read(tensor.name))

    def repacked(self, packed: int, tensor: Packed, read):
        """Halves of bytes as `Quantized` has them."""
        raw = read(tensor.name).view(np.uint8)
        codes = np.stack([raw & 15, raw >> 4], axis=-1).reshape(tensor.shape)
        return pack(self._leaf(codes), packed)

    def blocks(self, tensor: Packed, read):
        return self._leaf(tensor.scales(read))

    def raw_scales(self, tensor: Packed, read):
        found = read(tensor.scale)
        return self._leaf(found.view(np.uint8) if found.dtype == E8M0 else found)

    def whole(self, tensor: Packed, read):
        e, f = tensor.shape[:-2], tensor.shape[-2 if self.flip else -1]
        scale = read(tensor.second).astype(np.float32).reshape(())
        return self._leaf(np.broadcast_to(scale, (*e, f, 1) if self.flip else (*e, 1, f)))

    def scales(self, tensor: Packed, read):
        """One for each column."""
        found, outputs = tensor.scales(read), -2 if self.flip else -1
        size, block = tensor.shape[outputs], self.of_columns(tensor.block)
        return self._leaf(found.repeat(block, outputs).take(range(size), outputs))


def _outputs(row: Row, variable: nnx.Variable) -> int | None:
    """Which axis of a tensor is F, where D is the other one."""
    axes, first = row.leaf_axes.split(), int(of_experts(variable))
    middle = first + variable.get_metadata()["summed"]
    groups = row.groups[row.per_expert :]
    sums, makes = [axes[first:middle]], [axes[middle:]]
    lead = [axes[:1]] if first and not row.per_expert else []
    if groups == lead + makes + sums:
        return len(lead)
    return len(lead) + 1 if groups == lead + sums + makes else None


def stream_quantized(
    source: QuantizedSource, counted: Callable[[Iterable[Piece], int], Iterable[Piece]]
) -> tuple[Any, collections.Counter]:
    """The leaf on the mesh in scope, and how many values of which tensor are NaN or Inf."""
    specs = partition(source.abstract, source.spec)
    specs = specs if of_experts(source.variable) else specs.matrix
    arrays: dict[str, Any] = {}
    strange: collections.Counter = collections.Counter()
    for name, part in source.parts.items():
        sharding = None
        if not jax.sharding.get_abstract_mesh().empty:
            sharding = jax.NamedSharding(jax.sharding.get_mesh(), getattr(specs, name))
        pieces = counted(source.pieces(name), part.dtype.itemsize)
        arrays[name], of_part = stream(pieces, part.shape, part.dtype, sharding)
        strange.update(of_part)
        if name == "scales" and part.dtype == np.uint8:
            for tensor in source.tensors:
                strange[tensor.scale] += int(
                    (source.read(tensor.scale).view(np.uint8) == 255).sum()
                )
    return source.leaf(arrays), +strange
