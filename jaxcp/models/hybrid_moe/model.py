# SPDX-License-Identifier: Apache-2.0
"""Hy3, Qwen3-MoE, gpt-oss, GLM-4.5, MiniMax-M2, MiMo-V2-Flash and what lies between: grouped-query
attention and experts.

Dense layers first, then mixture of experts. The layer pattern adds layers with a sliding window
and layers without rotary positions.
"""

import jax.numpy as jnp
from flax import nnx

from jaxcp.layers.attention import Attention
from jaxcp.layers.block import ResidualBlock
from jaxcp.layers.mlp import GatedMLP
from jaxcp.layers.moe import MoE
from jaxcp.layers.ngram import NGram
from jaxcp.layers.norm import RMSNorm
from jaxcp.layers.parameter import normal
from jaxcp.layers.stack import Layers
from jaxcp.models.base import embed
from jaxcp.models.drafting import DraftingModel, JoinedMTP
from jaxcp.models.hybrid_moe.config import HybridMoEConfig


class Block(ResidualBlock):
    def __init__(self, config: HybridMoEConfig, layer: int, rngs: nnx.Rngs):
        c, kind, heads = config, config.kind(layer), config.heads(layer)
        std = c.embed_dim**-0.5
        out_std = std * (2 * c.num_layers) ** -0.5
        self.attention_norm = norm(c)
        self.attention = Attention(
            c.embed_dim,
            heads.num_heads,
            heads.num_kv_heads,
            heads.head_dim,
            std=std,
            out_std=out_std,
            value_dim=heads.value_dim,
            value_scale=c.attention.value_scale,
            qk_norm_eps=c.norm.eps if c.attention.qk_norm else None,
            qk_norm_together=c.attention.qk_norm_together,
            qk_gain=1.2 if kind == "L" else 1.5,
            rope=None if kind == "N" else heads.rope,
            window=c.window if kind == "L" else None,
            use_bias=c.attention.use_bias,
            output_bias=c.attention.output_bias,
            sinks=heads.sinks,
            rngs=rngs,
        )
        self.mlp_norm = norm(c)
        self.mlp: GatedMLP | MoE
        if c.is_dense(layer):
            self.mlp = GatedMLP(c.embed_dim, c.mlp_dim, std=std, out_std=out_std, rngs=rngs)
        else:
            self.mlp = MoE(
                c.embed_dim,
                c.moe_dim,
                num_experts=c.num_experts,
                num_experts_per_tok=c.num_experts_per_tok,
                num_shared_experts=c.experts.num_shared,
                routing=c.experts.routing,
                activation=c.experts.activation,
                use_bias=c.experts.use_bias,
                float32_sum=c.experts.float32_sum,
                reproducible=c.reproducible_experts,
                std=std,
                out_std=out_std,
                rngs=rngs,
            )


class HybridMoE(DraftingModel):
    """A stack of full, window and position-free attention with dense and mixture-of-experts layers.

    Hy3, Qwen3-MoE, gpt-oss, GLM-4.5, MiniMax-M2, MiMo-V2-Flash and mixtures of their features, by
    `HybridMoEConfig`. `model(tokens, positions)` gives float32 logits `[B, T, V]`.

    >>> model = jaxcp.HybridMoE(config, rngs=nnx.Rngs(0))
    """

    def __init__(self, config: HybridMoEConfig, *, rngs: nnx.Rngs):
        self.config = config
        table = config.vocab_size, config.embed_dim
        std = 0.02 if config.tie_embeddings else 1.0
        self.embed = normal(rngs, table, ("vocab", "embed"), std)
        if config.ngram.width > 1:
            self.ngram = NGram(
                config.vocab_size, config.ngram.dim, config.ngram.width, config.embed_dim, rngs=rngs
            )
        self.layers = Layers([Block(config, i, rngs) for i in range(config.num_layers)])
        self.final_norm = norm(config)
        if not config.tie_embeddings:
            self.lm_head = normal(rngs, table[::-1], ("embed", "vocab"), 0.01)
        if config.num_mtp_layers:
            self.mtp = JoinedMTP(
                config.embed_dim,
                norm=lambda: norm(config),
                block=lambda: Block(config, config.num_layers, rngs),
                embeds_first=config.mtp_kind == "L",
                rngs=rngs,
            )

    def embedded(self, tokens, positions):
        del positions  # attention turns by them, or nothing does
        dtype, width = jnp.dtype(self.config.dtype), self.config.ngram.width
        if tokens.shape[2:] != ((width,) if width > 1 else ()):
            raise ValueError(
                f"this model embeds windows of {width} tokens; got ids {tokens.shape}. "
                "Make them with jaxcp.data.windows.windows before the layout permutes, "
                "or use jaxcp.logits"
            )
        if width == 1:
            return embed(self.embed, tokens, dtype)
        return embed(self.embed, tokens[..., 0], dtype) + self.ngram(tokens, dtype)


def norm(config: HybridMoEConfig) -> RMSNorm:
    """Make a norm of the residual stream."""
    c = config.norm
    return RMSNorm(config.embed_dim, eps=c.eps, float32_scale=c.float32_scale)
