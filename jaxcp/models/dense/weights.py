# SPDX-License-Identifier: Apache-2.0
"""Tensors of Llama, Mistral, Qwen2 and Qwen3, whose names are those of `decoder_rows`."""

import re
from collections.abc import Collection, Mapping

from jaxcp.models.decoder_rows import ATTENTION, GATED_MLP, MODEL, NORMS, in_layer
from jaxcp.models.dense.config import DenseConfig

TABLE = (
    *MODEL,
    *NORMS,
    *ATTENTION,
    *GATED_MLP,
    in_layer("mlp.gate_proj.bias", "f", "mlp.gate_bias", "f"),
    in_layer("mlp.up_proj.bias", "f", "mlp.up_bias", "f"),
    in_layer("mlp.down_proj.bias", "d", "mlp.down_bias", "d"),
)

COPIES = {"lm_head.weight": "embed"}


def copies(config: DenseConfig) -> Mapping[str, str]:
    """`COPIES`, where the head is tied."""
    return COPIES if config.tie_embeddings else {}


def left_out(names: Collection[str], config: DenseConfig) -> frozenset[str]:
    """Frequencies of the rotary positions, which old checkpoints of Llama carry along."""
    frequencies = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
    return frozenset(filter(frequencies.fullmatch, names))
