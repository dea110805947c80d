# SPDX-License-Identifier: Apache-2.0
"""Matrices of a model, and Muon's step on them: each is whole on one device of a mesh.

Logical axes decide which matrix a weight is: its shape cannot (`q` and an expert's `gate` both have
three axes), nor its name (the `k` of an indexer has two axes, the `k` of attention three).
Source: Keller Jordan, github.com/KellerJordan/Muon.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxcp.sharding import names_of

Params = dict[str, jax.Array]
Axes = tuple[str | None, ...]

SIDES = (
    ("heads", "head_dim"),  # q [D, N, H] is the matrix [D, N*H], o [N, H, D] is [N*H, D]
    ("kv_heads", "head_dim"),
    ("group_heads", "head_dim"),
    ("index_heads", "head_dim"),
    ("head_groups", "latent"),
    ("window", "ngram"),  # the projection of an n-gram embedding, [W, C, D], is [W*C, D]
    ("parts", "embed"),
)
"""Pairs of axes that make one side of a matrix; every other axis is a side by itself."""

NUMBERED = ("experts", "choices", "head_groups", "vocab", "positions", "places", "mixes")
"""First axes that number matrices or vectors: `gate [E, D, F]` is a matrix for each expert."""

TABLES = ("vocab", "positions", "mixes")
"""Axes of `NUMBERED` whose vectors decay; those of the others are biases."""

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def sides(axes: Axes) -> tuple[int, list[int]]:
    """Count the leading axes that number matrices or vectors, and the axes of each side.

    A vector has one side, a matrix two, of which a product sums over the first.
    """
    if axes[:1] == ("layers",):
        numbered, lengths = sides(axes[1:])
        return numbered + 1, lengths
    numbered, lengths, at = 0, [], 0
    while at < len(axes):
        together = axes[at : at + 2] in SIDES
        if at == 0 and axes[0] in NUMBERED and not together:
            numbered = 1
        else:
            lengths.append(2 if together else 1)
        at += 2 if together else 1
    return numbered, lengths


def is_matrix(axes: Axes) -> bool:
    """Tell whether Muon takes a weight of these axes: a matrix, neither embedding nor head."""
    return "vocab" not in axes and len(sides(axes)[1]) == 2


def matrix_sizes(axes: Axes, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The number of matrices in a weight, their rows (summed over) and columns (written)."""
    numbered, (summed, _) = sides(axes)
    cut = numbered + summed
    return math.prod(shape[:numbered]), math.prod(shape[numbered:cut]), math.prod(shape[cut:])


def orthogonalize(updates: Params, axes: Mapping[str, Axes]) -> Params:
    """Bring the singular values of each matrix near 1, and multiply by sqrt(max(1, out / in)).

    On a mesh, matrices cut alike are dealt to all devices, a part of each for all parts of some,
    and the results are dealt back: a device sends twice what it holds of these updates, float32.
    Where all devices hold a matrix one of them takes it, and sends the result to all others.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _orthogonalize_parts(updates, axes, {name: P() for name in updates}, {})
    specs = {name: jax.typeof(x).sharding.spec for name, x in updates.items()}
    run = jax.shard_map(
        lambda parts: _orthogonalize_parts(parts, axes, specs, mesh.shape),
        in_specs=(specs,), out_specs=specs, check_vma=False,
    )  # fmt: skip
    return run(updates)


class _Cut(NamedTuple):
    """The part of matrices on a device, `[rows..., columns...]`, no more rows than columns."""

    shape: tuple[int, ...]
    over: tuple[tuple[str, ...], ...]
    """Mesh axes that cut each of `shape`."""
    numbered: tuple[str, ...]
    """Mesh axes along which devices hold different matrices."""
    rows: int
    """The number of the first axes that are rows."""

    def sizes(self, mesh: Mapping[str, int]) -> tuple[int, int]:
        """Count rows and columns of a whole matrix."""
        whole = [n * _parts(over, mesh) for n, over in zip(self.shape, self.over, strict=True)]
        return math.prod(whole[: self.rows]), math.prod(whole[self.rows :])


def _orthogonalize_parts(
    parts: Params, axes: Mapping[str, Axes], specs: Mapping[str, P], mesh: Mapping[str, int]
) -> Params:
    views = {name: _view(axes[name], x, specs[name], mesh) for name, x in parts.items()}
    alike: dict[_Cut, list[str]] = {}
    for name, (cut, *_) in views.items():
        alike.setdefault(cut, []).append(name)
    same: dict[tuple[int, int], list[_Cut]] = {}
    for cut in alike:
        same.setdefault(cut.sizes(mesh), []).append(cut)
    done: Params = {}
    for cuts in same.values():
        stacks = [jnp.concatenate([views[name][1] for name in alike[cut]]) for cut in cuts]
        hands = [_dealt(x, cut, mesh) for x, cut in zip(stacks, cuts, strict=True)]
        results = _split(_newton_schulz(jnp.concatenate(hands)), [len(x) for x in hands])
        for x, cut, stack in zip(results, cuts, stacks, strict=True):
            back = _dealt_back(x, cut, mesh)[: len(stack)]
            names = alike[cut]
            own = _split(back, [len(views[name][1]) for name in names])
            done |= {name: views[name].back(y) for name, y in zip(names, own, strict=True)}
    return {name: done[name] for name in parts}


class _View(NamedTuple):
    cut: _Cut
    stack: jax.Array
    """`[m, *cut.shape]`."""
    back: Callable[[jax.Array], jax.Array]
    """Makes of the orthogonalized stack the update of the weight."""


def _view(own: Axes, x: jax.Array, spec: P, mesh: Mapping[str, int]) -> _View:
    """View a device's part of a weight as parts of matrices."""
    numbered, (summed, _) = sides(own)
    entries = [*spec, *[None] * (x.ndim - len(spec))]
    over = [tuple(axis for axis in names_of(entry) if mesh[axis] > 1) for entry in entries]
    parts = [_parts(axes, mesh) for axes in over]
    whole = tuple(n * part for n, part in zip(x.shape, parts, strict=True))
    _, rows, columns = matrix_sizes(own, whole)
    first, second = (
        _merged(x.shape[a:b], over[a:b])
        for a, b in ((numbered, numbered + summed), (numbered + summed, x.ndim))
    )
    shapes = [shape for shape, _ in (*first, *second)]
    stack = x.reshape(-1, *shapes)
    turned = rows > columns
    if turned:
        stack = _turned(stack, len(first))
        first, second = second, first
    shape, cuts = zip(*first, *second, strict=True)
    different = tuple(axis for axes in over[:numbered] for axis in axes)
    scale = max(1.0, columns / rows) ** 0.5

    def back(y: jax.Array) -> jax.Array:
        y = _turned(y, len(first)) if turned else y
        return (scale * y).reshape(x.shape).astype(x.dtype)

    return _View(_Cut(shape, cuts, different, len(first)), stack, back)


