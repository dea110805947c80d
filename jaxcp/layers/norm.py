# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and LayerNorm, statistics in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcp.layers.parameter import constant


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale`.

    Over the last axis, or the last ones where `axis` names several. Rounds to x's dtype before the
    scale, as Llama and Hy3 do; with `float32_scale` after it, as gpt-oss and DeepSeek-V4 do.
    """

    def __init__(
        self,
        *size: int,
        eps: float,
        axis: str | tuple[str, ...] = "embed",
        gain: float = 1.0,
        float32_scale: bool = False,
    ):
        self.scale = constant(size, (axis,) if isinstance(axis, str) else axis, gain)
        self.eps, self.float32_scale = eps, float32_scale
        self.over = tuple(range(-len(size), 0))

    @jax.named_scope("norm")
    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=self.over, keepdims=True) + self.eps)
        if self.float32_scale:
            return (y * self.scale.astype(jnp.float32)).astype(x.dtype)
        return y.astype(x.dtype) * self.scale.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Takes out mean and variance, then applies scale and bias."""

    def __init__(self, size: int, *, eps: float):
        self.scale = constant((size,), ("embed",), 1.0)
        self.bias = constant((size,), ("embed",), 0.0)
        self.eps = eps

    @jax.named_scope("norm")
    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale.astype(jnp.float32) + self.bias.astype(jnp.float32)).astype(x.dtype)


class ZeroCentredRMSNorm(nnx.Module):
    """`x / rms(x) * (1 + scale)`, rounded to x's dtype after the scale: Qwen3-Next."""

    def __init__(self, size: int, *, eps: float, axis: str = "embed"):
        self.scale = constant((size,), (axis,), 0.0)
        self.eps = eps

    @jax.named_scope("norm")
    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * (1 + self.scale.astype(jnp.float32))).astype(x.dtype)


class GatedRMSNorm(nnx.Module):
    """`x / rms(x) * scale * activation(gate)`: silu in Qwen3-Next, sigmoid in Kimi Linear.

    Silu's rounds to x's dtype before the scale, as its authors do; both gate in float32.
    """

    def __init__(self, size: int, *, eps: float, activation: str):
        self.scale = constant((size,), ("head_dim",), 1.0)
        self.eps, self.activation = eps, activation

    @jax.named_scope("norm")
    def __call__(self, x, gate):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        if self.activation == "silu":
            y = (y.astype(x.dtype) * self.scale.astype(x.dtype)).astype(jnp.float32)
            return (y * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)
        y = y * self.scale.astype(jnp.float32)
        return (y * jax.nn.sigmoid(gate.astype(jnp.float32))).astype(x.dtype)
