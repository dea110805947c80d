# SPDX-License-Identifier: Apache-2.0
"""GPT-2: learned positions, LayerNorm before each sublayer, a head that is tied or not."""

import jax.numpy as jnp
from flax import nnx

from jaxcp.layers.attention import Attention
from jaxcp.layers.block import ResidualBlock
from jaxcp.layers.mlp import MLP
from jaxcp.layers.norm import LayerNorm
from jaxcp.layers.parameter import normal
from jaxcp.layers.stack import Layers
from jaxcp.models.base import LanguageModel, embed
from jaxcp.models.gpt.config import GPTConfig


class Block(ResidualBlock):
    def __init__(self, config: GPTConfig, layer: int, rngs: nnx.Rngs):
        std, out_std = 0.02, 0.02 * (2 * config.num_layers) ** -0.5
        heads = config.num_heads
        assert config.mlp_dim is not None  # __post_init__ sets it
        self.attention_norm = LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.attention = Attention(
            config.embed_dim,
            heads,
            heads,
            config.embed_dim // heads,
            std=std,
            out_std=out_std,
            use_bias=config.use_bias,
            rngs=rngs,
        )
        self.mlp_norm = LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.mlp = MLP(
            config.embed_dim,
            config.mlp_dim,
            activation=config.activation,
            use_bias=config.use_bias,
            std=std,
            out_std=out_std,
            rngs=rngs,
        )


class GPT(LanguageModel):
    """GPT-2, at nanoGPT's scale: learned positions, LayerNorm, dense layers.

    `model(tokens, positions)` gives float32 logits `[B, T, V]`; `jaxcp.logits` and an `Engine` see
    to layout and padding.

    >>> model = jaxcp.GPT(config, rngs=nnx.Rngs(0))
    """

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = normal(rngs, (config.vocab_size, config.embed_dim), ("vocab", "embed"), 0.02)
        self.position_embed = normal(
            rngs, (config.max_positions, config.embed_dim), ("positions", "embed"), 0.02
        )
        self.layers = Layers([Block(config, i, rngs) for i in range(config.num_layers)])
        self.final_norm = LayerNorm(config.embed_dim, eps=config.norm_eps)
        if not config.tie_embeddings:
            head = config.embed_dim, config.vocab_size
            self.lm_head = normal(rngs, head, ("embed", "vocab"), 0.02)

    def embedded(self, tokens, positions):
        dtype = jnp.dtype(self.config.dtype)
        return embed(self.embed, tokens, dtype) + embed(self.position_embed, positions, dtype)
