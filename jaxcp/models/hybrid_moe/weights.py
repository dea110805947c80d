# SPDX-License-Identifier: Apache-2.0
"""Hy3's tensors, as the hub has them; aliases are those of transformers in memory and of Tencent.

Axes: `v` vocabulary, `d` embed, `n` heads, `k` kv heads, `h` head, `f` mlp or expert width,
`e` experts. A torch Linear stores `[out, in]`.
"""

from collections.abc import Collection, Mapping
from typing import Any

from jaxcp.models.weight_table import Row


def _layer(
    names: str | tuple[str, ...],
    axes: str,
    paths: str | tuple[str, ...],
    leaf_axes: str,
    join: int = 0,
) -> Row:
    names = (names,) if isinstance(names, str) else names
    paths = (paths,) if isinstance(paths, str) else paths
    return Row(
        tuple(f"model.layers.{{i}}.{name}" for name in names),
        axes,
        tuple(f"layers.{{i}}.{path}" for path in paths),
        leaf_axes,
        join,
    )


def _shared(kind: str) -> tuple[str, str]:
    return (f"mlp.shared_mlp.{kind}_proj.weight", f"mlp.shared_experts.{kind}_proj.weight")


_ROUTER = ("mlp.router.gate.weight", "mlp.gate.weight", "mlp.gate.wg.weight")
_ROUTER_BIAS = ("mlp.expert_bias", "mlp.e_score_correction_bias")

TABLE = (
    Row("model.embed_tokens.weight", "v d", "embed", "v d"),
    # ours, where config.json has ngram_width
    Row("model.embed_ngram.weight", "v c", "ngram.table", "v c"),
    Row("model.ngram_proj.weight", "d (w c)", "ngram.proj", "w c d"),
    _layer("input_layernorm.weight", "d", "attention_norm.scale", "d"),
    _layer("self_attn.q_proj.weight", "(n h) d", "attention.q", "d n h"),
    _layer("self_attn.k_proj.weight", "(k h) d", "attention.k", "d k h"),
    _layer("self_attn.v_proj.weight", "(k h) d", "attention.v", "d k h"),
    _layer("self_attn.o_proj.weight", "d (n h)", "attention.o", "n h d"),
    _layer("self_attn.q_norm.weight", "h", "attention.q_norm.scale", "h"),
    _layer("self_attn.k_norm.weight", "h", "attention.k_norm.scale", "h"),
    _layer("post_attention_layernorm.weight", "d", "mlp_norm.scale", "d"),
    # dense layers
    _layer("mlp.gate_proj.weight", "f d", "mlp.gate", "d f"),
    _layer("mlp.up_proj.weight", "f d", "mlp.up", "d f"),
    _layer("mlp.down_proj.weight", "d f", "mlp.down", "f d"),
    # mixture-of-experts layers; the fused tensors are those of transformers in memory
    _layer(_ROUTER, "e d", "mlp.router", "d e"),
    _layer(_ROUTER_BIAS, "e", "mlp.router_bias", "e"),
    _layer("mlp.experts.{e}.gate_proj.weight", "f d", "mlp.gate", "e d f"),
    _layer("mlp.experts.{e}.up_proj.weight", "f d", "mlp.up", "e d f"),
    _layer("mlp.experts.{e}.down_proj.weight", "d f", "mlp.down", "e f d"),
    _layer("mlp.experts.gate_up_proj", "e f d", ("mlp.gate", "mlp.up"), "e d f", join=1),
    _layer("mlp.experts.down_proj", "e d f", "mlp.down", "e f d"),
    _layer(_shared("gate"), "f d", "mlp.shared.gate", "d f"),
    _layer(_shared("up"), "f d", "mlp.shared.up", "d f"),
    _layer(_shared("down"), "d f", "mlp.shared.down", "f d"),
    Row("model.norm.weight", "d", "final_norm.scale", "d"),
    Row("lm_head.weight", "v d", "lm_head", "d v"),
)

COPIES: Mapping[str, str] = {}


def left_out(names: Collection[str], config: Any) -> frozenset[str]:
    """Names that the model has no use for: the layer after the last, which drafts tokens (MTP)."""
    prefix = f"model.layers.{config.num_layers}."
    # Without this projection it is an ordinary layer, num_layers is wrong, and that must show.
    if f"{prefix}eh_proj.weight" not in names:
        return frozenset()
    return frozenset(name for name in names if name.startswith(prefix))
