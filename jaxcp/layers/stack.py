# SPDX-License-Identifier: Apache-2.0
"""Layers alike are one program: blocks of one structure are stacked, and scanned.

Blocks that follow each other, or come round with a period (window, window, full), lie in one block
whose arrays have a leading axis of layers. The name of such a stack is the slice of its layers,
`1:80` or `2:60:3`; a block that is like no other keeps its number. So the names of arrays say where
they belong: row 4 of `layers.1:80.attention.q` is `layers.5.attention.q`.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxcp.layers.router_stats import RouterStats, joined

AXIS = "layers"
"""The logical axis of a stack."""


def layers_in(name: str) -> range:
    """The numbers of the layers in a stack: `2:60:3` has 2, 5, ..., 59; `7` is one block alone."""
    start, *rest = map(int, name.split(":"))
    return range(start, *rest) if rest else range(start, start + 1)


def is_stack(name: str) -> bool:
    """Tell whether arrays under this name have the leading axis."""
    return ":" in name


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InStack:
    """The weights of one layer where they lie in a stack: who reads few of them copies none.

    What takes such a value says so (`nnx.Param(..., in_stack=True)`); others get a copy.
    """

    stack: Any
    """`[L, ...]`, an array or what else a variable holds."""
    layer: jax.Array
    """An int32 scalar."""

    def copy(self) -> Any:
        """The layer's weights by themselves."""
        return jax.tree.map(
            lambda x: lax.dynamic_index_in_dim(x, self.layer, 0, keepdims=False), self.stack
        )


class Layers(nnx.Module):
    """The blocks of a model, `Layers([Block(...), ...])`; `layers[i]` is a copy of one of them."""

    def __init__(self, blocks: Sequence[nnx.Module]):
        for name in stack_names([_structure(block) for block in blocks]):
            members = [blocks[i] for i in layers_in(name)]
            setattr(self, name, _stacked(members) if is_stack(name) else members[0])

    @property
    def names(self) -> list[str]:
        """The stacks, by their first layer."""
        own = (name for name in vars(self) if name[0].isdigit())
        return sorted(own, key=lambda name: layers_in(name).start)

    @property
    def stacks(self) -> list[Any]:
        """The blocks as they lie: arrays of a stack have a leading axis of layers."""
        return [getattr(self, name) for name in self.names]

    def __len__(self) -> int:
        return sum(len(layers_in(name)) for name in self.names)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        i = range(len(self))[i]
        name = next(name for name in self.names if i in layers_in(name))
        block = getattr(self, name)
        return _member(block, layers_in(name).index(i)) if is_stack(name) else block

    def run(self, call: Callable, x: Any, attend: Any) -> tuple[Any, RouterStats | None]:
        """Pass `x` through every layer; `(x, what the routers did)`.

        Args:
          call: `call(block, x, attend) -> (x, stats)`, one layer.
          attend: `Attend` of all layers (`jaxcp.attention.attend`).
        """
        stats = None
        for names in self._turns():
            with jax.named_scope("layers." + "+".join(names)):
                x, of_these = self._run(names, call, x, attend)
            stats = joined(stats, of_these)
        return x, stats

    def _turns(self) -> Iterator[list[str]]:
        """Stacks that take turns with each other, together."""
        names = self.names
        while names:
            period = layers_in(names[0]).step if is_stack(names[0]) else 1
            yield names[:period]
            names = names[period:]

    def _run(self, names, call, x, attend):
        blocks = [getattr(self, name) for name in names]
        if not is_stack(names[0]):
            here = attend.of(attend.kept(names[0]), 0)
            x, stats = call(blocks[0], x, here)
            attend.keep(names[0], here.state)
            return x, None if stats is None else jax.tree.map(lambda s: s[None], stats)

        # a gradient would be as large as the stack in every layer
        sliced, rejoined = zip(*(_cut(block, attend.keeps_rows) for block in blocks), strict=True)

        def period(carry, layer):
            x, kept = carry
            number, rows = layer
            after, of_period = [], []
            for join, row, state in zip(rejoined, rows, kept, strict=True):
                block = join(row, number)
                here = attend.of(state, number)
                x, stats = call(block, x, here)
                after.append(here.state)
                of_period += [] if stats is None else [stats]
            stats = jax.tree.map(lambda *s: jnp.stack(s), *of_period) if of_period else None
            return (x, after), stats

        count = len(layers_in(names[0]))
        kept = [attend.kept(name) for name in names]
        (x, kept), stats = lax.scan(period, (x, kept), (jnp.arange(count), sliced))
        for name, state in zip(names, kept, strict=True):
            attend.keep(name, state)
        return x, jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), stats)


