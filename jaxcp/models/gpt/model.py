# SPDX-License-Identifier: Apache-2.0
"""GPT-2: learned positions, LayerNorm before each sublayer, a head that is tied or not."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxcp.layers.attention import Attention
from jaxcp.layers.mlp import ACTIVATIONS, MLP
from jaxcp.layers.norm import LayerNorm
from jaxcp.layers.parameter import normal
from jaxcp.layers.stack import Layers
from jaxcp.models.base import LanguageModel, embed
from jaxcp.models.hf_config import HFConfig

HF_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
HF_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
HF_HARMLESS = (
    *("attn_pdrop", "embd_pdrop", "resid_pdrop", "classifier_dropout"),  # of training
    *("summary_type", "summary_use_proj", "summary_activation"),  # of GPT2DoubleHeadsModel
    *("summary_proj_to_labels", "summary_first_dropout", "summary_last_dropout"),
    "reorder_and_upcast_attn",  # the same in float32, in which attention is computed here
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a GPT-2: `max_positions` is the longest sequence that its position table covers.

    Raises:
      ValueError: heads that do not divide the width, or an activation that it does not know.
    """

    vocab_size: int
    max_positions: int
    num_layers: int
    num_heads: int
    embed_dim: int
    mlp_dim: int | None = None
    norm_eps: float = 1e-5
    activation: str = "gelu_tanh"
    use_bias: bool = True
    tie_embeddings: bool = True
    """The head is the embedding."""
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
    def from_hf(cls, fields: Mapping[str, Any]) -> "GPTConfig":
        """From a `config.json` of model_type gpt2.

        Raises:
          KeyError: a field that decides what is computed is not there.
          NotImplementedError: a field with a value, or of a name, that is not known here.
          ValueError: a value that makes no sense, or contradicts another one.
        """
        d = HFConfig(fields, aliases=HF_ALIASES, harmless=HF_HARMLESS)
        activation = d.word("activation_function", "gelu_new")
        if activation not in HF_ACTIVATIONS:
            raise ValueError(
                f"gpt2: activation_function must be one of {sorted(HF_ACTIVATIONS)}; "
                f"got {activation!r}"
            )
        d.only(scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,))
        vocab, positions, width = d.size("vocab_size"), d.size("n_positions"), d.size("n_embd")
        d.agree(n_ctx=positions)
        config = cls(
            vocab_size=vocab,
            max_positions=positions,
            num_layers=d.count("n_layer"),
            num_heads=d.size("n_head"),
            embed_dim=width,
            mlp_dim=d.size("n_inner", None) or 4 * width,
            norm_eps=d.number("layer_norm_epsilon"),
            activation=HF_ACTIVATIONS[activation],
            tie_embeddings=d.flag("tie_word_embeddings", True),
            dtype=d.dtype(published="float32"),
        )
        d.finish()
        return config

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
            "tie_word_embeddings": self.tie_embeddings,
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
        return x + self.mlp(self.mlp_norm(x)), None


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

    def forward(self, tokens, positions, attend):
        dtype = jnp.dtype(self.config.dtype)
        x = embed(self.embed, tokens, dtype) + embed(self.position_embed, positions, dtype)
        x, _ = self.through(self.layers, x, attend, positions)
        return self.final_norm(x), None

    def head_kernel(self):
        tied = self.config.tie_embeddings
        return self.embed.get_value().T if tied else self.lm_head.get_value()
