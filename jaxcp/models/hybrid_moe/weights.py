# SPDX-License-Identifier: Apache-2.0
"""Tensors of a hybrid MoE, as the hub has them; aliases are those of transformers in memory and of
Tencent. The first name is written where the checkpoint that was read had no other.

Axes as in `decoder_rows`. A torch Linear stores `[out, in]`; gpt-oss's experts are `[in, out]`.
"""

import dataclasses
import functools
import logging
from collections.abc import Collection, Mapping

from jaxcp.models import mtp_rows
from jaxcp.models.decoder_rows import (
    ATTENTION,
    EXPERTS,
    FUSED_EXPERTS,
    GATED_MLP,
    MODEL,
    NORMS,
    ROUTER,
    SELECTION_BIAS,
    SHARED_EXPERTS,
    in_layer,
)
from jaxcp.models.hybrid_moe import hf
from jaxcp.models.hybrid_moe.config import HybridMoEConfig
from jaxcp.models.weight_table import Row

log = logging.getLogger(__name__)

GATE_AND_UP, GATE_AND_UP_BIAS = ("mlp.gate", "mlp.up"), ("mlp.gate_bias", "mlp.up_bias")
# ours, where the embedding sees more than one token
NGRAM = (
    Row("model.embed_ngram.weight", "v c", "ngram.table", "v c"),
    Row("model.ngram_proj.weight", "d (w c)", "ngram.proj", "w c d"),
)
NORMS_OF_ALL_HEADS = (
    in_layer("self_attn.q_norm.weight", "(n h)", "attention.q_norm.scale", "n h"),
    in_layer("self_attn.k_norm.weight", "(k h)", "attention.k_norm.scale", "k h"),
)
SINKS = in_layer("self_attn.sinks", "n", "attention.sinks", "n")
EXPERT_BIASES = (
    in_layer("mlp.experts.gate_up_proj_bias", "e f", GATE_AND_UP_BIAS, "e f", join=1,
             interleaved=True),
    in_layer("mlp.experts.down_proj_bias", "e d", "mlp.down_bias", "e d"),
)  # fmt: skip
ROUTER_BIAS = in_layer("mlp.router.bias", "e", "mlp.router_linear_bias", "e")


def _shared(kind: str, axes: str, leaf_axes: str) -> Row:
    names = f"mlp.shared_mlp.{kind}_proj.weight", f"mlp.shared_experts.{kind}_proj.weight"
    return in_layer(names, axes, f"mlp.shared.{kind}", leaf_axes)


HY_V3 = (
    *GATED_MLP,
    in_layer(
        ("mlp.router.gate.weight", "mlp.gate.weight", "mlp.gate.wg.weight"), "e d", "mlp.router",
        "d e",
    ),
    in_layer(("mlp.expert_bias", "mlp.e_score_correction_bias"), "e", "mlp.router_bias", "e"),
    *EXPERTS,
    _shared("gate", "f d", "d f"),
    _shared("up", "f d", "d f"),
    _shared("down", "d f", "f d"),
)  # fmt: skip
GPT_OSS = (
    SINKS,
    in_layer("mlp.router.weight", "e d", "mlp.router", "d e"),
    ROUTER_BIAS,
    # the same names as transformers' fused ones, in another order: never in one table
    in_layer("mlp.experts.gate_up_proj", "e d f", GATE_AND_UP, "e d f", join=2, interleaved=True),
    in_layer("mlp.experts.down_proj", "e f d", "mlp.down", "e f d"),
    *EXPERT_BIASES,
)
MINIMAX_M2 = (
    *NORMS_OF_ALL_HEADS,
    in_layer(("block_sparse_moe.gate.weight", "mlp.gate.weight"), "e d", "mlp.router", "d e"),
    in_layer(
        ("block_sparse_moe.e_score_correction_bias", "mlp.e_score_correction_bias"), "e",
        "mlp.router_bias", "e",
    ),
    in_layer("block_sparse_moe.experts.{e}.w1.weight", "f d", "mlp.gate", "e d f"),
    in_layer("block_sparse_moe.experts.{e}.w3.weight", "f d", "mlp.up", "e d f"),
    in_layer("block_sparse_moe.experts.{e}.w2.weight", "d f", "mlp.down", "e f d"),
    *FUSED_EXPERTS,
)  # fmt: skip
FEATURES = {
    "hy_v3": HY_V3,
    "qwen3_moe": (*GATED_MLP, ROUTER, *EXPERTS),
    "gpt_oss": GPT_OSS,
    "glm4_moe": (*GATED_MLP, ROUTER, SELECTION_BIAS, *EXPERTS, *SHARED_EXPERTS),
    "minimax_m2": MINIMAX_M2,
    "mimo_v2_flash": (
        in_layer(("self_attn.attention_sink_bias", "self_attn.sinks"), "n", "attention.sinks", "n"),
        *GATED_MLP,
        ROUTER,
        SELECTION_BIAS,
        *EXPERTS,
    ),
}
"""Rows of layers beside norms and attention, by model_type."""
MIXTURE = (*HY_V3, *NORMS_OF_ALL_HEADS, SINKS, ROUTER_BIAS, *EXPERT_BIASES)
MTP_OF_MIMO, FIRST_OF_MIMO = "model.mtp.", "model.mtp.layers.0."
"""Each layer drafts another token; of the first, applied again, all are drafted."""
MLP_NORM_OF_MIMO = in_layer(
    ("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"), "d", "mlp_norm.scale", "d"
)

