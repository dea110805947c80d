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

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

HIGHEST = lax.Precision.HIGHEST


class Chunk(NamedTuple):
    """Effects of L tokens on any state `[H, V]` before them.

    Leading axes are chunks, heads, rows.
    """

    w: jax.Array  # [L, H]
    u: jax.Array  # [L, V]
    kept: jax.Array  # [L, H]
    passes: jax.Array  # [1, 1], or [H, 1] where channels decay each by itself
    reads: jax.Array | None  # [L, H]
    attended: jax.Array | None  # [L, L]


Product = Callable[[jax.Array, jax.Array, tuple[int, int]], jax.Array]
"""Contracts a dimension of each of two matrices."""


class Products(NamedTuple):
    """Two ways to multiply matrices."""

    exact: Product
    """Product for sums of decays and the inverse."""
    large: Product
    """All else."""


def exactly(a, b, contract=(1, 0), *, precision: Any = (HIGHEST, HIGHEST)):
    """A product in the dtype of its operands, float32 or float64, none of which is rounded."""
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=a.dtype,
    )


def _rounded_product(a, b, contract):
    return lax.dot_general(
        a.astype(jnp.bfloat16),
        b.astype(jnp.bfloat16),
        (((contract[0],), (contract[1],)), ((), ())),
        precision=(lax.Precision.DEFAULT, lax.Precision.DEFAULT),
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


EXACT = Products(exactly, exactly)
ROUNDED = Products(exactly, rounded)
DERIVABLE = Products(exactly, rounded_with_derivative)
"""`ROUNDED`, with its derivative."""


def local(q, k, v, log_decay, beta, document, *, products: Products | None = None) -> Chunk:
    """Work the tokens of one head: float32 `q, k [L, H]`, `v [L, V]`; L a power of two.

    Args:
      log_decay: `[1, L]`, or a channel's own `[L, H]`.
      beta: `[1, L]`.
      document: `[1, L]`, a float that counts documents: 0 is that of the token before the chunk.
    """
    made = dict(parts(products or EXACT, q, k, v, log_decay, beta, document))
    return Chunk(**made)


def parts(products: Products, q, k, v, log_decay, beta, document) -> Iterator[tuple[str, Any]]:
    """The parts of `local` by name, each as soon as it is made, so that registers are few.

    q, k, v and log_decay may be references, which are read anew where they are used.
    """

    read = functools.partial(_read, dtype=beta.dtype)
    i, j = _places(q.shape[0])
    own, last = column(document), jnp.max(document, axis=1, keepdims=True)
    causal = (own == document) & (i >= j)
    decays = (_Head if log_decay.shape == beta.shape else _Channels)(
        log_decay, beta.dtype, products
    )
    yield "passes", jnp.where(last == 0, decays.total(), 0)
    yield "kept", read(k) * jnp.where(own == last, decays.to_end(), 0)
    attends, sees = (jnp.where(causal, x, 0) for x in decays.products((k, q), k))
    yield "attended", sees
    rate = column(beta)
    inverse = unit_lower_inverse(rate * attends, products.exact)
    yield "u", products.large(inverse, rate * read(v), (1, 0))
    from_start = jnp.where(own == 0, decays.from_start(), 0)
    yield "w", products.large(inverse, rate * read(k) * from_start, (1, 0))
    yield "reads", read(q) * from_start


def advance(chunk: Chunk, state, *, product: Product = exactly):
    """`(out [L, V], state after the chunk)`; a chunk without `reads` has no `out`."""
    new = chunk.u - product(chunk.w, state, (1, 0))
    out = None
    if chunk.reads is not None and chunk.attended is not None:
        out = product(chunk.reads, state, (1, 0)) + product(chunk.attended, new, (1, 0))
    return out, chunk.passes * state + product(chunk.kept, new, (0, 0))


def column(row):
    """`[n, 1]` of `[1, n]`."""
    i, j = _places(row.shape[1])
    return jnp.sum(jnp.where(i == j, row, 0), axis=1, keepdims=True)


class _Decays:
    """Parts of what was written that are left after a time, of n tokens."""

    def __init__(self, n, products):
        self.exact, self.large = products
        self.n, (self.i, self.j) = n, _places(n)

    def from_start(self):
        return self.after(self.i >= self.j)

    def to_end(self):
        return self.after(self.i < self.j)

    def after(self, which):
        """Exponentials of sums of logarithms over the tokens that each row of `which` has."""
        raise NotImplementedError


class _Head(_Decays):
    """Decays of `log_decay [1, L]`, one a head."""

    def __init__(self, log_decay, dtype, products):
        super().__init__(log_decay.shape[1], products)
        self.log_decay = _read(log_decay, dtype)

    def total(self):
        return jnp.exp(jnp.sum(self.log_decay, axis=1, keepdims=True))

    def products(self, rows, k):
        """`x k^T` of each x, decayed from k's token to x's."""
        until = jnp.where(self.i >= self.j, self.log_decay, 0)
        between = jnp.exp(self.exact(until, (self.i > self.j).astype(until.dtype), (1, 0)))
        read = functools.partial(_read, dtype=between.dtype)
        return [self.large(read(x), read(k), (1, 1)) * between for x in rows]

    def after(self, which):
        return jnp.exp(jnp.sum(jnp.where(which, self.log_decay, 0), axis=1, keepdims=True))


class _Channels(_Decays):
    """Decays of `log_decay [L, H]`, one a channel.

    Two tokens meet at the border that halves the least aligned block with both: from there on the
    decay is the later one's, up to there the earlier one's. So each size of block is one product.
    """

    def __init__(self, log_decay, dtype, products):
        super().__init__(log_decay.shape[0], products)
        self.log_decay, self.dtype = log_decay, dtype

    def total(self):
        log_decay = _read(self.log_decay, self.dtype)
        return column(jnp.exp(jnp.sum(log_decay, axis=0, keepdims=True)))

    def products(self, rows, k):
        i, j, read = self.i, self.j, functools.partial(_read, dtype=self.dtype)
        own = (jnp.sum(read(x) * read(k), axis=1, keepdims=True) for x in rows)
        found = [jnp.where(i == j, x, 0) for x in own]
        for bit in range(self.n.bit_length() - 1):
            same = (i >> (bit + 1)) == (j >> (bit + 1))
            late_i, late_j = ((x >> bit) & 1 == 1 for x in (i, j))
            after, before = late_i & late_j & (j <= i), ~late_i & ~late_j & (j > i)
            decay, meet = self.after(same & (after | before)), same & late_i & ~late_j
            found = [
                x + jnp.where(meet, self.large(read(row) * decay, read(k) * decay, (1, 1)), 0)
                for x, row in zip(found, rows, strict=True)
            ]
        return found

    def after(self, which):
        log_decay = _read(self.log_decay, self.dtype)
        return jnp.exp(self.exact(which.astype(self.dtype), log_decay, (1, 0)))


def _read(x, dtype):
    return x[...].astype(dtype)


def _places(n):
    return (lax.broadcasted_iota(jnp.int32, (n, n), axis) for axis in (0, 1))


def unit_lower_inverse(x, product: Product = exactly):
    """The inverse of a unit lower triangular matrix `[L, L]`, of which x is below the diagonal
    (what else it has is not looked at); L a power of two.

    From blocks on the diagonal to blocks of twice the size. No powers of x, which may be huge where
    their alternating sum, the inverse, is not: equal keys have entries of 1 and powers of 1e18.
    """
    n = x.shape[0]
    i, j = _places(n)
    inverse = (i == j).astype(x.dtype)
    for bit in range(n.bit_length() - 1):
        below = ((i >> bit) == (j >> bit) + 1) & ((i >> bit) & 1 == 1)
        step = jnp.where(below, x, 0)
        inverse = inverse - (
            product(inverse, product(step, inverse, (1, 0)), (1, 0)) if bit else step
        )
    return inverse
