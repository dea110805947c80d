# SPDX-License-Identifier: Apache-2.0
"""A product with a layer's weight, which may be quantized."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxcp.layers.quantized import QuantizedLinear
from pallas_kernels import grouped_matmul


def linear(
    subscripts: str,
    x: Float[Array, "..."],
    weight: nnx.Param | Array | QuantizedLinear,
    out_sharding: P | None = None,
) -> Float[Array, "..."]:
    """`einsum(subscripts, x, weight)`, such as "btd,dnh->btnh", in x's dtype.

    Quantized weights are read as they lie in memory and never written widened. They sum over the
    weight's first axes, its others come last in the result.

    Raises:
      ValueError: subscripts of another form, for a quantized weight.
    """
    value = weight.get_value() if isinstance(weight, nnx.Variable) else weight
    if not isinstance(value, QuantizedLinear):
        return jnp.einsum(subscripts, x, value.astype(x.dtype), out_sharding=out_sharding)
    ours, axes, out = subscripts.replace("->", ",").split(",")
    summed, made = axes[: value.summed], axes[value.summed :]
    kept = "".join(axis for axis in ours if axis not in summed)
    if out != kept + made or not set(summed) <= set(ours) or len(axes) != value.ndim:
        raise ValueError(
            f"a quantized weight sums over its first {value.summed} axes, and its others come "
            f"last; got {subscripts}"
        )
    x = x.transpose([ours.index(axis) for axis in kept + summed])
    return _spread(x, value, out_sharding)


def _spread(x, weight: QuantizedLinear, out_sharding):
    """`x [..., *summed]` on the mesh in scope: each device multiplies what it has."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return _product(x, weight)
    specs = jax.tree.map(lambda part: jax.typeof(part).sharding.spec, weight)
    _, rows, columns = specs.matrix.values
    kept = x.ndim - weight.summed
    tokens = (*jax.typeof(x).sharding.spec, *[None] * x.ndim)[:kept]
    inputs = P(*tokens, rows, *[None] * (weight.summed - 1))
    outputs = P(*tokens, columns, *[None] * (weight.ndim - weight.summed - 1))

    def local(x, weight):
        y = _product(x, weight)
        return y if rows is None else lax.psum(y, rows)

    # check_vma=False: kernels say nothing of the axes that their results vary over
    run = jax.shard_map(local, in_specs=(inputs, specs), out_specs=outputs, check_vma=False)
    y = run(jax.sharding.reshard(x, inputs), weight)
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


def _product(x, weight: QuantizedLinear):
    """Whole, or a device's part of it: the axis that is split is the first of D or of F."""
    kept, matrix = x.shape[: x.ndim - weight.summed], weight.matrix
    rows = x.reshape(math.prod(kept), matrix.shape[1])
    sizes = jnp.full((1,), rows.shape[0], jnp.int32)
    y = grouped_matmul(rows, matrix, sizes)
    inner = weight.shape[weight.summed + 1 :]
    return y.reshape(*kept, matrix.shape[2] // math.prod(inner), *inner)