def stack_names(structures: Sequence[Any]) -> list[str]:
    """Names of the stacks for layers of these structures; equal ones may share a stack.

    From the first layer on, the period that covers most layers wins; of those, the shortest.
    """
    names, start, end = [], 0, len(structures)
    while start < end:
        covered, period = max(
            ((period * _rounds(structures, start, period), period) for period in range(1, end)),
            key=lambda choice: (choice[0], -choice[1]),
            default=(0, 1),
        )
        if not covered:
            names.append(str(start))
            start += 1
            continue
        stop, step = start + covered, f":{period}" * (period > 1)
        names += [f"{start + i}:{stop}{step}" for i in range(period)]
        start = stop
    return names


def _rounds(structures, start: int, period: int) -> int:
    """Count how often the `period` layers from `start` on come in a row; 0 where only once."""
    first = structures[start : start + period]
    if len(first) < period:
        return 0
    rounds = 1
    while structures[start + rounds * period :][:period] == first:
        rounds += 1
    return rounds if rounds > 1 else 0


def members(name: str) -> list[str]:
    """The name of each layer's array, of an array `name`: `layers.1:3.q` has `layers.1.q`, ...

    An array that is of no stack has its own name.
    """
    before, *stack = re.split(r"(?:^|\.)(\d+:\d+(?::\d+)?)\.", name)
    if not stack:
        return [name]
    layers, after = stack
    return [f"{before}.{i}.{after}" for i in layers_in(layers)]


def of_each_layer(model: nnx.Module) -> dict[str, nnx.Variable]:
    """The variables of a model without arrays, by name; of a stack those of each layer."""
    flat = nnx.to_flat_state(nnx.state(model))
    named = ((".".join(map(str, keys)), of_one_layer(leaf)) for keys, leaf in flat)
    return {member: leaf for name, leaf in named for member in members(name)}


def is_stacked(variable: nnx.Variable) -> bool:
    """Tell whether a variable has the leading axis of layers."""
    return axes_of(variable)[:1] == (AXIS,)


def of_one_layer(variable: nnx.Variable) -> nnx.Variable:
    """The variable, without arrays; of a stacked one that of a layer."""
    first = int(is_stacked(variable))
    value = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[first:], x.dtype), variable.get_value()
    )
    return with_axes(variable.replace(value), axes_of(variable)[first:])


def _structure(block: nnx.Module):
    leaves, tree = jax.tree.flatten(block)
    return tree, [(x.shape, x.dtype) for x in leaves]


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _stacked(blocks: Sequence[nnx.Module]) -> Any:
    def stack(*variables):
        value = jax.tree.map(lambda *x: jnp.stack(x), *(v.get_value() for v in variables))
        return with_axes(variables[0].replace(value), (AXIS, *axes_of(variables[0])))

    return jax.tree.map(stack, *blocks, is_leaf=_is_variable)


def _cut(block: nnx.Module, whole: bool):
    """`(variables, join)`: those of a stack that a scan slices, and what makes a block of a slice.

    Where `whole`, variables that say `in_stack` are none of them: the block gets them as `InStack`.
    """
    variables, tree = jax.tree.flatten(block, is_leaf=_is_variable)
    stays = [whole and v.get_metadata().get("in_stack", False) for v in variables]

    def join(rows, layer):
        rows = iter(rows)
        return jax.tree.unflatten(
            tree,
            [
                v.replace(InStack(v.get_value(), layer)) if own else next(rows)
                for v, own in zip(variables, stays, strict=True)
            ],
        )

    return [v for v, own in zip(variables, stays, strict=True) if not own], join


def _member(block: nnx.Module, row: int) -> Any:
    def pick(variable):
        value = jax.tree.map(lambda x: x[row], variable.get_value())
        return with_axes(variable.replace(value), axes_of(variable)[1:])

    return jax.tree.map(pick, block, is_leaf=_is_variable)


def axes_of(variable: nnx.Variable) -> tuple[str | None, ...]:
    """The logical axes of a variable; none where it names none."""
    return tuple(variable.get_metadata().get("axes") or ())


def with_axes(variable: nnx.Variable, axes: tuple[str | None, ...]) -> nnx.Variable:
    """A copy of the variable with these logical axes."""
    copy = variable.copy()
    copy.set_metadata(axes=axes)
    return copy
