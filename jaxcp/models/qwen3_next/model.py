# SPDX-License-Identifier: Apache-2.0
"""Qwen3-Next and Qwen3.5: recurrent layers and gated full attention, with experts or an MLP."""

from flax import nnx

from jaxcp.layers.block import ResidualBlock
from jaxcp.layers.gated_attention import GatedAttention
from jaxcp.layers.gated_delta import GatedDelta
from jaxcp.layers.mlp import GatedMLP
from jaxcp.layers.moe import MoE
from jaxcp.layers.norm import ZeroCentredRMSNorm
from jaxcp.layers.routing import Routing
from jaxcp.models.decoder import Decoder
from jaxcp.models.drafting import DraftingModel, JoinedMTP
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


class Qwen3Next(DraftingModel, Decoder):
    """A Qwen3-Next or Qwen3.5 (its text part), by `Qwen3NextConfig`.

    >>> model = jaxcp.Qwen3Next(config, rngs=nnx.Rngs(0))
    """

    block = Block
    norm = ZeroCentredRMSNorm

    def __init__(self, config: Qwen3NextConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        if config.num_mtp_layers:
            self.mtp = JoinedMTP(
                config.embed_dim,
                norm=lambda: ZeroCentredRMSNorm(config.embed_dim, eps=config.norm_eps),
                block=lambda: Block(config, config.num_layers, rngs),
                embeds_first=True,
                rngs=rngs,
            )