def _merged(
    shape: tuple[int, ...], over: list[tuple[str, ...]]
) -> list[tuple[int, tuple[str, ...]]]:
    """Make one axis of the axes of a side; where a later one is cut parts do not lie in order."""
    if any(over[1:]):
        return list(zip(shape, over, strict=True))
    return [(math.prod(shape), over[0])]


def _turned(stack: jax.Array, rows: int) -> jax.Array:
    """Put the axes of columns before the first `rows` axes of matrices."""
    axes = range(1, stack.ndim)
    return stack.transpose(0, *axes[rows:], *axes[:rows])


def _dealt(stack: jax.Array, cut: _Cut, mesh: Mapping[str, int]) -> jax.Array:
    """Exchange parts of matrices `[m, *cut.shape]` for whole ones, `[ceil(m / devices), R, C]`."""
    rest = _rest(cut, mesh)
    hands = math.prod(_parts(axes, mesh) for axes in (*cut.over, rest))
    stack = jnp.pad(stack, ((0, -len(stack) % hands), *[(0, 0)] * len(cut.shape)))
    for i, axes in enumerate(cut.over):
        if axes:
            stack = _exchanged(stack.reshape(_parts(axes, mesh), -1, *stack.shape[1:]), axes)
            stack = jnp.moveaxis(stack, 0, 1 + i)
            stack = stack.reshape(*stack.shape[: 1 + i], -1, *stack.shape[3 + i :])
    if rest:
        own = len(stack) // _parts(rest, mesh)
        stack = jax.lax.dynamic_slice_in_dim(stack, jax.lax.axis_index(rest) * own, own)
    return stack.reshape(-1, *cut.sizes(mesh))


def _dealt_back(stack: jax.Array, cut: _Cut, mesh: Mapping[str, int]) -> jax.Array:
    """Exchange whole matrices for the parts that `_dealt` had."""
    sizes = zip(cut.shape, cut.over, strict=True)
    whole = [n * _parts(axes, mesh) for n, axes in sizes]
    stack = stack.reshape(-1, *whole)
    if rest := _rest(cut, mesh):
        stack = jax.lax.all_gather(stack, rest, tiled=True)
    for i, axes in reversed([*enumerate(cut.over)]):
        if axes:
            apart = stack.reshape(
                *stack.shape[: 1 + i], _parts(axes, mesh), -1, *stack.shape[2 + i :]
            )
            stack = _exchanged(jnp.moveaxis(apart, 1 + i, 0), axes)
            stack = stack.reshape(-1, *stack.shape[2:])
    return stack


def _exchanged(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Send `x[i]` to the device i of `axes`; what device i has sent is then `x[i]`."""
    # flat, because XLA's CPU compiler gives the operands of an array layouts that it then refuses
    return jax.lax.all_to_all(x.reshape(-1), axes, 0, 0, tiled=True).reshape(x.shape)


def _parts(axes: tuple[str, ...], mesh: Mapping[str, int]) -> int:
    return math.prod(mesh[axis] for axis in axes)


def _rest(cut: _Cut, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes whose devices all hold the same of these matrices."""
    used = {axis for axes in (*cut.over, cut.numbered) for axis in axes}
    return tuple(axis for axis, size in mesh.items() if size > 1 and axis not in used)


def _split(stack: jax.Array, lengths: list[int]) -> list[jax.Array]:
    return jnp.split(stack, [*itertools.accumulate(lengths)][:-1])


def _newton_schulz(x: jax.Array) -> jax.Array:
    """Run five steps of the quintic iteration on `[M, R, C]` with R <= C."""
    a, b, c = NEWTON_SCHULZ
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(5):
        gram = jnp.einsum("mrc,msc->mrs", x, x)
        x = a * x + jnp.einsum(
            "mrs,msc->mrc", b * gram + c * jnp.einsum("mrs,mst->mrt", gram, gram), x
        )
    return x
