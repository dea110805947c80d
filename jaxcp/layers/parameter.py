# SPDX-License-Identifier: Apache-2.0
"""Parameters with named axes."""

import jax
import jax.numpy as jnp
from flax import nnx


class RouterBias(nnx.Variable):
    """The selection bias of a router: moved by load, never by a gradient."""


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> nnx.Param:
    """A float32 parameter drawn from a normal distribution."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


def constant(shape: tuple[int, ...], axes: tuple[str, ...], value: float) -> nnx.Param:
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)
