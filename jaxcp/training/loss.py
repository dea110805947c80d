# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy in float32 that never holds `[B, T, V]`."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxcp.layers.cross_entropy import walk
from jaxcp.sharding import gathered_beside


def chunked_cross_entropy(
    x: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int = 1024,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum the weighted losses (nats) and the weights, both in float32; divide them for the mean.

    Each shard of `data` and `seq` walks over its own tokens, `chunk` at a time, and computes the
    logits of a chunk again in the backward pass: `chunk x V` floats live at once instead of
    `B x T x V`. Operands keep the dtype of `x`; products are summed in float32. Targets below 0
    must have weight 0. Works with and without a mesh around it.
    """
    here = functools.partial(_sums, chunk=chunk)
    if jax.sharding.get_abstract_mesh().empty:
        return here(x, head, targets, weights)

    def local(*operands):
        return jax.lax.psum(here(*operands), ("data", "seq"))

    rows = P("data", "seq")
    head = gathered_beside(head, rows)
    return jax.shard_map(
        local, in_specs=(rows, P(), rows, rows), out_specs=(P(), P()), axis_names={"data", "seq"}
    )(x, head, targets, weights)


def _sums(x, head, targets, weights, *, chunk):
    losses = walk(x, head, targets, chunk=chunk)
    return jnp.sum(weights.reshape(-1) * losses), jnp.sum(weights)
