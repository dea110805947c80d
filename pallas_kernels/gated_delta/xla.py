# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule in chunks, by products of matrices (the WY form).

Within a chunk of L tokens, with D[i, j] what is left at i of what was written at j, let
`A = D * (k k^T)` below the diagonal and `(I + beta A)^-1` applied to `beta v` be U, to beta times
the decayed keys be W. Against the state S before the chunk token i writes `U_i - W_i S`, so what
it reads and what the chunk leaves are linear in S:

    out = reads S + own          reads = D_0 q - P W     own = P U      P = D * (q k^T)
    S'  = transition S + added   transition = D_L - K^T W     added = K^T U    K = D_end k

The four are made for all chunks at once; only `S' = transition S + added` goes chunk by chunk.
Decays are sums of the logarithms between two tokens, not differences of large sums, and nothing is
divided by a decay: all factors are at most 1. All products are float32 at the highest precision.
Backward: by JAX; of the first part its inputs alone are saved.

Source: Yang et al. (arXiv 2406.06484, arXiv 2412.06464); Kimi Linear (arXiv 2510.26692).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

CHUNK = 64
"""Tokens of a chunk at most, a power of two."""
BLOCK = 16
"""Tokens of a chunk between which a decay a channel is taken one by one."""
LEAST = -30.0
"""The least logarithm of a decay a channel between two tokens of a block."""
AT_ONCE = 64
"""Chunks of a row that are worked at once: it bounds memory."""

_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class Chunks(NamedTuple):
    """The map of chunks of tokens from the state before them, any; c chunks of L tokens."""

    transition: Float[Array, "c B N H H"]
    added: Float[Array, "c B N H V"]
    reads: Float[Array, "c B N L H"]
    own: Float[Array, "c B N L V"]

    def summary(self):
        """`(transition [B, N, H, H], state [B, N, H, V])` of all tokens: they leave `transition S +
        state`."""
        eye = jnp.eye(self.added.shape[-2], dtype=self.added.dtype)
        eye = jnp.broadcast_to(eye, self.transition.shape[1:])
        start = eye, jnp.zeros_like(self.added[0])

        def chunk(carry, now):
            transition, added = now
            total, state = (_einsum("bnij,bnjk->bnik", transition, x) for x in carry)
            return (total, state + added), None

        return lax.scan(chunk, start, (self.transition, self.added))[0]

    def outputs(self, state, tokens: int):
        """`(out [B, tokens, N, V], state)` from the state before the first token."""

        def chunk(state, now):
            transition, added = now
            return _einsum("bnij,bnjk->bnik", transition, state) + added, state

        state, before = lax.scan(chunk, state, (self.transition, self.added))
        out = _einsum("cbnlh,cbnhv->cbnlv", self.reads, before) + self.own
        c, b, n, length, v = out.shape
        out = out.transpose(1, 0, 3, 2, 4).reshape(b, c * length, n, v)
        return out[:, :tokens], state


def forward(q, k, v, log_decay, beta, starts, state, *, scale, chunk):
    """See `reference.forward`; `chunk`: tokens of a chunk at most."""
    chunks = prepare(q, k, v, log_decay, beta, starts, scale=scale, chunk=chunk)
    return chunks.outputs(state, q.shape[1])


def prepare(q, k, v, log_decay, beta, starts, *, scale, chunk) -> Chunks:
    """Work all chunks, of `[B, T, N, ...]` and `starts [B, T]`."""
    length = min(chunk, 1 << (q.shape[1] - 1).bit_length())

    def cut(x):  # [B, T, ...] -> [c, B, L, ...]; what is filled up changes nothing
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, length, *x.shape[2:]), 1, 0)

    arrays = tuple(cut(x) for x in (scale * q, k, v, log_decay, beta, starts))
    work = jax.checkpoint(jax.vmap(_chunk))
    if arrays[0].shape[0] <= AT_ONCE:
        return Chunks(*work(*arrays))
    one = jax.checkpoint(_chunk)
    return Chunks(*lax.map(lambda now: one(*now), arrays, batch_size=AT_ONCE))


