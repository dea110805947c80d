# SPDX-License-Identifier: Apache-2.0
"""The rows of a family's weight table, in both directions. Knows no files, no devices.

A row names a checkpoint tensor, its axes, the leaf of our model, and that leaf's axes:

    Row("h.{i}.attn.q.weight", "(n h) d", "layers.{i}.attention.q", "d n h")

`{i}` is a layer. `{e}` is an expert: one tensor each, stacked on a leading axis `e`. Several names
are aliases: all are read, the first is written unless the checkpoint that was read had another.
Several paths lie side by side in one tensor along its axis `join`, or take turns on it: entry by
entry where `interleaved`, in as many equal parts of each as `turns` says. An axis `1` of a tensor
is of size one. Of several rows that fit a leaf (number of axes included), the same holds.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    names: str | tuple[str, ...]
    axes: str
    paths: str | tuple[str, ...]
    leaf_axes: str
    join: int = 0
    interleaved: bool = False
    turns: int = 1
    stored_as: str | None = None
    """Format of the tensor where it is not the leaf's: tables of integers, int64 in files."""

    @property
    def all_names(self) -> tuple[str, ...]:
        return (self.names,) if isinstance(self.names, str) else self.names

    @property
    def all_paths(self) -> tuple[str, ...]:
        return (self.paths,) if isinstance(self.paths, str) else self.paths

    @property
    def per_expert(self) -> bool:
        return "{e}" in self.all_names[0]

    @property
    def groups(self) -> list[list[str]]:
        """The axes of the tensor (a stack of experts, where `{e}`), each as the leaf axes in it."""
        axes = re.findall(r"\(([^)]*)\)|(\S+)", self.axes)
        groups = [[a for a in (inner or single).split() if a != "1"] for inner, single in axes]
        return [["e"], *groups] if self.per_expert else groups

    def to_tensor(self, leaf: np.ndarray) -> np.ndarray:
        sizes = dict(zip(self.leaf_axes.split(), leaf.shape, strict=True))
        order = [self.leaf_axes.split().index(axis) for group in self.groups for axis in group]
        return leaf.transpose(order).reshape(self._tensor_shape(sizes))

    def to_leaf(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        sizes = dict(zip(self.leaf_axes.split(), shape, strict=True))
        axes = [axis for group in self.groups for axis in group]
        split = tensor.reshape([sizes[axis] for axis in axes])
        return split.transpose([axes.index(axis) for axis in self.leaf_axes.split()])

    def tensor_shape(self, leaf_shape: Shape) -> Shape:
        return self._tensor_shape(dict(zip(self.leaf_axes.split(), leaf_shape, strict=True)))

    def _tensor_shape(self, sizes: Mapping[str, int]) -> Shape:
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.groups)