COPIES = {"lm_head.weight": "embed"}


def copies(config: HybridMoEConfig) -> Mapping[str, str]:
    """`COPIES`, where the head is tied; what GLM's MTP layer has again."""
    of_mtp = mtp_rows.copies_of_mtp(config) if hf.model_type(config) == "glm4_moe" else {}
    return {**(COPIES if config.tie_embeddings else {}), **of_mtp}


@functools.lru_cache(maxsize=8)
def table(config: HybridMoEConfig) -> tuple[Row, ...]:
    """Every tensor of a model of this configuration."""
    model_type = hf.model_type(config)
    block = (*NORMS, *ATTENTION, *FEATURES.get(model_type, MIXTURE))
    if model_type == "mimo_v2_flash":
        own = NORMS[0], MLP_NORM_OF_MIMO, *ATTENTION, *FEATURES[model_type]
        drafts = mtp_rows.mtp_rows(config, mtp_rows.FINAL_NORM, own, FIRST_OF_MIMO)
        return (*MODEL, *block, *drafts)
    norm = mtp_rows.SHARED_HEAD_NORM if model_type == "glm4_moe" else mtp_rows.FINAL_NORM
    return (*MODEL, *NGRAM, *block, *mtp_rows.mtp_rows(config, norm, block))


def fit(config: HybridMoEConfig, names: Collection[str]) -> HybridMoEConfig:
    """The configuration of what a checkpoint with these tensors holds.

    MiMo's config.json is silent on its layers that draft.
    """
    if hf.model_type(config) != "mimo_v2_flash":
        return mtp_rows.fit(config, names)
    there = any(name.startswith(FIRST_OF_MIMO) for name in names)
    if config.num_mtp_layers is None and there and config.window is not None:
        return dataclasses.replace(config, num_mtp_layers=1, mtp_kind="L")
    if config.num_mtp_layers and not there:
        log.info("config.json speaks of an MTP layer; the checkpoint has none, and is read so")
        return dataclasses.replace(config, num_mtp_layers=0, mtp_kind="G")
    return config


def left_out(names: Collection[str], config: HybridMoEConfig) -> frozenset[str]:
    """An MTP layer that config.json does not speak of; of MiMo all but the first."""
    if hf.model_type(config) != "mimo_v2_flash":
        return mtp_rows.left_out(names, config)
    first = FIRST_OF_MIMO if config.num_mtp_layers else ()
    own = (name for name in names if name.startswith(MTP_OF_MIMO))
    return frozenset(name for name in own if not name.startswith(first))
