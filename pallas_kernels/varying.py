# SPDX-License-Identifier: Apache-2.0
"""Arrays inside `shard_map`, and over which mesh axes they vary."""

import jax


def like(x, shape, dtype) -> jax.ShapeDtypeStruct:
    """An output of a kernel that varies over the axes that the input x varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def alike(*trees):
    """Let all arrays vary over the axes that any varies over.

    A gradient is then summed over the axes that only others vary over.
    """
    axes = [jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(trees)]
    every = frozenset().union(*axes)

    def one(x):
        missing = tuple(sorted(every - jax.typeof(x).manual_axis_type.varying))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, trees)
