# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule token by token, as it is defined: what other implementations are held to."""

import jax
import jax.numpy as jnp
from jax import lax

PRECISION = lax.Precision.HIGHEST


def forward(q, k, v, log_decay, beta, starts, state, *, scale):
    """`(out [B, T, N, V], state)` of checked arguments, with a state."""
    q, k, v = (x.astype(state.dtype) for x in (q, k, v))
    q, k = (jnp.repeat(x, v.shape[2] // k.shape[2], axis=2) for x in (q, k))
    log_decay = log_decay[..., None] if log_decay.ndim == 3 else log_decay

    def token(state, now):
        q, k, v, log_decay, beta, start = now
        state = jnp.where(start[:, None, None, None], jnp.zeros_like(state), state)
        state = jnp.exp(log_decay)[..., None] * state
        there = jnp.einsum("bnhv,bnh->bnv", state, k, precision=PRECISION)
        new = beta[..., None] * (v - there)
        state = state + k[..., None] * new[..., None, :]
        return state, scale * jnp.einsum("bnhv,bnh->bnv", state, q, precision=PRECISION)

    arrays = q, k, v, log_decay, beta, starts
    state, out = lax.scan(token, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), arrays))
    return jnp.moveaxis(out, 0, 1), state
