# SPDX-License-Identifier: Apache-2.0
"""Kimi Linear: Kimi delta attention, and every few layers latent attention without positions."""

import jax.numpy as jnp
from flax import nnx

from jaxcp.layers.block import ResidualBlock
from jaxcp.layers.gated_delta import KimiDelta
from jaxcp.layers.mla import LatentAttention
from jaxcp.layers.mlp import GatedMLP
from jaxcp.layers.moe import MoE
from jaxcp.layers.norm import RMSNorm
from jaxcp.layers.parameter import normal
from jaxcp.layers.stack import Layers
from jaxcp.models.base import LanguageModel, embed
from jaxcp.models.kimi_linear.config import KimiLinearConfig

LATENT_EPS = 1e-6
"""The epsilon of the norms of latents, whatever config.json says."""


class Block(ResidualBlock):
    def __init__(self, config: KimiLinearConfig, layer: int, rngs: nnx.Rngs):
        c, latent = config, config.latent
        std = c.embed_dim**-0.5
        init = {"std": std, "out_std": std * (2 * c.num_layers) ** -0.5, "rngs": rngs}
        self.attention_norm = RMSNorm(c.embed_dim, eps=c.norm_eps)
        if c.kind(layer) == "R":
            self.attention = KimiDelta(
                c.embed_dim, c.delta, rank=c.delta.value_dim, norm_eps=c.norm_eps, **init
            )
        else:
            self.attention = LatentAttention(
                c.embed_dim, c.num_heads, latent, rope=None, norm_eps=LATENT_EPS,
                scale=(latent.nope_dim + latent.rope_dim) ** -0.5, **init,
            )  # fmt: skip
        self.mlp_norm = RMSNorm(c.embed_dim, eps=c.norm_eps)
        self.mlp: GatedMLP | MoE
        if layer < c.first_dense_layers:
            self.mlp = GatedMLP(c.embed_dim, c.mlp_dim, **init)
        else:
            self.mlp = MoE(
                c.embed_dim, c.moe_dim, num_experts=c.num_experts,
                num_experts_per_tok=c.num_experts_per_tok,
                num_shared_experts=c.num_shared_experts, routing=c.routing, **init,
            )  # fmt: skip


class KimiLinear(LanguageModel):
    """A Kimi Linear, by `KimiLinearConfig`.

    `model(tokens, positions)` gives float32 logits `[B, T, V]`; `jaxcp.logits` and an `Engine` see
    to layout and padding.

    >>> model = jaxcp.KimiLinear(config, rngs=nnx.Rngs(0))
    """

    def __init__(self, config: KimiLinearConfig, *, rngs: nnx.Rngs):
        self.config = config
        table = config.vocab_size, config.embed_dim
        std = 0.02 if config.tie_embeddings else 1.0
        self.embed = normal(rngs, table, ("vocab", "embed"), std)
        self.layers = Layers([Block(config, i, rngs) for i in range(config.num_layers)])
        self.final_norm = RMSNorm(config.embed_dim, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = normal(rngs, table[::-1], ("embed", "vocab"), 0.01)

    def embedded(self, tokens, positions):
        del positions  # no layer turns by them
        return embed(self.embed, tokens, jnp.dtype(self.config.dtype))
