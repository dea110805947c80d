# SPDX-License-Identifier: Apache-2.0
"""A chunk of the gated delta rule by products of matrices (the WY form), of one head.

Within a chunk of L tokens, with D[i, j] what is left at i of what was written at j, let
`A = D * (k k^T)` below the diagonal, and `(I + beta A)^-1` applied to `beta v` be U, to beta times
the decayed keys be W. Against the state S before the chunk token i writes `U_i - W_i S`:

    new = U - W S
    out = reads S + attended new          reads = D_0 q           attended = D * (q k^T)
    S'  = passes * S + kept^T new         passes = D_L            kept = D_end k

`local` makes the six, which need no state, `advance` uses them. Decays are sums of the logarithms
between two tokens, not differences of large sums, and nothing is divided by a decay: all factors
are at most 1. Nothing here is cut or reshaped: all is products, masks and sums of whole matrices,
so that one code is XLA's, Mosaic's and Triton's, and JAX's derivative of it their backward.

Source: Yang et al. (arXiv 2406.06484, arXiv 2412.06464); Kimi Linear (arXiv 2510.26692).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

HIGHEST = lax.Precision.HIGHEST


class Chunk(NamedTuple):
    """What L tokens do to any state `[H, V]` before them; leading axes are chunks, heads, rows."""

    w: jax.Array  # [L, H]
    u: jax.Array  # [L, V]
    kept: jax.Array  # [L, H]
    passes: jax.Array  # [1, 1], or [H, 1] where channels decay each by itself
    reads: jax.Array | None  # [L, H]
    attended: jax.Array | None  # [L, L]


Product = Callable[[jax.Array, jax.Array, tuple[int, int]], jax.Array]
"""Contracts a dimension of each of two matrices."""


def exactly(a, b, contract=(1, 0)):
    """A product in the dtype of its operands, float32 or float64, none of which is rounded."""
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=(HIGHEST, HIGHEST),
        preferred_element_type=a.dtype,
    )


def _rounded_product(a, b, contract):
    return lax.dot_general(
        a.astype(jnp.bfloat16),
        b.astype(jnp.bfloat16),
        (((contract[0],), (contract[1],)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def rounded(a, b, contract=(1, 0)):
    """A float32 product of operands rounded to bfloat16."""
    return _rounded_product(a, b, contract)


@jax.custom_vjp
def _derivable(a, b):
    return _rounded_product(a, b, (1, 0))


def _derivable_forward(a, b):
    return _rounded_product(a, b, (1, 0)), (a, b)


def _derivable_backward(saved, dout):
    a, b = saved
    return _rounded_product(dout, b, (1, 1)), _rounded_product(a, dout, (0, 0))


_derivable.defvjp(_derivable_forward, _derivable_backward)


def rounded_with_derivative(a, b, contract=(1, 0)):
    """`rounded`, the products of whose derivative are rounded alike."""
    a = a if contract[0] == 1 else a.T
    b = b if contract[1] == 0 else b.T
    return _derivable(a, b)


def local(q, k, v, log_decay, beta, document, *, product: Product = exactly) -> Chunk:
    """What tokens do, of one head: float32 `q, k [L, H]`, `v [L, V]`; L a power of two.

    Args:
      log_decay: `[1, L]`, or a channel's own `[L, H]`.
      beta: `[1, L]`.
      document: `[1, L]`, a float that counts documents: 0 is that of the token before the chunk.
    """
    length = q.shape[0]
    i, j = (lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
    own, last = column(document), jnp.max(document, axis=1, keepdims=True)
    causal = (own == document) & (i >= j)
    pairs = _by_head if log_decay.shape == beta.shape else _by_channel
    from_start, to_end, total, decayed = pairs(log_decay, k, q, product)
    from_start = jnp.where(own == 0, from_start, 0)
    to_end = jnp.where(own == last, to_end, 0)
    attends, sees = (jnp.where(causal, x, 0) for x in decayed)

    beta = column(beta)
    inverse = unit_lower_inverse(beta * attends)
    return Chunk(
        w=product(inverse, beta * k * from_start, (1, 0)),
        u=product(inverse, beta * v, (1, 0)),
        reads=q * from_start,
        attended=sees,
        kept=k * to_end,
        passes=jnp.where(last == 0, total, 0),
    )


def advance(chunk: Chunk, state, *, product: Product = exactly):
    """`(out [L, V], state after the chunk)`; a chunk without `reads` has no `out`."""
    new = chunk.u - product(chunk.w, state, (1, 0))
    out = None
    if chunk.reads is not None:
        out = product(chunk.reads, state, (1, 0)) + product(chunk.attended, new, (1, 0))
    return out, chunk.passes * state + product(chunk.kept, new, (0, 0))


def column(row):
    """`[n, 1]` of `[1, n]`."""
    n = row.shape[1]
    i, j = (lax.broadcasted_iota(jnp.int32, (n, n), axis) for axis in (0, 1))
    return jnp.sum(jnp.where(i == j, row, 0), axis=1, keepdims=True)


def _by_head(log_decay, k, q, product):
    """`(from the start, to the end, of all, (k k^T, q k^T) decayed)`; one decay a head."""
    n = log_decay.shape[1]
    i, j = (lax.broadcasted_iota(jnp.int32, (n, n), axis) for axis in (0, 1))
    until = jnp.where(i >= j, log_decay, 0)
    between = jnp.exp(exactly(until, (i > j).astype(until.dtype)))
    from_start = jnp.exp(jnp.sum(until, axis=1, keepdims=True))
    to_end = jnp.exp(jnp.sum(jnp.where(i < j, log_decay, 0), axis=1, keepdims=True))
    total = jnp.exp(jnp.sum(log_decay, axis=1, keepdims=True))
    decayed = tuple(product(x, k, (1, 1)) * between for x in (k, q))
    return from_start, to_end, total, decayed


def _by_channel(log_decay, k, q, product):
    """`_by_head` with a decay a channel.

    Two tokens meet at the border that halves the least aligned block with both: from there on the
    decay is the later one's, up to there the earlier one's. So each size of block is one product.
    """
    n = k.shape[0]
    i, j = (lax.broadcasted_iota(jnp.int32, (n, n), axis) for axis in (0, 1))

    def summed(which):
        return jnp.exp(exactly(which.astype(log_decay.dtype), log_decay))

    total = column(jnp.exp(jnp.sum(log_decay, axis=0, keepdims=True)))
    decayed = [jnp.where(i == j, jnp.sum(x * k, axis=1, keepdims=True), 0) for x in (k, q)]
    for bit in range(n.bit_length() - 1):
        same = (i >> (bit + 1)) == (j >> (bit + 1))
        late_i, late_j = ((x >> bit) & 1 == 1 for x in (i, j))
        after = late_i & late_j & (j <= i)
        before = ~late_i & ~late_j & (j > i)
        decay = summed(same & (after | before))
        meet = same & late_i & ~late_j
        ours = k * decay
        for at, x in enumerate((ours, q * decay)):
            decayed[at] = decayed[at] + jnp.where(meet, product(x, ours, (1, 1)), 0)
    return summed(i >= j), summed(j > i), total, tuple(decayed)


def unit_lower_inverse(x):
    """The inverse of a unit lower triangular matrix `[L, L]`, of which x is below the diagonal
    (what else it has is not looked at); L a power of two.

    From blocks on the diagonal to blocks of twice the size. No powers of x, which may be huge where
    their alternating sum, the inverse, is not: equal keys have entries of 1 and powers of 1e18.
    """
    n = x.shape[0]
    i, j = (lax.broadcasted_iota(jnp.int32, (n, n), axis) for axis in (0, 1))
    inverse = (i == j).astype(x.dtype)
    for bit in range(n.bit_length() - 1):
        below = ((i >> bit) == (j >> bit) + 1) & ((i >> bit) & 1 == 1)
        step = jnp.where(below, x, 0)
        inverse = inverse - (exactly(inverse, exactly(step, inverse)) if bit else step)
    return inverse