@dataclasses.dataclass(frozen=True)
class Piece:
    """The part of a leaf that one tensor holds: `shape` values from `start` on."""

    name: str
    start: Shape
    shape: Shape
    values: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Source:
    """A row at one layer: the tensors of the checkpoint, their shape, the leaves they hold."""

    row: Row
    pattern: str  # of the names: the one of the row's that was chosen
    names: tuple[str, ...]  # one; or one an expert
    shape: Shape  # of each
    leaves: tuple[tuple[str, Shape], ...]

    def pieces(self, path: str, tensor: Callable[[str], np.ndarray]) -> Iterator[Piece]:
        """Yield what each tensor has of the leaf at `path`, from `tensor(name)`."""
        shape = dict(self.leaves)[path]
        if not self.row.per_expert:
            yield Piece(self.names[0], (0,) * len(shape), shape, lambda: self._read(path, tensor))
            return
        axis = self.row.leaf_axes.split().index("e")
        extent = tuple(1 if i == axis else size for i, size in enumerate(shape))
        for e, name in enumerate(self.names):
            start = tuple(e if i == axis else 0 for i in range(len(shape)))
            of_one = functools.partial(self._read, path, lambda name: tensor(name)[None], name)
            yield Piece(name, start, extent, of_one)

    def _read(self, path, tensor, name=None):
        """A view of `tensor(name)`, which is whole but for its experts, as the leaf has it."""
        name = self.names[0] if name is None else name
        whole, shape = tensor(name), dict(self.leaves)[path]
        index: list[Any] = [slice(None)] * whole.ndim
        index[self._join] = self.place(path)
        if self.row.per_expert:
            axes = self.row.leaf_axes.split()
            shape = tuple(1 if a == "e" else n for a, n in zip(axes, shape, strict=True))
        return self.row.to_leaf(whole[tuple(index)], shape)

    def place(self, path: str) -> slice | np.ndarray:
        """Find the leaf at `path` on the axis that leaves share."""
        paths = [leaf_path for leaf_path, _ in self.leaves]
        place = paths.index(path)
        if self.row.interleaved:
            return slice(place, None, len(paths))
        sizes = [size // self.row.turns for size in self._sizes]
        here = slice(sum(sizes[:place]), sum(sizes[: place + 1]))
        if self.row.turns == 1:
            return here
        return np.arange(sum(self._sizes)).reshape(self.row.turns, -1)[:, here].reshape(-1)

    @property
    def _sizes(self) -> list[int]:
        """The part that each leaf has of the axis that they share."""
        return [self.row.tensor_shape(shape)[self._join] for _, shape in self.leaves]

    def write(self, leaf: Callable[[str], np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        """`(name, tensor)` for every tensor, from `leaf(path)`."""
        parts = [self.row.to_tensor(leaf(path)) for path, _ in self.leaves]
        whole = np.concatenate(parts, self._join)
        if self.row.interleaved:
            whole = np.stack(parts, self._join + 1).reshape(whole.shape)
        elif self.row.turns > 1:
            cut = [np.split(part, self.row.turns, self._join) for part in parts]
            whole = np.concatenate([x for turn in zip(*cut, strict=True) for x in turn], self._join)
        if self.row.stored_as is not None:
            whole = whole.astype(self.row.stored_as)
        yield from zip(self.names, whole if self.row.per_expert else [whole], strict=True)

    @property
    def _join(self) -> int:
        return self.row.join + self.row.per_expert


def in_layers(layers: Iterable[Iterable[Piece]]) -> Iterator[Piece]:
    """Pieces of a stack of leaves, `[L, ...]`, from those of each layer in turn."""

    def stacked(piece):
        return piece.values()[None]

    for i, pieces in enumerate(layers):
        for piece in pieces:
            values = functools.partial(stacked, piece)
            yield Piece(piece.name, (i, *piece.start), (1, *piece.shape), values)


def sources(
    table: Sequence[Row],
    leaves: Mapping[str, Shape],
    available: Iterable[str] | None = None,
    *,
    spelling: Iterable[str] = (),
) -> dict[str, Source]:
    """For every leaf of a model (`layers.0.mlp.up` -> shape) where its values are.

    Chooses among rows and aliases by the names that are `available`, or by patterns of names that
    an earlier choice had (`spelling`); where none fits, the first.

    Raises:
      ValueError: the table has no row for a leaf.
    """
    present, patterns = frozenset(available or ()), frozenset(spelling)
    chosen = {}
    for path in leaves:
        options = [source for row in table for source in _at(row, path, leaves)]
        if not options:
            raise ValueError(f"needed a row for the leaf {path} {leaves[path]}; the table has none")
        fitting = (
            source
            for source in options
            if source.pattern in patterns or not present.isdisjoint(source.names)
        )
        chosen[path] = next(fitting, options[0])
    return chosen


def spelling_of(chosen: Mapping[str, Source]) -> tuple[str, ...]:
    """List how the tensors of a checkpoint are named: a pattern for each kind of leaf."""
    return tuple(sorted({source.pattern for source in chosen.values()}))


def _at(row: Row, path: str, leaves: Mapping[str, Shape]) -> Iterator[Source]:
    """`row` for the layer that `path` is in, once for each alias; nothing if it does not fit."""
    for pattern in row.all_paths:
        match = re.fullmatch(re.escape(pattern).replace(r"\{i\}", r"(?P<i>\d+)"), path)
        if match and len(leaves[path]) == len(row.leaf_axes.split()):
            break
    else:
        return
    layer = match.groupdict().get("i")
    siblings = [p.replace("{i}", layer or "") for p in row.all_paths]
    if not all(sibling in leaves for sibling in siblings):
        return
    parts = tuple((sibling, leaves[sibling]) for sibling in siblings)
    shapes = [row.tensor_shape(shape) for _, shape in parts]
    join = row.join + row.per_expert
    shape = list(shapes[0])
    shape[join] = sum(s[join] for s in shapes)
    experts = range(shape.pop(0)) if row.per_expert else (0,)
    for name in row.all_names:
        names = tuple(name.replace("{i}", layer or "").replace("{e}", str(e)) for e in experts)
        yield Source(row, name, names, tuple(shape), parts)
