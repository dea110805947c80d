# SPDX-License-Identifier: Apache-2.0
"""config.json of Hy3."""

from collections.abc import Mapping
from typing import Any

from jaxcp.layers.rope import Rope
from jaxcp.layers.routing import Routing
from jaxcp.models.hf_config import HFConfig
from jaxcp.models.hybrid_moe.config import (
    AttentionConfig,
    ExpertsConfig,
    HybridMoEConfig,
    NormConfig,
)
from jaxcp.models.hybrid_moe.formats.fields import all_layers_are, head_dim, sizes, sizes_of

ALIASES = {
    "num_local_experts": "num_experts",
    "expert_hidden_dim": "moe_intermediate_size",
}
# How precisely a program computes; logits and attention are float32 here.
HARMLESS = "enable_attention_fp32_softmax", "enable_lm_head_fp32", "use_grouped_mm"


def read(fields: Mapping[str, Any]) -> HybridMoEConfig:
    d = HFConfig(fields, aliases=ALIASES, harmless=HARMLESS)
    d.only(
        attention_bias=(False,), tie_word_embeddings=(False,), qk_norm=(True,),
        moe_router_use_sigmoid=(True,),
    )  # fmt: skip
    all_layers_are(d, "full_attention")
    config = HybridMoEConfig(
        **sizes(d),
        head_dim=head_dim(d, 128),
        mlp_dim=d.size("intermediate_size"),
        moe_dim=d.size("moe_intermediate_size"),
        num_experts=d.size("num_experts"),
        first_dense_layers=_dense_layers(d),
        attention=AttentionConfig(
            rope=Rope.from_hf(d, theta=11_158_840.0),
            max_positions=d.size("max_position_embeddings", None),
        ),
        experts=ExpertsConfig(
            num_shared=d.count("num_shared_experts", 1),
            routing=Routing(
                selection_bias=d.flag("moe_router_enable_expert_bias", True),
                normalise=d.flag("route_norm", True),
                scale=d.number("router_scaling_factor", 2.826),
            ),
            float32_sum=d.flag("enable_moe_fp32_combine", True),
        ),
        norm=NormConfig(eps=d.number("rms_norm_eps", 1e-5)),
        num_mtp_layers=d.count("num_nextn_predict_layers", None) or 0,
    )
    d.finish()
    return config


def _dense_layers(d: HFConfig) -> int:
    """transformers reads `mlp_layer_types` alone, vLLM `first_k_dense_replace` alone."""
    dense = d.leading("mlp_layer_types", d.size("num_hidden_layers"), "dense", "sparse")
    if dense is None:
        return d.count("first_k_dense_replace", 1)
    if d.get("first_k_dense_replace", dense) != dense:
        raise ValueError(
            f"hy_v3: mlp_layer_types has {dense} dense layers, "
            f"first_k_dense_replace={d['first_k_dense_replace']}; make them agree"
        )
    return dense


def write(c: HybridMoEConfig) -> dict[str, Any]:
    routing, sparse = c.experts.routing, c.num_layers - c.first_dense_layers
    return sizes_of(c) | {
        "architectures": ["HYV3ForCausalLM"],
        "model_type": "hy_v3",
        "intermediate_size": c.mlp_dim,
        "moe_intermediate_size": c.moe_dim,
        "expert_hidden_dim": c.moe_dim,
        "num_experts": c.num_experts,
        "num_shared_experts": c.experts.num_shared,
        "first_k_dense_replace": c.first_dense_layers,
        "mlp_layer_types": ["dense"] * c.first_dense_layers + ["sparse"] * sparse,
        "router_scaling_factor": routing.scale,
        "route_norm": routing.normalise,
        "qk_norm": True,
        "moe_router_use_sigmoid": True,
        "moe_router_enable_expert_bias": routing.selection_bias,
        "enable_moe_fp32_combine": c.experts.float32_sum,
        "enable_lm_head_fp32": True,
        "num_nextn_predict_layers": c.num_mtp_layers,
    }
