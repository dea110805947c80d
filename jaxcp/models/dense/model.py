# SPDX-License-Identifier: Apache-2.0
"""Llama, Mistral, Qwen2 and Qwen3: grouped-query attention and a gated MLP in every layer."""

import jax.numpy as jnp
from flax import nnx

from jaxcp.layers.attention import Attention
from jaxcp.layers.block import ResidualBlock
from jaxcp.layers.mlp import GatedMLP
from jaxcp.layers.norm import RMSNorm
from jaxcp.layers.parameter import normal
from jaxcp.layers.stack import Layers
from jaxcp.models.base import LanguageModel, embed
from jaxcp.models.dense.config import DenseConfig


class Block(ResidualBlock):
    def __init__(self, config: DenseConfig, layer: int, rngs: nnx.Rngs):
        c = config
        std = c.embed_dim**-0.5
        out_std = std * (2 * c.num_layers) ** -0.5
        self.attention_norm = RMSNorm(c.embed_dim, eps=c.norm_eps)
        self.attention = Attention(
            c.embed_dim,
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            std=std,
            out_std=out_std,
            qk_norm_eps=c.norm_eps if c.qk_norm else None,
            rope=c.rope,
            window=c.window if c.kind(layer) == "L" else None,
            use_bias=c.qkv_bias,
            output_bias=c.output_bias,
            rngs=rngs,
        )
        self.mlp_norm = RMSNorm(c.embed_dim, eps=c.norm_eps)
        self.mlp = GatedMLP(
            c.embed_dim, c.mlp_dim, use_bias=c.mlp_bias, std=std, out_std=out_std, rngs=rngs
        )


class DenseModel(LanguageModel):
    """A Llama, Mistral, Qwen2 or Qwen3, by `DenseConfig`.

    `model(tokens, positions)` gives float32 logits `[B, T, V]`; `jaxcp.logits` and an `Engine` see
    to layout and padding.

    >>> model = jaxcp.DenseModel(config, rngs=nnx.Rngs(0))
    """

    def __init__(self, config: DenseConfig, *, rngs: nnx.Rngs):
        self.config = config
        table = config.vocab_size, config.embed_dim
        std = 0.02 if config.tie_embeddings else 1.0
        self.embed = normal(rngs, table, ("vocab", "embed"), std)
        self.layers = Layers([Block(config, i, rngs) for i in range(config.num_layers)])
        self.final_norm = RMSNorm(config.embed_dim, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = normal(rngs, table[::-1], ("embed", "vocab"), 0.01)

    def embedded(self, tokens, positions):
        del positions  # attention turns by them
        return embed(self.embed, tokens, jnp.dtype(self.config.dtype))
