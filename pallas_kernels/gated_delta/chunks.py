# SPDX-License-Identifier: Apache-2.0
"""Sequences cut into chunks, and chunks that are chained, by whatever backend."""

import dataclasses
from types import ModuleType

import jax.numpy as jnp

from pallas_kernels.gated_delta import gradients
from pallas_kernels.gated_delta.tile import Chunk
from pallas_kernels.varying import alike


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The map of chunks of tokens from the state before them, any."""

    parts: Chunk
    """Leading axes `[c, B, N]`."""
    backend: ModuleType
    scale: float

    def summary(self):
        """`(transition [B, N, H, H], state [B, N, H, V])` of all tokens: they leave `transition S +
        state`.

        The state is what becomes of zeros, the transition what becomes of the columns of the
        identity, to which nothing is added.
        """
        u, w = self.parts.u, self.parts.w
        rows, width = self._rows, w.shape[-1]
        eye = jnp.broadcast_to(jnp.eye(width, dtype=self._dtype), (*rows, width, width))
        nothing = jnp.zeros((*rows, width, u.shape[-1]), self._dtype)
        parts = self.parts._replace(
            u=jnp.concatenate([u, jnp.zeros_like(w)], axis=-1), reads=None, attended=None
        )
        start = alike(parts, jnp.concatenate([nothing, eye], axis=-1))[1]
        _, after = gradients.of(self.backend).scan(parts, start)
        return after[..., u.shape[-1] :], after[..., : u.shape[-1]]

    def outputs(self, state, tokens: int):
        """`(out [B, tokens, N, V], state)` from the state before the first token."""
        out, state = gradients.of(self.backend).scan(*alike(self.parts, state))
        c, b, n, length, v = out.shape
        out = self.scale * out.transpose(1, 0, 3, 2, 4).reshape(b, c * length, n, v)
        return out[:, :tokens], state

    @property
    def _rows(self):
        return self.parts.u.shape[1:3]

    @property
    def _dtype(self):
        return self.parts.passes.dtype


def prepare(backend, q, k, v, log_decay, beta, starts, *, scale) -> Chunks:
    """Work all chunks, of `[B, T, N, ...]`, of q and k `[B, T, K, H]`, and of `starts [B, T]`."""
    q, k, v, log_decay, beta, starts = alike(q, k, v, log_decay, beta, starts)
    least, most = backend.tokens(q.dtype)
    length = max(least, min(most, 1 << (q.shape[1] - 1).bit_length()))

    def cut(x):  # [B, T, ...] -> [c, B, ..., L, ...]; what is filled up changes nothing
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % length)] + [(0, 0)] * (x.ndim - 2))
        x = jnp.moveaxis(x.reshape(x.shape[0], -1, length, *x.shape[2:]), 1, 0)
        return jnp.moveaxis(x, 2, min(3, x.ndim - 1))

    document = jnp.cumsum(cut(starts), axis=-1).astype(beta.dtype)[..., None, :]
    decay = cut(log_decay)[..., None, :] if log_decay.ndim == 3 else cut(log_decay)
    parts = gradients.of(backend).local(
        cut(q), cut(k), cut(v), decay, cut(beta)[..., None, :], document
    )
    return Chunks(parts, backend, scale)
