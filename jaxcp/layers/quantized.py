# SPDX-License-Identifier: Apache-2.0
"""Parameters that stay quantized: what a leaf holds then, and how its parts lie on a mesh.

Experts `[E, D, F]` are a `pallas_kernels.Quantized` as they are. A linear layer's weight of several
axes is one matrix, `QuantizedLinear`. A parameter that may be either says `summed=n`: how many of
its axes (after "experts") a product sums over, the first ones.
"""

import jaxcp.flax_version  # noqa: F401  (before flax)

# isort: split
import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxcp.layers.stack import axes_of, is_stacked, of_one_layer
from pallas_kernels import Quantized, dequantize, quantize
from pallas_kernels.grouped_matmul.quantized import BLOCK


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedLinear:
    """A weight of `shape` as one matrix `[1, D, F]`: its first `summed` axes are D, the rest F."""

    matrix: Quantized
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    summed: int = dataclasses.field(metadata={"static": True})

    @property
    def ndim(self) -> int:
        return len(self.shape)


def is_quantized(value: Any) -> bool:
    return isinstance(value, Quantized | QuantizedLinear)


def can_be_quantized(variable: nnx.Variable) -> bool:
    """Tell whether the layer that has this parameter knows what to do with a quantized one."""
    return "summed" in variable.get_metadata()


def of_experts(variable: nnx.Variable) -> bool:
    """Tell whether its first axis, after that of layers, is that of routed experts."""
    return "experts" in axes_of(variable)[: 1 + is_stacked(variable)]


def quantized_leaf(variable: nnx.Variable, value: Float[Array, "..."], **options: Any) -> Any:
    """`value` as `variable` holds it when quantized; `options` as `quantize` takes it."""
    one = of_one_layer(variable)

    def of_layer(value):
        return as_leaf(one, quantize(as_matrix(one, value), **options))

    return jax.vmap(of_layer)(value) if is_stacked(variable) else of_layer(value)


def as_matrix(variable: nnx.Variable, value: Any) -> Any:
    """`[E, D, F]`: the matrices that `value` is to `variable`'s layer; E is 1 for a linear one."""
    if of_experts(variable):
        return value
    summed = variable.get_metadata()["summed"]
    rows, columns = value.shape[:summed], value.shape[summed:]
    return value.reshape(1, math.prod(rows), math.prod(columns))


def as_leaf(variable: nnx.Variable, matrices: Quantized) -> Quantized | QuantizedLinear:
    """Make what `variable` holds for these `[E, D, F]`."""
    if of_experts(variable):
        return matrices
    return QuantizedLinear(matrices, tuple(variable.shape), variable.get_metadata()["summed"])


def widened(value: Any, dtype: Any = jnp.float32) -> Array:
    """The weights that a leaf stands for, in its own shape; an array is returned as it is."""
    if not is_quantized(value):
        return value
    matrices = value.matrix if isinstance(value, QuantizedLinear) else value
    if matrices.values.ndim == 4:  # of a stack of layers
        return jax.vmap(functools.partial(widened, dtype=dtype))(value)
    wide = dequantize(matrices, dtype)
    return wide.reshape(value.shape) if isinstance(value, QuantizedLinear) else wide


def quantized_model(model: Any, *, only: Literal["experts", "all"] = "all", **options: Any) -> Any:
    """The model with its experts, or every weight that its layers can use so, quantized.

    `options` as `pallas_kernels.quantize` takes it. Embeddings, the head, routers, norms and what a
    layer does not simply multiply by stay as they are.
    """

    def one(variable):
        if not can_be_quantized(variable) or (only == "experts" and not of_experts(variable)):
            return variable
        return variable.replace(quantized_leaf(variable, variable.get_value(), **options))

    return jax.tree.map(one, model, is_leaf=_is_variable)


def widened_model(model: Any, dtype: Any = jnp.float32) -> Any:
    """The model, of one device, with the weights that its quantized parameters stand for."""
    return jax.tree.map(lambda x: widened(x, dtype), model, is_leaf=is_quantized)


def quantized_names(model: Any) -> list[str]:
    """Paths of the parameters of a model that are quantized."""
    leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_variable)
    variables = [(path, leaf) for path, leaf in leaves if _is_variable(leaf)]
    named = [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in variables
    ]
    return [name for name, leaf in named if is_quantized(leaf.get_value())]


def partition(value: Any, spec: P) -> Any:
    """Specs of the parts of a leaf, that of its weights being `spec`; `spec` itself of an array."""
    if isinstance(value, QuantizedLinear):
        return dataclasses.replace(
            value, matrix=_parts(value.matrix, matrix_spec(value.shape, value.summed, spec))
        )
    return _parts(value, spec) if isinstance(value, Quantized) else spec


def matrix_spec(shape: tuple[int, ...], summed: int, spec: P) -> P:
    """The spec of `[1, D, F]`, where `spec` is that of the weight in its own shape."""
    full = (*spec, *[None] * (len(shape) - len(spec)))
    if any(axis for i, axis in enumerate(full) if i not in (0, summed)):
        raise NotImplementedError(
            f"a quantized weight {shape} can be split along its axes 0 and {summed}; got {spec}"
        )
    return P(None, full[0], full[summed])


def _parts(matrices: Quantized, spec: P) -> Quantized:
    def one(x):
        sizes = zip(x.shape, (*spec, *[None] * (3 - len(spec))), strict=True)
        return P(*(None if size == 1 else axis for size, axis in sizes))

    return jax.tree.map(one, matrices)


def misfit(value: Any, spec: P, sizes: dict[str, int]) -> str | None:
    """Say why a leaf cannot lie as `spec` on a mesh with axes of `sizes`; None where it can.

    A device's part begins where a scale begins.
    """
    matrices, at = value, P(*spec, *[None] * (3 - len(spec)))
    if isinstance(value, QuantizedLinear):
        matrices, at = value.matrix, matrix_spec(value.shape, value.summed, spec)
    for size, axis in zip(value.shape, spec, strict=False):
        if axis is not None and size % sizes.get(axis, 1):
            return f"{tuple(value.shape)} by {axis}={sizes[axis]}"
    if not is_quantized(value):
        return None
    _, d, f = matrices.shape
    group = 1 if matrices.scales.shape[1] == 1 else matrices.group
    wide = BLOCK if 1 < matrices.scales.shape[2] < f else 1
    for size, together, axis in ((d, max(group, matrices.packed), at[1]), (f, wide, at[2])):
        shards = sizes.get(axis, 1)
        if shards > 1 and size // shards % max(together, 1):
            fitting = [n for n in range(1, shards) if size % (n * together) == 0]
            return (
                f"{tuple(value.shape)}, of which {together} of {size} belong together, by "
                f"{axis}={shards} (at most {axis}={max(fitting, default=1)})"
            )
    return None


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)