def _chunk(q, k, v, log_decay, beta, starts):
    """`(transition, added, reads, own)` of a chunk, `[B, L, N, ...]` and `starts [B, L]`."""
    q, k, v, log_decay = (x.swapaxes(1, 2) for x in (q, k, v, log_decay))
    beta = beta.swapaxes(1, 2)[..., None]
    document = jnp.cumsum(starts, axis=1)[:, None]
    same = document[..., :, None] == document[..., None, :]
    causal = same & jnp.tril(jnp.ones((q.shape[2],) * 2, bool))
    decayed = _by_head if log_decay.shape[-1] == 1 else _by_channel
    sees, stays = (document == 0)[..., None], (document == document[..., -1:])[..., None]
    from_start = jnp.where(sees, jnp.exp(jnp.cumsum(log_decay, axis=2)), 0)
    to_end = jnp.where(stays, jnp.exp(_after(log_decay, axis=2)), 0)

    inverse = unit_lower_inverse(beta * decayed(k, k, log_decay, causal))
    w = _einsum("bnij,bnjh->bnih", inverse, beta * k * from_start)
    u = _einsum("bnij,bnjv->bniv", inverse, beta * v)
    attended = decayed(q, k, log_decay, causal)
    reads = q * from_start - _einsum("bnij,bnjh->bnih", attended, w)
    own = _einsum("bnij,bnjv->bniv", attended, u)
    kept = k * to_end
    passes = jnp.broadcast_to(from_start[..., -1, :], k[..., -1, :].shape)
    passes = passes[..., None] * jnp.eye(k.shape[-1], dtype=k.dtype)
    transition = passes - _einsum("bnlh,bnlk->bnhk", kept, w)
    return transition, _einsum("bnlh,bnlv->bnhv", kept, u), reads, own


def _by_head(a, b, log_decay, causal):
    """`a b^T` `[B, N, L, L]` of rows `[B, N, L, H]`, decayed from b's token to a's; one decay a
    head."""
    between = _between(log_decay)[..., 0]
    return _einsum("bnih,bnjh->bnij", a, b) * jnp.exp(jnp.where(causal, between, -jnp.inf))


def _by_channel(a, b, log_decay, causal):
    """`_by_head` with a decay a channel.

    Tokens of different blocks meet at the border of the later one's: from there on the decay is
    a's, up to there b's. Within a block each pair has its own decay, a difference of two sums: that
    these stay small, a decay below exp(-30), beside which float32 sees nothing, counts as that.
    """
    *lead, length, width = a.shape
    log_decay = jnp.maximum(log_decay, LEAST)
    size = min(BLOCK, length)
    a, b, log_decay = (x.reshape(*lead, -1, size, width) for x in (a, b, log_decay))
    own = jnp.cumsum(log_decay, axis=-2)
    blocks = own.shape[-3]
    total = own[..., -1, :]
    skipped = jnp.concatenate([jnp.zeros_like(total[..., :1, :]), total[..., :-1, :]], axis=-2)
    skipped = _between(skipped, beside=True)  # the blocks that lie between two
    later = jnp.tril(jnp.ones((blocks, blocks), bool), -1)[..., None]
    skipped = jnp.exp(jnp.where(later, skipped, -jnp.inf))
    rows = (a * jnp.exp(own))[..., :, None, :, :] * skipped[..., None, :]
    far = _einsum("bnxyih,bnyjh->bnxiyj", rows, b * jnp.exp(_after(log_decay, axis=-2)))
    lower = jnp.tril(jnp.ones((size, size), bool))[..., None]
    near = own[..., :, None, :] - own[..., None, :, :]
    near = jnp.exp(jnp.where(lower, near, -jnp.inf))
    near = (a[..., :, None, :] * b[..., None, :, :] * near).sum(-1)
    diagonal = jnp.eye(blocks, dtype=bool)[:, None, :, None]
    both = jnp.where(diagonal, near[..., :, :, None, :], far)
    return jnp.where(causal, both.reshape(*lead, length, length), 0)


def _between(x, *, beside=False):
    """`[..., L, L, C]`: the sum of `x [..., L, C]` after j up to i; 0 where there is none.

    `beside`: what comes next to j is left out too.
    """
    i = jnp.arange(x.shape[-2])
    counts = (i[:, None] > i + int(beside))[..., None]
    return jnp.cumsum(jnp.where(counts, x[..., :, None, :], 0), axis=-3)


def _after(x, axis):
    """The sums of what comes after each place."""
    return jnp.flip(jnp.cumsum(jnp.flip(x, axis), axis), axis) - x


def unit_lower_inverse(x):
    """The inverse of a unit lower triangular matrix `[..., L, L]`, of which x is below the diagonal
    (what else it has is not looked at); L a power of two.

    From blocks on the diagonal to blocks of twice the size, so that it is products of matrices. No
    powers of x, which may be huge where their alternating sum, the inverse, is not: equal keys have
    entries of 1 and powers of 1e18.
    """
    *lead, size, _ = x.shape
    inverse, half = jnp.ones((*lead, size, 1, 1), x.dtype), 1
    while half < size:
        pairs = inverse.reshape(*lead, -1, 2, half, half)
        first, second = pairs[..., 0, :, :], pairs[..., 1, :, :]
        blocks = x.reshape(*lead, size // (2 * half), 2 * half, size // (2 * half), 2 * half)
        below = jnp.diagonal(blocks[..., half:, :, :half], axis1=-4, axis2=-2)
        below = _einsum("...ij,...jk->...ik", jnp.moveaxis(below, -1, -3), first)
        below = -_einsum("...ij,...jk->...ik", second, below)
        top = jnp.concatenate([first, jnp.zeros_like(below)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([below, second], axis=-1)], axis=-2)
        half *= 2
    return inverse[..., 0, :, :]
