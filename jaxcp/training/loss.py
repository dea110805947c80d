# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy in float32 that never holds `[B, T, V]`."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int


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
    walk = functools.partial(_walk, chunk=chunk)
    if jax.sharding.get_abstract_mesh().empty:
        return walk(x, head, targets, weights)

    def local(*operands):
        return jax.lax.psum(walk(*operands), ("data", "seq"))

    rows = P("data", "seq")
    return jax.shard_map(
        local, in_specs=(rows, P(), rows, rows), out_specs=(P(), P()), axis_names={"data", "seq"}
    )(x, head, targets, weights)


def _walk(x, head, targets, weights, *, chunk):
    tokens = targets.size
    chunk = min(chunk, tokens)
    count = -(-tokens // chunk)

    def cut(leaf):
        leaf = leaf.reshape(tokens, *leaf.shape[2:])
        pads = [(0, count * chunk - tokens)] + [(0, 0)] * (leaf.ndim - 1)
        return jnp.pad(leaf, pads).reshape(count, chunk, *leaf.shape[1:])

    head = head.astype(x.dtype)

    @jax.checkpoint
    def one(operands):
        hidden, target, weight = operands
        with jax.named_scope("head"):
            logits = jnp.einsum("td,dv->tv", hidden, head, preferred_element_type=jnp.float32)
        # Compare instead of gather: it fuses, and it holds where the vocabulary is sharded too.
        hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == target[:, None]
        picked = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        return jnp.sum(weight * (jax.nn.logsumexp(logits, axis=-1) - picked))

    with jax.named_scope("loss"):
        # A map, not a scan with a sum: a carry would have to be typed as varying over the mesh.
        losses = jax.lax.map(one, (cut(x), cut(targets), cut(weights)))
        return jnp.sum(losses), jnp.sum(weights)
