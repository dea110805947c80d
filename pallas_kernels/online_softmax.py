# SPDX-License-Identifier: Apache-2.0
"""The softmax of rows that arrive a block at a time: the maths that every kernel shares.

Scores are in log2 units inside a kernel (hardware has an exp2), log-sum-exps outside are natural.
Statistics keep the reduced axis, so that one code serves rows along lanes (TPU) and along
registers (Triton). Source: Milakov and Gimelshein (arXiv 1805.02867).
"""

import math

import jax.numpy as jnp

LOG2E = math.log2(math.e)


def scores(qk, scale, soft_cap):
    """Scores in log2 units from raw products, and the soft cap's slope (None without one)."""
    if soft_cap is None:
        return qk * (scale * LOG2E), None
    t = jnp.tanh(qk * (scale / soft_cap))
    return t * (soft_cap * LOG2E), 1 - t * t


def update(s, m, l, axis):
    """Take one block of scores in: `(p, alpha, m, l)`; what was accumulated shrinks by `alpha`."""
    m_new = jnp.maximum(m, jnp.max(s, axis=axis, keepdims=True))
    # a row that has seen nothing yet has m = -inf: shift by 0, so that exp2(-inf) = 0 and not NaN
    shift = jnp.where(m_new == -jnp.inf, 0.0, m_new)
    p = jnp.exp2(s - shift)
    alpha = jnp.exp2(m - shift)
    return p, alpha, m_new, l * alpha + jnp.sum(p, axis=axis, keepdims=True)


def finish(m, l):
    """`(1 / l, lse)` of finished rows; `(0, -inf)` where nothing was seen."""
    seen = l > 0
    safe = jnp.where(seen, l, 1.0)
    return jnp.where(seen, 1 / safe, 0.0), jnp.where(
        seen, m * (1 / LOG2E) + jnp.log(safe), -jnp.inf
    )


def backward_rows(lse, delta):
    """`lse` in log2 units and `delta`, both finite where a row saw nothing: its p is 0 anyway."""
    dead = jnp.isneginf(lse)
    return jnp.where(dead, 0.0, lse * LOG2E), jnp.where(dead, 0.0, delta)
