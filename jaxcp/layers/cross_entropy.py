# SPDX-License-Identifier: Apache-2.0
"""The loss of each token, in float32, without ever holding `[B, T, V]`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxcp.sharding import gathered_beside


def token_losses(
    x: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    *,
    chunk: int = 1024,
) -> Float[Array, "B T"]:
    """Compute the cross-entropy (nats) of every target; that of one below 0 means nothing.

    Each shard of `data` and `seq` walks over its own tokens, `chunk` at a time. Operands keep the
    dtype of `x`; products are summed in float32. Works with and without a mesh around it.
    """

    def local(x, head, targets):
        return walk(x, head, targets, chunk=chunk).reshape(targets.shape)

    if jax.sharding.get_abstract_mesh().empty:
        return local(x, head, targets)
    rows = P("data", "seq")
    return jax.shard_map(
        local, in_specs=(rows, P(), rows), out_specs=rows, axis_names={"data", "seq"}
    )(x, gathered_beside(head, rows), targets)


def losses_of_chunk(
    hidden: Float[Array, "T D"], targets: Int[Array, "T"], *, head: Float[Array, "D V"]
) -> Float[Array, "T"]:
    """Compute the losses of a chunk."""
    with jax.named_scope("head"):
        logits = jnp.einsum("td,dv->tv", hidden, head, preferred_element_type=jnp.float32)
    # Compare instead of gather: it fuses, and it holds where the vocabulary is sharded too.
    hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]
    picked = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


def walk(
    x: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    *,
    chunk: int,
    of: Callable = losses_of_chunk,
) -> Any:
    """Compute `of` the `N = B T` targets that are here, chunk by chunk: arrays `[N, ...]`.

    The backward pass computes the logits of a chunk again, so that `chunk x V` floats live at once.
    """
    tokens = targets.size
    chunk = min(chunk, tokens)
    count = -(-tokens // chunk)

    def cut(leaf):
        leaf = leaf.reshape(tokens, *leaf.shape[2:])
        pads = [(0, count * chunk - tokens)] + [(0, 0)] * (leaf.ndim - 1)
        return jnp.pad(leaf, pads).reshape(count, chunk, *leaf.shape[1:])

    one = jax.checkpoint(functools.partial(of, head=head.astype(x.dtype)))
    with jax.named_scope("loss"):
        found = jax.lax.map(lambda piece: one(*piece), (cut(x), cut(targets)))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:tokens], found)
