# SPDX-License-Identifier: Apache-2.0
"""From the quantised tensors of a checkpoint to quantised leaves, which stay so in memory."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxcp.checkpoint_files import Checkpoint
from jaxcp.models.weight_table import Piece, Row, Source
from jaxcp.quantised import as_leaf, can_be_quantised, misfit, of_experts, partition
from jaxcp.quantised_files import Packed
from jaxcp.sharding import sharding_of
from jaxcp.streaming import stream
from pallas_kernels.grouped_matmul.quantised import Quantised

KEPT = ("int8", "fp8", "fp8_block")


@dataclasses.dataclass(frozen=True)
class QuantisedSource:
    """Where the parts of a quantised leaf are: `abstract` has their shapes."""

    variable: nnx.Variable
    abstract: Quantised
    pieces: dict[str, Callable[[], Iterator[Piece]]]

    @property
    def nbytes(self) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.abstract))


def quantised_source(
    variable: nnx.Variable, path: str, source: Source, checkpoint: Checkpoint
) -> QuantisedSource | None:
    """None where the leaf's tensors are plain, or its layer has no product for quantised ones.

    Raises:
      ValueError: some of the leaf's tensors are quantised and others not, or in another format.
    """
    packed = [checkpoint.packed.get(name) for name in source.names]
    kinds = {x and (x.format, x.block) for x in packed}
    if len(kinds) > 1:
        raise ValueError(
            f"needed {path} to be quantised in one way; its tensors {source.names[0]} ... are "
            f"{', '.join(sorted(str(kind and kind[0]) for kind in kinds))}"
        )
    tensors = [x for x in packed if x is not None]
    how = _Layout.of(variable, path, source)
    if not tensors or how is None or tensors[0].format not in KEPT:
        return None
    first = tensors[0]
    e, d, f = matrix_shape(variable)
    group, wide = how.of_rows(first.block), how.of_columns(first.block)
    shapes = {"values": (e, d, f), "scales": (e, -(-d // group), f)}
    if first.format == "fp8_block":
        shapes["scales"] = (e, -(-d // group), -(-f // wide))
    dtypes = {"values": checkpoint.stored[first.name].view().dtype, "scales": np.dtype("float32")}
    abstract: dict[str, Any] = {
        part: jax.ShapeDtypeStruct(shapes[part], dtypes[part]) for part in shapes
    }

    def pieces(part):
        make = how.values if part == "values" else how.scales
        each = (1, *shapes[part][1:]) if source.row.per_expert else shapes[part]
        for i, tensor in enumerate(tensors):
            name = tensor.name if part == "values" else tensor.scale
            yield Piece(name, (i, 0, 0), each, functools.partial(make, tensor, checkpoint.raw))

    return QuantisedSource(
        variable,
        Quantised(**abstract),
        {part: functools.partial(pieces, part) for part in shapes},
    )


def summed_axis(variable: nnx.Variable, path: str, source: Source) -> int | None:
    """Which of the last two axes of a leaf's tensors is summed over, -2 or -1.

    None where the leaf cannot be quantised from such tensors.
    """
    how = _Layout.of(variable, path, source)
    return None if how is None else -1 if how.flip else -2


def matrix_shape(variable: nnx.Variable) -> tuple[int, int, int]:
    """`[E, D, F]` of a leaf that can be quantised; E is 1 for a linear layer."""
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
        if not can_be_quantised(variable):
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

    def scales(self, tensor: Packed, read):
        found, outputs = tensor.scales(read), -2 if self.flip else -1
        if tensor.format == "fp8_block":
            return self._leaf(found)
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


def stream_quantised(
    name: str,
    source: QuantisedSource,
    experts: str,
    counted: Callable[[Iterable[Piece], int], Iterable[Piece]],
) -> tuple[Any, collections.Counter]:
    """The leaf on the mesh in scope, and how many values of which tensor are NaN or Inf.

    Raises:
      ValueError: the mesh does not divide it, or cuts through what shares a scale.
    """
    mesh, variable = jax.sharding.get_abstract_mesh(), source.variable
    spec, abstract = sharding_of(variable, experts), as_leaf(variable, source.abstract)
    if found := misfit(abstract, spec, dict(mesh.shape)):
        raise ValueError(f"needed a mesh that divides {name} {found}")
    specs = partition(abstract, spec)
    specs = specs if of_experts(variable) else specs.matrix
    arrays: dict[str, Any] = {}
    strange: collections.Counter = collections.Counter()
    for part, pieces in source.pieces.items():
        like = getattr(source.abstract, part)
        sharding = None
        if not mesh.empty:
            sharding = jax.NamedSharding(jax.sharding.get_mesh(), getattr(specs, part))
        arrays[part], of_part = stream(
            counted(pieces(), like.dtype.itemsize), like.shape, like.dtype, sharding
        )
        strange.update(of_part)
    return as_leaf(variable, Quantised(**arrays)), strange
