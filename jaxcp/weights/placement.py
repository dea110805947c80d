# SPDX-License-Identifier: Apache-2.0
"""Puts the parameters of a model on the mesh in scope, or says why they do not fit."""

import math
from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxcp.layers.quantized import misfit, partition
from jaxcp.layers.stack import is_stacked, of_one_layer
from jaxcp.sharding import DEFAULT, Rules, sharding_of


def parts_of(variable: nnx.Variable, rules: Rules = DEFAULT) -> Any:
    """`sharding_of` a parameter; of each of its parts where it is quantized."""
    one = of_one_layer(variable)
    parts = partition(one.get_value(), sharding_of(one, rules))
    return jax.tree.map(lambda spec: P(None, *spec), parts) if is_stacked(variable) else parts


def indivisible(leaves: Iterable[tuple[str, nnx.Variable]], rules: Rules = DEFAULT) -> str | None:
    """Say which parameter the mesh in scope does not divide, and which sizes of the axis divide
    all of them; None where there is no mesh, or every parameter fits."""
    mesh = dict(jax.sharding.get_abstract_mesh().shape)
    first: dict[str, str] = {}
    sizes: dict[str, set[int]] = {axis: set() for axis in mesh}
    for name, variable in leaves:
        leaf = of_one_layer(variable)
        logical = leaf.get_metadata().get("axes") or ()
        for size, kind, axis in zip(leaf.shape, logical, sharding_of(leaf, rules), strict=False):
            if axis is None or not mesh:
                continue
            if axis not in mesh:
                have = f"{axis}, and the mesh has {', '.join(mesh)}; make it with jaxcp.make_mesh"
                return f"{name}: its {kind} lie over {have}"
            sizes[axis].add(size)
            if size % mesh[axis]:
                text = f"{name} {tuple(leaf.shape)} by {axis}={mesh[axis]}: it has {size} {kind}"
                first.setdefault(axis, text)
    for axis, text in first.items():
        whole = math.gcd(*sizes[axis])
        fitting = [str(n) for n in range(1, whole + 1) if whole % n == 0]
        return f"{text}; the model can have {axis}={' or '.join(fitting)}"
    return None


def place(model: Any, *, rules: Rules = DEFAULT) -> Any:
    """Put every parameter of the model on the mesh in scope; without a mesh, return it unchanged.

    Args:
      rules: which axes lie where. With `jaxcp.Rules(experts="seq")` (or "data") experts lie on
        the devices that hold the sequence, and tokens travel to them.
    Raises:
      ValueError: a mesh axis does not divide a width (the error says which sizes would), or cuts
        through values that share a scale (the error lists all of them).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return model
    leaves, tree = check(model, rules)
    placed = [jax.device_put(leaf.get_value(), parts_of(leaf, rules)) for _, leaf in leaves]
    new = [leaf.replace(value) for (_, leaf), value in zip(leaves, placed, strict=True)]
    return jax.tree.unflatten(tree, new)


def check(model: Any, rules: Rules) -> tuple[list, jax.tree_util.PyTreeDef]:
    """Raise what `place` raises; the variables with their paths, and the tree of them."""
    mesh = jax.sharding.get_abstract_mesh()
    leaves, tree = jax.tree_util.tree_flatten_with_path(
        model, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    named = [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
    if problem := indivisible(named, rules):
        raise ValueError(f"the mesh does not divide: {problem}")
    misfits = [_misfit(name, leaf, mesh, rules) for name, leaf in named]
    problems = [problem for problem in misfits if problem]
    if problems:
        raise ValueError("the mesh does not divide: " + "; ".join(problems))
    return leaves, tree


def _misfit(name, variable, mesh, rules):
    one = of_one_layer(variable)
    problem = misfit(one.get_value(), sharding_of(one, rules), dict(mesh.shape))
    return problem and f"{name} {problem}"
