# SPDX-License-Identifier: Apache-2.0
"""GPT-2: learned positions, LayerNorm before each sublayer, tied head."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxcp.layers.attention import Attention
from jaxcp.layers.mlp import ACTIVATIONS, MLP
from jaxcp.layers.norm import LayerNorm
from jaxcp.layers.parameter import normal
from jaxcp.models.base import LanguageModel, embed

HF_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """`max_positions` is the longest sequence that the position table covers."""

    vocab_size: int
    max_positions: int
    num_layers: int
    num_heads: int
    embed_dim: int
    mlp_dim: int | None = None
    norm_eps: float = 1e-5
    activation: str = "gelu_tanh"
    use_bias: bool = True
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self):
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads must divide embed_dim; got {self.num_heads} and {self.embed_dim}"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {sorted(ACTIVATIONS)}; got {self.activation!r}"
            )
        if self.mlp_dim is None:
            object.__setattr__(self, "mlp_dim", 4 * self.embed_dim)

    @classmethod
    def from_hf(cls, d: dict[str, Any]) -> "GPTConfig":
        """From a `config.json` of model_type gpt2."""
        activation = d.get("activation_function", "gelu_new")
        if activation not in HF_ACTIVATIONS:
            raise ValueError(
                f"gpt2: activation_function must be one of {sorted(HF_ACTIVATIONS)}; "
                f"got {activation!r}"
            )
        for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
            if d.get(key):
                raise NotImplementedError(f"gpt2: {key}=true is not supported")
        return cls(
            vocab_size=d["vocab_size"],
            max_positions=d["n_positions"],
            num_layers=d["n_layer"],
            num_heads=d["n_head"],
            embed_dim=d["n_embd"],
            mlp_dim=d.get("n_inner") or 4 * d["n_embd"],
            norm_eps=d["layer_norm_epsilon"],
            activation=HF_ACTIVATIONS[activation],
            dtype=d.get("dtype") or d.get("torch_dtype") or "float32",
        )

    def to_hf(self) -> dict[str, Any]:
        """What `from_hf` reads."""
        if not self.use_bias:
            raise NotImplementedError(
                "the gpt2 format has biases; a model with use_bias=False cannot be saved in it"
            )
        activation = {ours: theirs for theirs, ours in reversed(HF_ACTIVATIONS.items())}[
            self.activation
        ]
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": self.vocab_size,
            "n_positions": self.max_positions,
            "n_layer": self.num_layers,
            "n_head": self.num_heads,
            "n_embd": self.embed_dim,
            "n_inner": self.mlp_dim,
            "layer_norm_epsilon": self.norm_eps,
            "activation_function": activation,
            "tie_word_embeddings": True,
            "dtype": self.dtype,
        }


class Block(nnx.Module):
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
            layer=layer,
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

    def __call__(self, x, positions, attend):
        x = x + self.attention(self.attention_norm(x), positions, attend)
        return x + self.mlp(self.mlp_norm(x))


class GPT(LanguageModel):
    """GPT-2 (nanoGPT scale). `GPT(config, rngs=nnx.Rngs(0))`."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = normal(rngs, (config.vocab_size, config.embed_dim), ("vocab", "embed"), 0.02)
        self.position_embed = normal(
            rngs, (config.max_positions, config.embed_dim), ("positions", "embed"), 0.02
        )
        self.layers = nnx.List([Block(config, i, rngs) for i in range(config.num_layers)])
        self.final_norm = LayerNorm(config.embed_dim, eps=config.norm_eps)

    def forward(self, tokens, positions, attend):
        dtype = jnp.dtype(self.config.dtype)
        x = embed(self.embed, tokens, dtype) + embed(self.position_embed, positions, dtype)
        for layer in self.layers:
            block = self.recomputed(_block, attend, static_argnums=3)
            x = block(layer, x, positions, attend)
        return self.final_norm(x), None

    def cache_shape(self):
        c = self.config
        return {
            "layers": c.num_layers,
            "num_kv_heads": c.num_heads,
            "head_dim": c.embed_dim // c.num_heads,
        }

    def head_kernel(self):
        return self.embed.get_value().T


def _block(layer, x, positions, attend):
    return layer(x, positions, attend)
