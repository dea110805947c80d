# SPDX-License-Identifier: Apache-2.0
"""The softmax of rows that arrive a block at a time: the maths that every kernel shares.

Scores are in log2 units inside a kernel (hardware has an exp2), log-sum-exps outside are natural.
Statistics keep the reduced axis, so that one code serves rows along lanes (TPU) and along
registers (Triton). Source: Milakov and Gimelshein (arXiv 1805.02867).
"""

import math

import jax
import jax.numpy as jnp

LOG2E = math.log2(math.e)


def dot(a, b, contract):
    """Contract `a` and `b` over one dimension of each, accumulated in float32.

    float32 means float32: a GPU would take TF32 and a TPU bfloat16, unless told.
    """
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=(exact, exact),
        preferred_element_type=jnp.float32,
    )


def scores(qk, scale, soft_cap):
    """Scores in log2 units from raw products, and the soft cap's slope (None without one)."""
    if soft_cap is None:
        return qk * (scale * LOG2E), None
    t = jnp.tanh(qk * (scale / soft_cap))
    return t * (soft_cap * LOG2E), 1 - t * t


def update(s, m, total, axis):
    """Take in a block of scores: `(p, alpha, m, total)`; what was summed before shrinks by `alpha`.

    `m` is the greatest score so far, `total` the sum of exponentials relative to it.
    """
    m_new = jnp.maximum(m, jnp.max(s, axis=axis, keepdims=True))
    # a row that has seen nothing yet has m = -inf: shift by 0, so that exp2(-inf) = 0 and not NaN
    shift = jnp.where(m_new == -jnp.inf, 0.0, m_new)
    p = jnp.exp2(s - shift)
    alpha = jnp.exp2(m - shift)
    return p, alpha, m_new, total * alpha + jnp.sum(p, axis=axis, keepdims=True)


def finish(m, total):
    """`(1 / total, lse)` of finished rows; `(0, -inf)` where nothing was seen."""
    any_key = total > 0
    safe = jnp.where(any_key, total, 1.0)
    lse = jnp.where(any_key, m * (1 / LOG2E) + jnp.log(safe), -jnp.inf)
    return jnp.where(any_key, 1 / safe, 0.0), lse


def backward_rows(lse, delta):
    """Prepare `lse`, in log2 units, and `delta`: 0 where a row saw nothing, as its p is anyway."""
    dead = jnp.isneginf(lse)
    return jnp.where(dead, 0.0, lse * LOG2E), jnp.where(dead, 0.0, delta)


def carried(out, lse):
    """The `(acc, m, total)` from which rows start, given their `(out, lse)` over other keys.

    `lse` is natural and keeps the reduced axis.
    """
    alive = lse > -jnp.inf
    return jnp.where(alive, out, 0.0), lse * LOG2E, jnp.where(alive, 1.0, 0.0)


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
