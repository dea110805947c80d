# SPDX-License-Identifier: Apache-2.0
"""From the logical axes of a parameter to mesh axes: one table, and what applies it."""

import jaxcp.flax_version  # noqa: F401  (before flax)

# isort: split
import math
from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxcp.quantised import misfit, partition

RULES: dict[str, str | None] = {
    "heads": "model",  # attention heads are independent until the output projection sums them
    "kv_heads": "model",
    "mlp": "model",  # feed-forward widths, of each expert too: summed by the down projection
    "embed": None,  # the residual stream is whole on every device, so norms need no communication
    "head_dim": None,
    "latent": None,  # narrow, and all heads read it
    "head_groups": "model",  # of an output projection through narrow middles: heads lie with theirs
    "group_heads": None,  # within such a group
    "index_heads": None,  # of an indexer: small, and every device scores for all its queries
    "vocab": None,  # the loss and the sampler read whole rows
    "experts": "expert",  # or another axis, see `place`: tokens travel to their experts
    "choices": None,  # a router's columns: every device chooses among all experts
    "positions": None,
    "window": None,  # of an n-gram embedding: small
    "ngram": None,
    "parts": None,  # what an MTP layer joins: embedding and state
    "places": None,  # of a token within its block
    "mixes": None,  # coefficients of hyper-connections
}


def sharding_of(variable: nnx.Variable, experts: str = "expert") -> P:
    """How a parameter lies on the mesh under `RULES`; replicated where it names no axes."""
    rules = RULES | {"experts": experts}
    axes = variable.get_metadata().get("axes") or ()
    return P(*(None if axis is None else rules[axis] for axis in axes))


def parts_of(variable: nnx.Variable, experts: str = "expert") -> Any:
    """`sharding_of`, of each part of what the parameter holds where that is quantised."""
    return partition(variable.get_value(), sharding_of(variable, experts))


def indivisible(leaves: Iterable[tuple[str, nnx.Variable]], experts: str = "expert") -> str | None:
    """Say which parameter the mesh in scope does not divide, and which sizes of the axis divide
    all of them; None where there is no mesh, or every parameter fits."""
    mesh = dict(jax.sharding.get_abstract_mesh().shape)
    first: dict[str, str] = {}
    sizes: dict[str, set[int]] = {axis: set() for axis in mesh}
    for name, leaf in leaves:
        logical = leaf.get_metadata().get("axes") or ()
        for size, kind, axis in zip(leaf.shape, logical, sharding_of(leaf, experts), strict=False):
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


def place(model: Any, *, experts: str = "expert") -> Any:
    """The model with every parameter on the mesh in scope (unchanged where there is none).

    Args:
      experts: the mesh axis over which the experts of MoE layers are spread. With "seq" (or
        "data") they lie on the devices that hold the sequence, and tokens travel to them.
    Raises:
      ValueError: a width that its mesh axis does not divide, and which sizes of the axis would;
        or an axis that cuts through what shares a scale, all of those listed.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return model
    leaves, tree = jax.tree_util.tree_flatten_with_path(
        model, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    named = [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
    if problem := indivisible(named, experts):
        raise ValueError(f"the mesh does not divide: {problem}")
    found = [_misfit(name, leaf, mesh, experts) for name, leaf in named]
    problems = [problem for problem in found if problem]
    if problems:
        raise ValueError("the mesh does not divide: " + "; ".join(problems))
    placed = [jax.device_put(leaf.get_value(), parts_of(leaf, experts)) for _, leaf in leaves]
    new = [leaf.replace(value) for (_, leaf), value in zip(leaves, placed, strict=True)]
    return jax.tree.unflatten(tree, new)


def _misfit(name, variable, mesh, experts):
    found = misfit(variable.get_value(), sharding_of(variable, experts), dict(mesh.shape))
    return found and f"{name} {found}"


def tokens_spec(x) -> P | None:
    """How the leading `[B, T]` of an explicit array lies on the mesh; None without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    spec = jax.typeof(x).sharding.spec
    return P(*(*spec, None, None)[:2])
