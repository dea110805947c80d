# SPDX-License-Identifier: Apache-2.0
"""Tensors of Hy3, Qwen3-MoE and gpt-oss, as the hub has them; aliases are those of transformers in
memory and of Tencent. The first name is written where the checkpoint that was read had no other.

Axes: `v` vocabulary, `d` embed, `n` heads, `k` kv heads, `h` head, `f` mlp or expert width,
`e` experts. A torch Linear stores `[out, in]`; gpt-oss's experts are `[in, out]`.
"""

import dataclasses
import functools
import logging
from collections.abc import Collection, Mapping

from jaxcp.models.hybrid_moe import hf
from jaxcp.models.hybrid_moe.config import HybridMoEConfig
from jaxcp.models.weight_table import Row

log = logging.getLogger(__name__)

LAYER = "model.layers.{i}"
EXPERTS = f"{LAYER}.mlp.experts"


def _layer(name: str | tuple[str, ...], axes: str, path: str, leaf_axes: str) -> Row:
    names = (name,) if isinstance(name, str) else name
    return Row(tuple(f"{LAYER}.{n}" for n in names), axes, f"layers.{{i}}.{path}", leaf_axes)


def _both(name: str, axes: str, suffix: str, leaf_axes: str, **options) -> Row:
    paths = f"layers.{{i}}.mlp.gate{suffix}", f"layers.{{i}}.mlp.up{suffix}"
    return Row(f"{EXPERTS}.{name}", axes, paths, leaf_axes, **options)


def _shared(kind: str) -> tuple[str, str]:
    return f"mlp.shared_mlp.{kind}_proj.weight", f"mlp.shared_experts.{kind}_proj.weight"


MODEL = (
    Row("model.embed_tokens.weight", "v d", "embed", "v d"),
    Row("model.norm.weight", "d", "final_norm.scale", "d"),
    Row("lm_head.weight", "v d", "lm_head", "d v"),
    # ours, where the embedding sees more than one token
    Row("model.embed_ngram.weight", "v c", "ngram.table", "v c"),
    Row("model.ngram_proj.weight", "d (w c)", "ngram.proj", "w c d"),
)
ATTENTION = (
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
    _layer("self_attn.sinks", "n", "attention.sinks", "n"),
    _layer("post_attention_layernorm.weight", "d", "mlp_norm.scale", "d"),
)
DENSE = (
    _layer("mlp.gate_proj.weight", "f d", "mlp.gate", "d f"),
    _layer("mlp.up_proj.weight", "f d", "mlp.up", "d f"),
    _layer("mlp.down_proj.weight", "d f", "mlp.down", "f d"),
)
# One tensor an expert; or fused, gate before up, as transformers holds them in memory.
EXPERTS_OUT_IN = (
    _layer("mlp.experts.{e}.gate_proj.weight", "f d", "mlp.gate", "e d f"),
    _layer("mlp.experts.{e}.up_proj.weight", "f d", "mlp.up", "e d f"),
    _layer("mlp.experts.{e}.down_proj.weight", "d f", "mlp.down", "e f d"),
    _both("gate_up_proj", "e f d", "", "e d f", join=1),
    _layer("mlp.experts.down_proj", "e d f", "mlp.down", "e f d"),
)
EXPERT_BIASES = (
    _both("gate_up_proj_bias", "e f", "_bias", "e f", join=1, interleaved=True),
    _layer("mlp.experts.down_proj_bias", "e d", "mlp.down_bias", "e d"),
)
# The same names as transformers' fused ones, in another order: never in one table.
EXPERTS_IN_OUT = (
    _both("gate_up_proj", "e d f", "", "e d f", join=2, interleaved=True),
    _layer("mlp.experts.down_proj", "e f d", "mlp.down", "e f d"),
)
HY3_ROUTER = ("mlp.router.gate.weight", "mlp.gate.weight", "mlp.gate.wg.weight")
SELECTION_BIAS = (
    _layer(("mlp.expert_bias", "mlp.e_score_correction_bias"), "e", "mlp.router_bias", "e"),
)
SHARED = (
    _layer(_shared("gate"), "f d", "mlp.shared.gate", "d f"),
    _layer(_shared("up"), "f d", "mlp.shared.up", "d f"),
    _layer(_shared("down"), "d f", "mlp.shared.down", "f d"),
)
BLOCKS = {
    "hy_v3": (
        *ATTENTION,
        *DENSE,
        _layer(HY3_ROUTER, "e d", "mlp.router", "d e"),
        *SELECTION_BIAS,
        *EXPERTS_OUT_IN,
        *SHARED,
    ),
    "qwen3_moe": (
        *ATTENTION,
        *DENSE,
        _layer("mlp.gate.weight", "e d", "mlp.router", "d e"),
        *EXPERTS_OUT_IN,
    ),
    "gpt_oss": (
        *ATTENTION,
        _layer("mlp.router.weight", "e d", "mlp.router", "d e"),
        _layer("mlp.router.bias", "e", "mlp.router_linear_bias", "e"),
        *EXPERTS_IN_OUT,
        *EXPERT_BIASES,
    ),
}
MIXTURE = (
    *BLOCKS["hy_v3"],
    _layer("mlp.router.bias", "e", "mlp.router_linear_bias", "e"),
    *EXPERT_BIASES,
)
MTP = (
    Row(f"{LAYER}.enorm.weight", "d", "mtp.embed_norm.scale", "d"),
    Row(f"{LAYER}.hnorm.weight", "d", "mtp.hidden_norm.scale", "d"),
    Row(f"{LAYER}.eh_proj.weight", "d (p c)", "mtp.join", "p c d"),
    Row(f"{LAYER}.final_layernorm.weight", "d", "mtp.final_norm.scale", "d"),
)

COPIES = {"lm_head.weight": "embed"}


def copies(config: HybridMoEConfig) -> Mapping[str, str]:
    """`COPIES`, where the head is tied."""
    return COPIES if config.tie_embeddings else {}


@functools.lru_cache(maxsize=8)
def table(config: HybridMoEConfig) -> tuple[Row, ...]:
    """Every tensor of a model of this configuration."""
    block = BLOCKS.get(hf.model_type(config), MIXTURE)
    mtp = (*MTP, *block) if config.num_mtp_layers else ()
    return (*MODEL, *block, *(_mtp(row, config.num_layers) for row in mtp))


def _mtp(row: Row, layer: int) -> Row:
    """A row of the layer after the last."""
    names = tuple(name.replace("{i}", str(layer)) for name in row.all_names)
    paths = tuple(path.replace("layers.{i}.", "mtp.block.") for path in row.all_paths)
    return dataclasses.replace(row, names=names, paths=paths)


def fit(config: HybridMoEConfig, names: Collection[str]) -> HybridMoEConfig:
    """The configuration of what a checkpoint with these tensors holds.

    transformers drops the MTP layer and goes on saying that there is one.
    """
    if config.num_mtp_layers and not any(n.startswith(_after(config)) for n in names):
        log.info("config.json speaks of an MTP layer; the checkpoint has none, and is read so")
        return dataclasses.replace(config, num_mtp_layers=0)
    return config


def left_out(names: Collection[str], config: HybridMoEConfig) -> frozenset[str]:
    """An MTP layer that config.json does not speak of."""
    prefix = _after(config)
    # Without this projection it is an ordinary layer, num_layers is wrong, and that must show.
    if config.num_mtp_layers or f"{prefix}eh_proj.weight" not in names:
        return frozenset()
    return frozenset(name for name in names if name.startswith(prefix))


def _after(config: HybridMoEConfig) -> str:
    return f"model.layers.{config.num_layers}."
