# SPDX-License-Identifier: Apache-2.0
"""Puts the parameters of a model on the mesh in scope, or says why they do not fit."""

import math
from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx

from jaxcp.layers.quantized import misfit, partition
from jaxcp.sharding import DEFAULT, Rules, sharding_of


def parts_of(variable: nnx.Variable, rules: Rules = DEFAULT) -> Any:
    """`sharding_of`, of each part of what the parameter holds where that is quantized."""
    return partition(variable.get_value(), sharding_of(variable, rules))


def indivisible(leaves: Iterable[tuple[str, nnx.Variable]], rules: Rules = DEFAULT) -> str | None:
    """Say which parameter the mesh in scope does not divide, and which sizes of the axis divide
    all of them; None where there is no mesh, or every parameter fits."""
    mesh = dict(jax.sharding.get_abstract_mesh().shape)
    first: dict[str, str] = {}
    sizes: dict[str, set[int]] = {axis: set() for axis in mesh}
    for name, leaf in leaves:
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
    """The model with every parameter on the mesh in scope (unchanged where there is none).

    Args:
      rules: which axes lie where. With `jaxcp.Rules(experts="seq")` (or "data") experts lie on
        the devices that hold the sequence, and tokens travel to them.
    Raises:
      ValueError: two axes of a parameter over one mesh axis; a width that its mesh axis does not
        divide, and which sizes of the axis would; or an axis that cuts through what
        shares a scale, all of those listed.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return model
    leaves, tree = jax.tree_util.tree_flatten_with_path(
        model, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    named = [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
    if problem := indivisible(named, rules):
        raise ValueError(f"the mesh does not divide: {problem}")
    if problems := [x for name, leaf in named if (x := _misfit(name, leaf, mesh, rules))]:
        raise ValueError("the mesh does not divide: " + "; ".join(problems))
    placed = [jax.device_put(leaf.get_value(), parts_of(leaf, rules)) for _, leaf in leaves]
    new = [leaf.replace(value) for (_, leaf), value in zip(leaves, placed, strict=True)]
    return jax.tree.unflatten(tree, new)


def _misfit(name, variable, mesh, rules):
    problem = misfit(variable.get_value(), sharding_of(variable, rules), dict(mesh.shape))
    return problem and f"{name} {problem}"
