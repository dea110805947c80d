# SPDX-License-Identifier: Apache-2.0
"""Llama, Mistral, Qwen2 and Qwen3: grouped-query attention and a gated MLP in every layer."""

from flax import nnx

from jaxcp.layers.attention import Attention
from jaxcp.layers.block import ResidualBlock
from jaxcp.layers.mlp import GatedMLP
from jaxcp.layers.norm import RMSNorm
from jaxcp.models.decoder import Decoder
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


class DenseModel(Decoder):
    """A Llama, Mistral, Qwen2 or Qwen3, by `DenseConfig`.

    >>> model = jaxcp.DenseModel(config, rngs=nnx.Rngs(0))
    """

    block = Block
