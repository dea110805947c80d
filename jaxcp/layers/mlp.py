# SPDX-License-Identifier: Apache-2.0
"""Dense feed-forward layers."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcp.layers.parameter import constant, normal
from jaxcp.sharding import tokens_spec

ACTIVATIONS = {
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
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
        self.up = normal(rngs, (embed_dim, mlp_dim), ("embed", "mlp"), std)
        self.down = normal(rngs, (mlp_dim, embed_dim), ("mlp", "embed"), out_std)
        if use_bias:
            self.up_bias = constant((mlp_dim,), ("mlp",), 0.0)
            self.down_bias = constant((embed_dim,), ("embed",), 0.0)
        self.activation, self.use_bias = activation, use_bias

    def __call__(self, x):
        h = jnp.einsum("btd,df->btf", x, self.up.astype(x.dtype))
        h = h + self.up_bias.astype(x.dtype) if self.use_bias else h
        h = ACTIVATIONS[self.activation](h)
        y = jnp.einsum("btf,fd->btd", h, self.down.astype(x.dtype), out_sharding=tokens_spec(x))
        return y + self.down_bias.astype(x.dtype) if self.use_bias else y


class GatedMLP(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`. Source: arXiv 2002.05202."""

    def __init__(self, embed_dim: int, mlp_dim: int, *, std: float, out_std: float, rngs: nnx.Rngs):
        self.gate = normal(rngs, (embed_dim, mlp_dim), ("embed", "mlp"), std)
        self.up = normal(rngs, (embed_dim, mlp_dim), ("embed", "mlp"), std)
        self.down = normal(rngs, (mlp_dim, embed_dim), ("mlp", "embed"), out_std)

    def __call__(self, x):
        gate = jnp.einsum("btd,df->btf", x, self.gate.astype(x.dtype))
        up = jnp.einsum("btd,df->btf", x, self.up.astype(x.dtype))
        return jnp.einsum(
            "btf,fd->btd",
            jax.nn.silu(gate) * up,
            self.down.astype(x.dtype),
            out_sharding=tokens_spec(x),
        )
