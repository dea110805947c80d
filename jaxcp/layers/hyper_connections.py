# SPDX-License-Identifier: Apache-2.0
"""Several residual streams, mixed by a doubly stochastic matrix: hyper-connections.

Works token by token, so nothing travels; the residual between layers is `streams` times as wide.
Computes in float32, whatever the model's dtype.

Sources: Zhu et al. (arXiv 2409.19606); Xie et al. (arXiv 2512.24880), who make the mixing matrix
doubly stochastic by Sinkhorn's iteration.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxcp.layers.parameter import constant, normal
from jaxcp.sharding import tokens_spec


class HyperConnection(nnx.Module):
    """Draws the input of a sub-layer from the streams, and renews all streams after it."""

    def __init__(
        self,
        embed_dim: int,
        streams: int,
        *,
        iterations: int,
        eps: float,
        norm_eps: float,
        rngs: nnx.Rngs,
    ):
        width = streams * (streams + 2)
        self.mix = _mix(width, streams * embed_dim, rngs)
        self.base = constant((width,), (None,), 0.0, keep_float32=True)
        self.scale = constant((3,), (None,), 1.0, keep_float32=True)
        self.streams, self.iterations, self.eps, self.norm_eps = streams, iterations, eps, norm_eps

    @jax.named_scope("streams")
    def __call__(self, x):
        """Collapse streams `x [B, T, S, D]` to an input `[B, T, D]`; return `renew`'s `how` too."""
        n = self.streams
        u = _projected(x, self.mix, self.norm_eps)
        scale, base = self.scale.astype(jnp.float32), self.base.astype(jnp.float32)
        pre = jax.nn.sigmoid(u[..., :n] * scale[0] + base[:n]) + self.eps
        post = 2 * jax.nn.sigmoid(u[..., n : 2 * n] * scale[1] + base[n : 2 * n])
        logits = u[..., 2 * n :] * scale[2] + base[2 * n :]
        square = _split_last(logits, n)
        return _collapse(pre, x), (post, sinkhorn(square, self.iterations, self.eps))

    @jax.named_scope("streams")
    def renew(self, x, y, how):
        """Renew the streams `x [B, T, S, D]` by the sub-layer's output `y [B, T, D]`."""
        post, mixing = how
        kept = jnp.einsum("btjk,btjd->btkd", mixing, x.astype(jnp.float32))
        return (kept + post[..., None] * y.astype(jnp.float32)[:, :, None]).astype(x.dtype)


class StreamsToOne(nnx.Module):
    """Sums the streams after the last layer into one hidden state, with weights."""

    def __init__(
        self, embed_dim: int, streams: int, *, eps: float, norm_eps: float, rngs: nnx.Rngs
    ):
        self.mix = _mix(streams, streams * embed_dim, rngs)
        self.base = constant((streams,), (None,), 0.0, keep_float32=True)
        self.scale = constant((1,), (None,), 1.0, keep_float32=True)
        self.eps, self.norm_eps = eps, norm_eps

    @jax.named_scope("streams")
    def __call__(self, x):
        u = _projected(x, self.mix, self.norm_eps)
        scale, base = self.scale.astype(jnp.float32), self.base.astype(jnp.float32)
        return _collapse(jax.nn.sigmoid(u * scale + base) + self.eps, x)


def sinkhorn(logits, iterations: int, eps: float):
    """Divide rows (last axis) and columns of `exp(logits) [..., n, n]` by their sums in turn.

    The first pass is a softmax over rows, plus eps, then columns; each further pass rows, columns.
    """
    m = jax.nn.softmax(logits, axis=-1) + eps
    m = m / (m.sum(-2, keepdims=True) + eps)

    def one(m, _):
        m = m / (m.sum(-1, keepdims=True) + eps)
        return m / (m.sum(-2, keepdims=True) + eps), None

    return lax.scan(one, m, length=iterations - 1)[0]


def _mix(width, inputs, rngs):
    return normal(rngs, (width, inputs), ("mixes", "embed"), inputs**-0.5, keep_float32=True)


def _projected(x, mix, eps):
    """Project all streams of a token, one vector of unit RMS, through `mix [width, S * D]`."""
    x = x.astype(jnp.float32)
    x = x * lax.rsqrt(jnp.mean(x * x, axis=(-2, -1), keepdims=True) + eps)
    mix = mix.astype(jnp.float32).reshape(-1, *x.shape[-2:])
    return jnp.einsum("btsd,wsd->btw", x, mix, precision=lax.Precision.HIGHEST)


def _collapse(weights, x):
    return jnp.einsum("bts,btsd->btd", weights, x.astype(jnp.float32)).astype(x.dtype)


def _split_last(x, n):
    spec = tokens_spec(x)
    shape = (*x.shape[:-1], n, n)
    if spec is None:
        return x.reshape(shape)
    return lax.reshape(x, shape, out_sharding=type(spec)(*spec, None, None))
