# SPDX-License-Identifier: Apache-2.0
"""Tensors of Llama, Mistral, Qwen2 and Qwen3, which have the same names.

Axes: `v` vocabulary, `d` embed, `n` heads, `k` kv heads, `h` head, `f` mlp. A torch Linear stores
`[out, in]`.
"""

import re
from collections.abc import Collection, Mapping

from jaxcp.models.dense.config import DenseConfig
from jaxcp.models.weight_table import Row


def _layer(name: str, axes: str, path: str, leaf_axes: str) -> Row:
    return Row(f"model.layers.{{i}}.{name}", axes, f"layers.{{i}}.{path}", leaf_axes)


TABLE = (
    Row("model.embed_tokens.weight", "v d", "embed", "v d"),
    _layer("input_layernorm.weight", "d", "attention_norm.scale", "d"),
    _layer("self_attn.q_proj.weight", "(n h) d", "attention.q", "d n h"),
    _layer("self_attn.k_proj.weight", "(k h) d", "attention.k", "d k h"),
    _layer("self_attn.v_proj.weight", "(k h) d", "attention.v", "d k h"),
    _layer("self_attn.o_proj.weight", "d (n h)", "attention.o", "n h d"),
    _layer("self_attn.q_proj.bias", "(n h)", "attention.q_bias", "n h"),
    _layer("self_attn.k_proj.bias", "(k h)", "attention.k_bias", "k h"),
    _layer("self_attn.v_proj.bias", "(k h)", "attention.v_bias", "k h"),
    _layer("self_attn.o_proj.bias", "d", "attention.o_bias", "d"),
    _layer("self_attn.q_norm.weight", "h", "attention.q_norm.scale", "h"),
    _layer("self_attn.k_norm.weight", "h", "attention.k_norm.scale", "h"),
    _layer("post_attention_layernorm.weight", "d", "mlp_norm.scale", "d"),
    _layer("mlp.gate_proj.weight", "f d", "mlp.gate", "d f"),
    _layer("mlp.up_proj.weight", "f d", "mlp.up", "d f"),
    _layer("mlp.down_proj.weight", "d f", "mlp.down", "f d"),
    _layer("mlp.gate_proj.bias", "f", "mlp.gate_bias", "f"),
    _layer("mlp.up_proj.bias", "f", "mlp.up_bias", "f"),
    _layer("mlp.down_proj.bias", "d", "mlp.down_bias", "d"),
    Row("model.norm.weight", "d", "final_norm.scale", "d"),
    Row("lm_head.weight", "v d", "lm_head", "d v"),
)

COPIES = {"lm_head.weight": "embed"}


def copies(config: DenseConfig) -> Mapping[str, str]:
    """`COPIES`, where the head is tied."""
    return COPIES if config.tie_embeddings else {}


def left_out(names: Collection[str], config: DenseConfig) -> frozenset[str]:
    """Frequencies of the rotary positions, which old checkpoints of Llama carry along."""
    frequencies = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
    return frozenset(filter(frequencies.fullmatch, names))
