# SPDX-License-Identifier: Apache-2.0
"""Kimi Linear: Kimi delta attention, and every few layers latent attention without positions."""

from flax import nnx

from jaxcp.layers.block import ResidualBlock
from jaxcp.layers.gated_delta import KimiDelta
from jaxcp.layers.mla import LatentAttention
from jaxcp.layers.mlp import GatedMLP
from jaxcp.layers.moe import MoE
from jaxcp.layers.norm import RMSNorm
from jaxcp.models.decoder import Decoder
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


class KimiLinear(Decoder):
    """A Kimi Linear, by `KimiLinearConfig`.

    >>> model = jaxcp.KimiLinear(config, rngs=nnx.Rngs(0))
    """

    block = Block
