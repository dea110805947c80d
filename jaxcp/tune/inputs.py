# SPDX-License-Identifier: Apache-2.0
"""Fills the arguments of a program, so that it can be timed on a device that is there."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np


def fill(fn, args: tuple, seed: int = 0) -> list[jax.Array]:
    """Make arrays of the shapes and dtypes of `args`, by the names of `fn`'s parameters.

    Positions count up, a query of the decode program stands at the cache's end, there is one
    segment, every group has as many rows; all else is random.
    """
    names = list(inspect.signature(fn).parameters)
    names = (names + [names[-1]] * len(args))[: len(args)]  # *scales are two or none
    random = np.random.default_rng(seed)
    longest = max(math.prod(x.shape) for x in args if x.dtype == jnp.int32)

    def one(name, x):
        if name in ("positions", "kv_positions"):
            values = np.broadcast_to(np.arange(x.shape[1]), x.shape)
        elif name == "q_positions":
            values = np.full(x.shape, longest - 1)
        elif name == "segments":
            values = np.zeros(x.shape)
        elif name == "sizes":
            values = np.full(x.shape, args[0].shape[0] // x.shape[0])
        elif name in ("lse", "scales"):
            values = np.full(x.shape, math.log(longest))
        elif jnp.issubdtype(x.dtype, jnp.integer):
            values = random.integers(-127, 128, x.shape)
        else:
            values = random.standard_normal(x.shape, np.float32)
        return jnp.asarray(values).astype(x.dtype)

    return [one(name, x) for name, x in zip(names, args, strict=True)]
