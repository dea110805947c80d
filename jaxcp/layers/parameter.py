# SPDX-License-Identifier: Apache-2.0
"""Parameters with named axes."""

import jax
import jax.numpy as jnp
from flax import nnx


class RouterBias(nnx.Variable):
    """The selection bias of a router: moved by load, never by a gradient."""


class RouterTable(nnx.Variable):
    """Which experts a token id goes to, int32 `[vocab, k]`: made once, never changed."""


def normal(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float, **metadata
) -> nnx.Param:
    """A float32 parameter drawn from a normal distribution.

    `summed=n`: it may be quantized, see `jaxcp.layers.quantized`.
    """
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, axes=axes, **metadata)


def constant(
    shape: tuple[int, ...], axes: tuple[str | None, ...], value: float, **metadata
) -> nnx.Param:
    """A float32 parameter. `keep_float32=True` says so to whoever casts a model's parameters."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes, **metadata)
