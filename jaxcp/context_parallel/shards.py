# SPDX-License-Identifier: Apache-2.0
"""Runs a function of local shards on global arrays."""

import jax
from jax.sharding import AxisType


def on_shards(local, in_specs, out_specs):
    """`local` on every device's shards, to which arguments are moved; itself without a mesh.

    A spec may stand for a tree of arrays. Where axes are not explicit, the compiler moves.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local
    # check_vma=False: interpreted Pallas kernels cannot say over which axes their results vary
    run = jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    if AxisType.Explicit not in mesh.axis_types:
        return run
    return lambda *arrays: run(*jax.sharding.reshard(arrays, in_specs))
