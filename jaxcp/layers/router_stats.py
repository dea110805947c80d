# SPDX-License-Identifier: Apache-2.0
"""Statistics of routers over a batch, on all devices, for losses, balance and records.

Pads do not count. A statistic that nobody reads is dead code under jit, and is not computed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxcp.layers.routing import Routing
from pallas_kernels import PAD_POSITION


class RouterStats(NamedTuple):
    """Statistics of one router `[...]`, or of a model's MoE layers `[L, ...]`, MTP layers last.

    Choices are counted in integers, which sum to the same on every mesh and in any number of
    pieces, as long as a batch has less than 2**31 tokens. `probabilities` and `z` have a gradient.
    """

    counts: Int[Array, "*L E"]
    """Choices that fell on each expert."""
    probabilities: Float[Array, "*L E"]
    """The mean over tokens of `Routing.probabilities`."""
    z: Float[Array, "*L"]
    """The mean over tokens of `logsumexp(logits) ** 2`."""
    flips: Int[Array, "*L"]
    """Choices of an expert that the same scores without the selection bias would not have chosen;
    0 where there is no such bias."""

    @property
    def load(self) -> Float[Array, "*L E"]:
        """The fraction of choices that fell on each expert; 0 where there are none."""
        counts = jnp.asarray(self.counts, jnp.float32)
        return counts / jnp.maximum(counts.sum(-1, keepdims=True), 1)

    def balance_loss(self) -> Float[Array, ""]:
        """`E * sum_e load_e * probabilities_e`, the mean over layers: 1 where both are even.

        The gradient goes through the probabilities. Experts that a table of token ids has chosen
        count in the value and have no gradient. Source: Switch Transformers (arXiv
        2101.03961), over the whole batch. transformers' Qwen3-MoE lets the load sum to k, so its
        value is k times this one, and takes the means over all layers together.
        """
        load = lax.stop_gradient(self.load)
        return (load.shape[-1] * (load * self.probabilities).sum(-1)).mean()

    def z_loss(self) -> Float[Array, ""]:
        """`z`, the mean over layers. Source: ST-MoE (arXiv 2202.08906)."""
        return self.z.mean()


def stacked(layers: Sequence[RouterStats | None]) -> RouterStats | None:
    """Stack the statistics of the layers that have a router; None without any."""
    routed = [stats for stats in layers if stats is not None]
    return jax.tree.map(lambda *x: jnp.stack(x), *routed) if routed else None


def joined(first: RouterStats | None, then: RouterStats | None) -> RouterStats | None:
    """Join two stacks of layers, one after the other."""
    if first is None or then is None:
        return then if first is None else first
    return jax.tree.map(lambda *x: jnp.concatenate(x), first, then)


def router_stats(
    logits: Float[Array, "M E"],
    chosen: Int[Array, "M k"],
    unbiased: Int[Array, "M k"] | None,
    positions: Int[Array, "*B"] | None,
    routing: Routing,
    axes: tuple[str, ...],
) -> RouterStats:
    """Compute the statistics of local tokens, summed over the devices along `axes`.

    With `axes`, runs inside shard_map. `unbiased`: the choice without the selection bias; None if
    it is `chosen`.
    """
    m, experts = logits.shape
    real = jnp.ones((m,), bool) if positions is None else positions.reshape(m) != PAD_POSITION
    number = jnp.where(real[:, None], chosen, experts)
    sizes = jnp.bincount(number.reshape(-1), length=experts + 1)[:experts]
    flips = jnp.int32(0)
    if unbiased is not None:
        kept = (chosen[:, :, None] == unbiased[:, None, :]).any(-1)
        flips = (real[:, None] & ~kept).sum()
    here = real[:, None].astype(jnp.float32)
    probabilities = (here * routing.probabilities(logits)).sum(0)
    z = (here[:, 0] * jax.nn.logsumexp(logits, axis=-1) ** 2).sum()
    total = sizes, probabilities, z, flips, real.sum()
    if axes:
        # one by one: those that nobody reads are not sent
        total = tuple(lax.psum(x, axes) for x in total)
    sizes, probabilities, z, flips, tokens = total
    tokens = jnp.maximum(tokens, 1).astype(jnp.float32)
    return RouterStats(sizes, probabilities / tokens, z / tokens, flips)
