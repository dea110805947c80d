# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule in plain JAX: what needs no state for all chunks at once, then the rest.

All products are of the inputs' dtype at the highest precision. Backward: by JAX; of the first part
its inputs alone are saved.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_delta import tile
from pallas_kernels.gated_delta.tile import Chunk

AT_ONCE = 64
"""Chunks of a row that are worked at once: it bounds memory."""


def tokens(dtype) -> tuple[int, int]:
    """Tokens of a chunk, at least and at most: powers of two."""
    del dtype
    return 1, 64


def local(q, k, v, log_decay, beta, document, *, products=tile.EXACT) -> Chunk:
    """`tile.local` of chunks `[c, B, N, L, ...]`, of q and k `[c, B, K, L, H]`, and of `document
    [c, B, 1, L]`."""
    q, k, v = (x.astype(beta.dtype) for x in (q, k, v))
    times = v.shape[2] // k.shape[2]
    q, k = (x if times == 1 else jnp.repeat(x, times, axis=2) for x in (q, k))
    arrays = q, k, v, log_decay, beta, document
    heads = jax.vmap(
        functools.partial(tile.local, products=products), in_axes=(0, 0, 0, 0, 0, None)
    )
    one = jax.checkpoint(jax.vmap(heads))
    if k.shape[0] <= AT_ONCE:
        return jax.checkpoint(jax.vmap(jax.vmap(heads)))(*arrays)
    return lax.map(lambda now: one(*now), arrays, batch_size=AT_ONCE)


def scan(parts: Chunk, state):
    """`(out [c, B, N, L, V], state)`; without `reads` out is None."""
    advance = jax.vmap(jax.vmap(tile.advance))

    def chunk(state, now):
        out, state = advance(now, state)
        return state, out

    state, out = lax.scan(chunk, state, parts)
    return out, state
