# SPDX-License-Identifier: Apache-2.0
"""Parameters with named axes."""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from jaxcp.sharding import Rules, over_replicas

_rules: contextvars.ContextVar[Rules | None] = contextvars.ContextVar("rules", default=None)


LANES = 8
"""The least of a part's last dimension: in narrower ones jax 0.12 draws other last bits on CPU."""


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
    key = rngs.params()
    sharding = None if isinstance(key, jax.core.Tracer) else _parts(shape, axes)
    value = _drawn(key, shape, std, sharding)
    return nnx.Param(value, axes=axes, **metadata)


def constant(
    shape: tuple[int, ...], axes: tuple[str | None, ...], value: float, **metadata
) -> nnx.Param:
    """A float32 parameter. With `keep_float32=True` no cast of a model's parameters touches it."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes, **metadata)


@contextlib.contextmanager
def drawn_in_parts(rules: Rules) -> Iterator[None]:
    """Let the devices of the mesh in scope draw their own parts of parameters, the same numbers.

    An array lies by the rules, and over `data` and `seq` too where these divide it: no device and
    no process ever holds a whole one.
    """
    token = _rules.set(rules)
    try:
        yield
    finally:
        _rules.reset(token)


def _parts(shape, axes) -> NamedSharding | None:
    """The sharding in which a parameter is drawn; None draws it whole."""
    rules = _rules.get()
    if rules is None or jax.sharding.get_mesh().empty:
        return None
    mesh = jax.sharding.get_mesh()
    spec = over_replicas(rules.spec(axes), shape, mesh.shape)
    for size, entry in zip(shape, spec, strict=False):
        names = entry if isinstance(entry, tuple) else (entry,) * (entry is not None)
        if size % math.prod(mesh.shape[name] for name in names):
            return None  # who places it says so
    if NamedSharding(mesh, spec).shard_shape(shape)[-1:] < (LANES,):
        return None
    return NamedSharding(mesh, spec)


def _drawn(key, shape, std, sharding):
    if sharding is None:
        return std * jax.random.normal(key, shape, jnp.float32)
    return _draw(shape, std, sharding)(np.asarray(jax.random.key_data(key)))


@functools.lru_cache(maxsize=256)
def _draw(shape, std, sharding):
    def draw(key):
        return std * jax.random.normal(jax.random.wrap_key_data(key), shape, jnp.float32)

    return jax.jit(draw, out_shardings=sharding)
