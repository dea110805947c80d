# SPDX-License-Identifier: Apache-2.0
"""Weights that lie in parts over devices with other tokens, and are gathered where they are read.

Fully sharded data parallelism (FSDP, stage 3 of ZeRO, arXiv 1910.02054): a block gathers its own
weights when it begins, so that a device holds those of one layer at a time. The backward pass
gathers them again, and what a gradient sums over devices leaves only a device's part.
"""

import re
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxcp.layers.stack import InStack, axes_of, is_stacked
from jaxcp.sharding import Rules

WHOLE = "whole"
"""The metadata of a weight in parts: its `PartitionSpec` once gathered, of one layer."""

IN_BLOCKS = re.compile(r"layers\.|mtp\.block\.")
"""Names of weights that a block reads, and no other part of a model."""


def gathered_late(model: Any, rules: Rules, dtype: DTypeLike) -> Any:
    """Make a model, whose weights lie in parts, gather them: its blocks their own, the rest now.

    Args:
      rules: what a weight is gathered to.
      dtype: of the model's computation, which is sent instead of float32 where nothing else is
        read.
    """

    def one(path, variable):
        if not isinstance(variable, nnx.Param):
            return variable
        spec = rules.spec(axes_of(variable))
        if not IN_BLOCKS.match(jax.tree_util.keystr(path, simple=True, separator=".")):
            return _whole(variable, spec, dtype)
        late = variable.copy()
        late.set_metadata(**{WHOLE: P(*spec[1:]) if is_stacked(variable) else spec})
        return late

    return jax.tree_util.tree_map_with_path(one, model, is_leaf=_is_variable)


@jax.named_scope("gather")
def gathered(block: Any, dtype: DTypeLike) -> Any:
    """The block with all of its weights whole; the block itself where they are."""

    def one(variable):
        spec = variable.get_metadata().get(WHOLE) if isinstance(variable, nnx.Param) else None
        return variable if spec is None else _whole(variable, spec, dtype)

    return jax.tree.map(one, block, is_leaf=_is_variable)


def lies_in_parts(module: Any) -> bool:
    """Tell whether `gathered` would gather weights of the module."""
    variables = jax.tree.leaves(module, is_leaf=_is_variable)
    return any(isinstance(x, nnx.Param) and WHOLE in x.get_metadata() for x in variables)


def _whole(variable: nnx.Param, spec: P, dtype: DTypeLike) -> nnx.Variable:
    value = variable.get_value()
    if isinstance(value, InStack):
        value = value.copy()
    if _is_factor(variable):
        value = value.astype(dtype)
    return variable.replace(jax.sharding.reshard(value, spec))


def _is_factor(variable: nnx.Param) -> bool:
    """Tell whether a weight is read in the dtype of the computation alone, as a factor of products.

    Of a table the rows are taken, whose gradients are summed in float32.
    """
    return "summed" in variable.get_metadata() or axes_of(variable)[1:] == ("vocab",)


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)
