# SPDX-License-Identifier: Apache-2.0
"""Places of the arrays of a state: cut over `data` and `seq` too, by the stages of ZeRO.

Source: Rajbhandari et al., ZeRO (arXiv 1910.02054).
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from jaxcp.layers.stack import AXIS
from jaxcp.sharding import REPLICAS, Rules, over_replicas

Specs = dict[str, P]


class Places(NamedTuple):
    """The `PartitionSpec`s of the learnt parameters, by name."""

    params: Specs
    """Specs of the parameters of a state."""
    updated: Specs
    """Specs of gradients, of what an optimizer keeps of each parameter, and of its updates."""


def places(
    zero: int,
    rules: Rules,
    axes: Mapping[str, tuple[str | None, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    mesh: Mapping[str, int],
) -> Places:
    """Say where parameters lie on a mesh: at stage 0 as layers compute with them.

    Args:
      zero: the stage, `TrainConfig.zero`.
      axes, shapes: logical axes and shape of every parameter (`training.step.skeleton`).
      mesh: sizes of the axes; empty without a mesh.
    """
    whole = {name: rules.spec(axes[name]) for name in axes}
    if not zero or not mesh:
        return Places(whole, whole)
    parts = {
        name: over_replicas(spec, shapes[name], mesh, stacked=axes[name][:1] == (AXIS,))
        for name, spec in whole.items()
    }
    return Places(parts if zero == 3 else whole, parts)


def laid(tree: dict[str, jax.Array], specs: Specs) -> dict[str, jax.Array]:
    """Reshard arrays by name; the dict itself without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return {name: jax.sharding.reshard(x, specs[name]) for name, x in tree.items()}


def in_words(state: Mapping[str, Any], specs: Iterable[P], mesh: Mapping[str, int]) -> str:
    """Describe in a line what a device holds of a state.

    Args:
      specs: `Places.updated`.
    """
    arrays = jax.tree.leaves(state)
    here = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)
    over = [axis for axis in REPLICAS if mesh[axis] > 1]
    whole = [spec for spec in specs if not {*over} <= {*jax.tree.leaves(tuple(spec))}]
    said = f"state: {here:,} bytes a device of {sum(x.nbytes for x in arrays):,}"
    return said + f"; {len(whole)} parameters not cut over {' and '.join(over)}" * bool(over)
