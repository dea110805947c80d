# SPDX-License-Identifier: Apache-2.0
"""Dense feed-forward layers."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcp.layers.linear import linear
from jaxcp.layers.parameter import constant, normal
from jaxcp.sharding import tokens_spec


def gelu(x):
    """`x * (1 + erf(x / sqrt(2))) / 2`, in float32 at least.

    JAX's own goes by erfc, whose derivative is twice as dear as all products of this layer.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS = {
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": gelu,
}


class MLP(nnx.Module):
    """`down(activation(up(x)))` with biases: GPT-2."""

    def __init__(
        self,
        embed_dim: int,
        mlp_dim: int,
        *,
        activation: str,
        use_bias: bool,
        std: float,
        out_std: float,
        rngs: nnx.Rngs,
    ):
        self.up = normal(rngs, (embed_dim, mlp_dim), ("embed", "mlp"), std, summed=1)
        self.down = normal(rngs, (mlp_dim, embed_dim), ("mlp", "embed"), out_std, summed=1)
        if use_bias:
            self.up_bias = constant((mlp_dim,), ("mlp",), 0.0)
            self.down_bias = constant((embed_dim,), ("embed",), 0.0)
        self.activation, self.use_bias = activation, use_bias

    @jax.named_scope("mlp")
    def __call__(self, x):
        h = linear("btd,df->btf", x, self.up)
        h = h + self.up_bias.astype(x.dtype) if self.use_bias else h
        h = ACTIVATIONS[self.activation](h)
        y = linear("btf,fd->btd", h, self.down, tokens_spec(x))
        return y + self.down_bias.astype(x.dtype) if self.use_bias else y


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwiGLU:
    """`(up + shift) * gate * sigmoid(alpha * gate)`. Source: arXiv 2002.05202.

    `limit` first clips the gate from above and `up` on both sides. Hy3 and Qwen3 have the
    defaults, DeepSeek-V4 a limit, gpt-oss all three.
    """

    limit: float | None = None
    alpha: float = 1.0
    shift: float = 0.0

    def __post_init__(self):
        if self.limit is not None and self.limit <= 0:
            raise ValueError(f"limit must be positive; got limit={self.limit}")

    @property
    def is_silu(self) -> bool:
        """True for `silu(gate) * up`, with or without a limit: the form that kernels have."""
        return self.alpha == 1 and self.shift == 0

    def __call__(self, gate, up):
        if self.limit is not None:
            gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        up = up + self.shift if self.shift else up
        return up * gate * jax.nn.sigmoid(self.alpha * gate)


SILU = SwiGLU()


class GatedMLP(nnx.Module):
    """`down(activation(gate(x), up(x)))`, with biases where `use_bias`."""

    def __init__(
        self,
        embed_dim: int,
        mlp_dim: int,
        *,
        activation: SwiGLU = SILU,
        use_bias: bool = False,
        std: float,
        out_std: float,
        rngs: nnx.Rngs,
    ):
        self.gate = normal(rngs, (embed_dim, mlp_dim), ("embed", "mlp"), std, summed=1)
        self.up = normal(rngs, (embed_dim, mlp_dim), ("embed", "mlp"), std, summed=1)
        self.down = normal(rngs, (mlp_dim, embed_dim), ("mlp", "embed"), out_std, summed=1)
        if use_bias:
            self.gate_bias = constant((mlp_dim,), ("mlp",), 0.0)
            self.up_bias = constant((mlp_dim,), ("mlp",), 0.0)
            self.down_bias = constant((embed_dim,), ("embed",), 0.0)
        self.activation, self.use_bias = activation, use_bias

    @jax.named_scope("mlp")
    def __call__(self, x):
        def project(subscripts, x, name, *spec):
            y = linear(subscripts, x, getattr(self, name), *spec)
            return y + getattr(self, f"{name}_bias").astype(y.dtype) if self.use_bias else y

        gate, up = (project("btd,df->btf", x, name) for name in ("gate", "up"))
        return project("btf,fd->btd", self.activation(gate, up), "down", tokens_spec(x))
