# SPDX-License-Identifier: Apache-2.0
"""One associative, NaN-free merge of partial softmax results `(out, lse)`."""

import jax.numpy as jnp


def merge(a, b):
    """Combine attention over two disjoint sets of keys.

    Each is `(out [..., H], lse [...])`; `(0, -inf)` is the neutral element. Out is float32 (or
    float64): partial results are never rounded on the way.
    """
    (out_a, lse_a), (out_b, lse_b) = a, b
    high = jnp.maximum(lse_a, lse_b)
    shift = jnp.where(jnp.isneginf(high), 0.0, high)
    weight_a, weight_b = jnp.exp(lse_a - shift), jnp.exp(lse_b - shift)
    total = weight_a + weight_b
    nothing = total == 0
    scale = 1 / jnp.where(nothing, 1.0, total)
    out = out_a * (weight_a * scale)[..., None] + out_b * (weight_b * scale)[..., None]
    return out, jnp.where(nothing, -jnp.inf, shift + jnp.log(jnp.where(nothing, 1.0, total)))


def merge_stacked(out, lse):
    """`merge` over axis 0 of stacked parts: out `[n, ..., H]`, lse `[n, ...]`."""
    high = lse.max(0)
    shift = jnp.where(jnp.isneginf(high), 0.0, high)
    weights = jnp.exp(lse - shift)
    total = weights.sum(0)
    nothing = total == 0
    safe = jnp.where(nothing, 1.0, total)
    out = (out * (weights / safe)[..., None]).sum(0)
    return out, jnp.where(nothing, -jnp.inf, shift + jnp.log(safe))
