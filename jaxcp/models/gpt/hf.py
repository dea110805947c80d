# SPDX-License-Identifier: Apache-2.0
"""config.json of GPT-2, in both directions."""

from collections.abc import Mapping
from typing import Any

from jaxcp.models.gpt.config import GPTConfig
from jaxcp.models.hf_config import HFConfig

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
HARMLESS = (
    *("attn_pdrop", "embd_pdrop", "resid_pdrop", "classifier_dropout"),  # of training
    *("summary_type", "summary_use_proj", "summary_activation"),  # of GPT2DoubleHeadsModel
    *("summary_proj_to_labels", "summary_first_dropout", "summary_last_dropout"),
    "reorder_and_upcast_attn",  # the same in float32, in which attention is computed here
)


def read(fields: Mapping[str, Any]) -> GPTConfig:
    """Read a `config.json` of model_type gpt2.

    Raises:
      KeyError: a field that decides what is computed is not there.
      NotImplementedError: a field with a value, or of a name, that is not known here.
      ValueError: a value that makes no sense, or contradicts another one.
    """
    d = HFConfig(fields, aliases=ALIASES, harmless=HARMLESS)
    activation = d.word("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"gpt2: activation_function must be one of {sorted(ACTIVATIONS)}; got {activation!r}"
        )
    d.only(scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,))
    vocab, positions, width = d.size("vocab_size"), d.size("n_positions"), d.size("n_embd")
    d.agree(n_ctx=positions)
    config = GPTConfig(
        vocab_size=vocab,
        max_positions=positions,
        num_layers=d.count("n_layer"),
        num_heads=d.size("n_head"),
        embed_dim=width,
        mlp_dim=d.size("n_inner", None) or 4 * width,
        norm_eps=d.number("layer_norm_epsilon"),
        activation=ACTIVATIONS[activation],
        tie_embeddings=d.flag("tie_word_embeddings", True),
        dtype=d.dtype(published="float32"),
    )
    d.finish()
    return config


def write(config: GPTConfig) -> dict[str, Any]:
    """Write the fields that `read` takes.

    Raises:
      NotImplementedError: the format cannot express the configuration.
    """
    if not config.use_bias:
        raise NotImplementedError(
            "the gpt2 format has biases; a model with use_bias=False cannot be saved in it"
        )
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.max_positions,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_embd": config.embed_dim,
        "n_inner": config.mlp_dim,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": names[config.activation],
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": config.dtype,
    }
