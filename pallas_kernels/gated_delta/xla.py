# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule in plain JAX: what needs no state for all chunks at once, then the rest.

All products are of the inputs' dtype at the highest precision. Backward: by JAX; of the first part
its inputs alone are saved.
"""

import jax
from jax import lax

from pallas_kernels.gated_delta import tile, tiles
from pallas_kernels.gated_delta.tile import Chunk


def tokens(dtype) -> tuple[int, int]:
    """Tokens of a chunk, at least and at most: powers of two."""
    del dtype
    return 1, 64


def local(q, k, v, log_decay, beta, document) -> Chunk:
    """See `tiles.chunks_by_xla`."""
    return tiles.chunks_by_xla(tile.EXACT, q, k, v, log_decay, beta, document)


def scan(parts: Chunk, state):
    """`(out [c, B, N, L, V], state)`; without `reads` out is None."""
    advance = jax.vmap(jax.vmap(tile.advance))

    def chunk(state, now):
        out, state = advance(now, state)
        return state, out

    state, out = lax.scan(chunk, state, parts)
    return out, state
