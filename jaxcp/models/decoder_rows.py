# SPDX-License-Identifier: Apache-2.0
"""Rows of weight tables that families share: the names of Llama's tensors, which most took over.

Axes: `v` vocabulary, `d` embed, `n` heads, `k` kv heads, `h` head, `f` mlp or expert width,
`e` experts. A torch Linear stores `[out, in]`.
"""

from jaxcp.models.weight_table import Row

LAYER = "model.layers.{i}"


def in_layer(
    names: str | tuple[str, ...], axes: str, paths: str | tuple[str, ...], leaf_axes: str, **options
) -> Row:
    """A row of every layer: names and paths go on after its number."""
    names, paths = ((x,) if isinstance(x, str) else x for x in (names, paths))
    return Row(
        tuple(f"{LAYER}.{name}" for name in names),
        axes,
        tuple(f"layers.{{i}}.{path}" for path in paths),
        leaf_axes,
        **options,
    )


MODEL = (
    Row("model.embed_tokens.weight", "v d", "embed", "v d"),
    Row("model.norm.weight", "d", "final_norm.scale", "d"),
    Row("lm_head.weight", "v d", "lm_head", "d v"),
)
NORMS = (
    in_layer("input_layernorm.weight", "d", "attention_norm.scale", "d"),
    in_layer("post_attention_layernorm.weight", "d", "mlp_norm.scale", "d"),
)
OUTPUT = in_layer("self_attn.o_proj.weight", "d (n h)", "attention.o", "n h d")
QUERIES = (
    in_layer("self_attn.q_proj.weight", "(n h) d", "attention.q", "d n h"),
    in_layer("self_attn.q_proj.bias", "(n h)", "attention.q_bias", "n h"),
)
KEYS_AND_OUTPUT = (
    in_layer("self_attn.k_proj.weight", "(k h) d", "attention.k", "d k h"),
    in_layer("self_attn.v_proj.weight", "(k h) d", "attention.v", "d k h"),
    OUTPUT,
    in_layer("self_attn.k_proj.bias", "(k h)", "attention.k_bias", "k h"),
    in_layer("self_attn.v_proj.bias", "(k h)", "attention.v_bias", "k h"),
    in_layer("self_attn.o_proj.bias", "d", "attention.o_bias", "d"),
    in_layer("self_attn.q_norm.weight", "h", "attention.q_norm.scale", "h"),
    in_layer("self_attn.k_norm.weight", "h", "attention.k_norm.scale", "h"),
)
ATTENTION = (*QUERIES, *KEYS_AND_OUTPUT)
GATED_MLP = (
    in_layer("mlp.gate_proj.weight", "f d", "mlp.gate", "d f"),
    in_layer("mlp.up_proj.weight", "f d", "mlp.up", "d f"),
    in_layer("mlp.down_proj.weight", "d f", "mlp.down", "f d"),
)
ROUTER = in_layer("mlp.gate.weight", "e d", "mlp.router", "d e")
SELECTION_BIAS = in_layer("mlp.gate.e_score_correction_bias", "e", "mlp.router_bias", "e")
FUSED_EXPERTS = (
    in_layer("mlp.experts.gate_up_proj", "e f d", ("mlp.gate", "mlp.up"), "e d f", join=1),
    in_layer("mlp.experts.down_proj", "e d f", "mlp.down", "e f d"),
)
"""Gate before up, as transformers holds experts in memory."""
EXPERTS = (
    in_layer("mlp.experts.{e}.gate_proj.weight", "f d", "mlp.gate", "e d f"),
    in_layer("mlp.experts.{e}.up_proj.weight", "f d", "mlp.up", "e d f"),
    in_layer("mlp.experts.{e}.down_proj.weight", "d f", "mlp.down", "e f d"),
    *FUSED_EXPERTS,
)
"""One tensor an expert; or fused."""
SHARED_EXPERTS = (
    in_layer("mlp.shared_experts.gate_proj.weight", "f d", "mlp.shared.gate", "d f"),
    in_layer("mlp.shared_experts.up_proj.weight", "f d", "mlp.shared.up", "d f"),
    in_layer("mlp.shared_experts.down_proj.weight", "d f", "mlp.shared.down", "f d"),
)
