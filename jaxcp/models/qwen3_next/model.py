# SPDX-License-Identifier: Apache-2.0
"""Qwen3-Next and Qwen3.5: recurrent layers and gated full attention, with experts or an MLP."""

import jax.numpy as jnp
from flax import nnx

from jaxcp.layers.block import ResidualBlock
from jaxcp.layers.gated_attention import GatedAttention
from jaxcp.layers.gated_delta import GatedDelta
from jaxcp.layers.mlp import GatedMLP
from jaxcp.layers.moe import MoE
from jaxcp.layers.norm import ZeroCentredRMSNorm
from jaxcp.layers.parameter import normal
from jaxcp.layers.routing import Routing
from jaxcp.layers.stack import Layers
from jaxcp.models.base import LanguageModel, embed
from jaxcp.models.qwen3_next.config import Qwen3NextConfig


class Block(ResidualBlock):
    def __init__(self, config: Qwen3NextConfig, layer: int, rngs: nnx.Rngs):
        c = config
        std = c.embed_dim**-0.5
        init = {"std": std, "out_std": std * (2 * c.num_layers) ** -0.5, "rngs": rngs}
        self.attention_norm = ZeroCentredRMSNorm(c.embed_dim, eps=c.norm_eps)
        if c.kind(layer) == "R":
            self.attention = GatedDelta(c.embed_dim, c.delta, norm_eps=c.norm_eps, **init)
        else:
            self.attention = GatedAttention(
                c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim, rope=c.rope,
                use_bias=c.attention_bias, norm_eps=c.norm_eps, **init,
            )  # fmt: skip
        self.mlp_norm = ZeroCentredRMSNorm(c.embed_dim, eps=c.norm_eps)
        self.mlp: GatedMLP | MoE
        e = c.experts
        if e is None or not c.is_sparse(layer):
            self.mlp = GatedMLP(c.embed_dim, c.mlp_dim or 0, **init)
        else:
            routing = Routing(scores="softmax", selection_bias=False, normalise=e.normalise)
            self.mlp = MoE(
                c.embed_dim, e.dim, num_experts=e.count, num_experts_per_tok=e.per_tok,
                num_shared_experts=1, shared_dim=e.shared_dim, shared_gate=True, routing=routing,
                **init,
            )  # fmt: skip


class Qwen3Next(LanguageModel):
    """A Qwen3-Next or Qwen3.5 (its text part), by `Qwen3NextConfig`.

    `model(tokens, positions)` gives float32 logits `[B, T, V]`; `jaxcp.logits` and an `Engine` see
    to layout and padding.

    >>> model = jaxcp.Qwen3Next(config, rngs=nnx.Rngs(0))
    """

    def __init__(self, config: Qwen3NextConfig, *, rngs: nnx.Rngs):
        self.config = config
        table = config.vocab_size, config.embed_dim
        std = 0.02 if config.tie_embeddings else 1.0
        self.embed = normal(rngs, table, ("vocab", "embed"), std)
        self.layers = Layers([Block(config, i, rngs) for i in range(config.num_layers)])
        self.final_norm = ZeroCentredRMSNorm(config.embed_dim, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = normal(rngs, table[::-1], ("embed", "vocab"), 0.01)

    def embedded(self, tokens, positions):
        del positions  # attention turns by them
        return embed(self.embed, tokens, jnp.dtype(self.config.dtype))
