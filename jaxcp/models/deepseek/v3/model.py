# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V3 (and R1), and V3.2, whose attention an index makes sparse.

Multi-head latent attention, dense first layers, then experts in groups. Sources: arXiv 2412.19437
and 2512.02556.
"""

import jax.numpy as jnp
from flax import nnx

from jaxcp.layers.block import ResidualBlock
from jaxcp.layers.mla import LatentAttention
from jaxcp.layers.mlp import GatedMLP
from jaxcp.layers.moe import MoE
from jaxcp.layers.norm import RMSNorm
from jaxcp.layers.parameter import normal
from jaxcp.layers.stack import Layers
from jaxcp.models.base import embed
from jaxcp.models.deepseek.v3.config import DeepSeekV3Config
from jaxcp.models.drafting import DraftingModel, JoinedMTP


class Block(ResidualBlock):
    def __init__(self, config: DeepSeekV3Config, layer: int, rngs: nnx.Rngs):
        c = config
        std = c.embed_dim**-0.5
        out_std = std * (2 * c.num_layers) ** -0.5
        self.attention_norm = RMSNorm(c.embed_dim, eps=c.norm_eps)
        self.attention = LatentAttention(
            c.embed_dim,
            c.num_heads,
            c.latent,
            rope=c.rope,
            scale=c.attention_scale,
            index=c.index,
            norm_eps=c.norm_eps,
            std=std,
            out_std=out_std,
            rngs=rngs,
        )
        self.mlp_norm = RMSNorm(c.embed_dim, eps=c.norm_eps)
        self.mlp: GatedMLP | MoE
        if layer < c.first_dense_layers:
            self.mlp = GatedMLP(c.embed_dim, c.mlp_dim, std=std, out_std=out_std, rngs=rngs)
        else:
            self.mlp = MoE(
                c.embed_dim,
                c.moe_dim,
                num_experts=c.num_experts,
                num_experts_per_tok=c.num_experts_per_tok,
                num_shared_experts=c.num_shared_experts,
                routing=c.routing,
                reproducible=c.reproducible_experts,
                std=std,
                out_std=out_std,
                rngs=rngs,
            )


class DeepSeekV3(DraftingModel):
    """DeepSeek-V3, V3.2 and Kimi K2, with random weights: `DeepSeekV3(config, rngs=nnx.Rngs(0))`.

    `model(tokens [B, T], positions [B, T])` gives float32 logits `[B, T, V]`. A published MTP
    layer was never run here.
    """

    def __init__(self, config: DeepSeekV3Config, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = normal(rngs, (config.vocab_size, config.embed_dim), ("vocab", "embed"), 1.0)
        self.layers = Layers([Block(config, i, rngs) for i in range(config.num_layers)])
        self.final_norm = RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.lm_head = normal(rngs, (config.embed_dim, config.vocab_size), ("embed", "vocab"), 0.01)
        if config.num_mtp_layers:
            self.mtp = JoinedMTP(
                config.embed_dim,
                norm=lambda: RMSNorm(config.embed_dim, eps=config.norm_eps),
                block=lambda: Block(config, config.num_layers, rngs),
                rngs=rngs,
            )

    def embedded(self, tokens, positions):
        del positions  # attention turns by them
        return embed(self.embed, tokens, jnp.dtype(self.config.dtype))
