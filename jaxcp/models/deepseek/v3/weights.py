# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V3's and V3.2's tensors; the fused experts are those of transformers in memory.

Axes as in `decoder_rows`, and: `q` and `l` the latents (`l` with the rotated key part where it is
projected), `i` index heads, `c` index head.
"""

import functools
from collections.abc import Mapping

from jaxcp.models.decoder_rows import (
    EXPERTS,
    GATED_MLP,
    MODEL,
    NORMS,
    OUTPUT,
    ROUTER,
    SELECTION_BIAS,
    SHARED_EXPERTS,
    in_layer,
)
from jaxcp.models.deepseek.v3.config import DeepSeekV3Config
from jaxcp.models.mtp_rows import SHARED_HEAD_NORM, copies_of_mtp, fit, left_out, mtp_rows
from jaxcp.models.weight_table import Row

__all__ = ["COPIES", "TABLE", "copies", "fit", "left_out", "table"]

TABLE = (
    *MODEL,
    *NORMS,
    in_layer("self_attn.q_a_proj.weight", "q d", "attention.q_down", "d q"),
    in_layer("self_attn.q_a_layernorm.weight", "q", "attention.q_norm.scale", "q"),
    in_layer("self_attn.q_b_proj.weight", "(n h) q", "attention.q_up", "q n h"),
    in_layer("self_attn.kv_a_proj_with_mqa.weight", "l d", "attention.kv_down", "d l"),
    in_layer("self_attn.kv_a_layernorm.weight", "l", "attention.kv_norm.scale", "l"),
    in_layer("self_attn.kv_b_proj.weight", "(n h) l", "attention.kv_up", "l n h"),
    OUTPUT,
    # the index of V3.2
    in_layer("self_attn.indexer.wq_b.weight", "(i c) q", "attention.index.q", "q i c"),
    in_layer("self_attn.indexer.wk.weight", "c d", "attention.index.k", "d c"),
    in_layer("self_attn.indexer.k_norm.weight", "c", "attention.index.k_norm.scale", "c"),
    in_layer("self_attn.indexer.k_norm.bias", "c", "attention.index.k_norm.bias", "c"),
    in_layer("self_attn.indexer.weights_proj.weight", "i d", "attention.index.weights", "d i"),
    *GATED_MLP,
    ROUTER,
    SELECTION_BIAS,
    *EXPERTS,
    *SHARED_EXPERTS,
)

COPIES: Mapping[str, str] = {}
copies = copies_of_mtp


@functools.lru_cache(maxsize=8)
def table(config: DeepSeekV3Config) -> tuple[Row, ...]:
    """Every tensor of a model of this configuration."""
    return (*TABLE, *mtp_rows(config, SHARED_HEAD_NORM, TABLE))
