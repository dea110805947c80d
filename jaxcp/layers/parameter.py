# SPDX-License-Identifier: Apache-2.0
"""Parameters with named axes."""

import jax
import jax.numpy as jnp
from flax import nnx


class RouterBias(nnx.Variable):
    """The selection bias of a router: moved by load, never by a gradient."""


class RouterTable(nnx.Variable):
    """A table of the experts of each token id, int32 `[vocab, k]`: made once, never changed."""


def normal(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float, **metadata
) -> nnx.Param:
    """A float32 parameter drawn from a normal distribution.

    `summed=n`: the parameter may be quantized, see `jaxcp.layers.quantized`.
    """
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, axes=axes, **metadata)


def constant(
    shape: tuple[int, ...], axes: tuple[str | None, ...], value: float, **metadata
) -> nnx.Param:
    """A float32 parameter. With `keep_float32=True` no cast of a model's parameters touches it."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes, **metadata)
