# SPDX-License-Identifier: Apache-2.0
"""config.json of GLM-4.5, 4.6 and 4.7."""

from collections.abc import Mapping
from typing import Any

from jaxcp.layers.rope import Rope
from jaxcp.models.hf_config import HFConfig
from jaxcp.models.hybrid_moe.config import (
    AttentionConfig,
    ExpertsConfig,
    HybridMoEConfig,
    NormConfig,
)
from jaxcp.models.hybrid_moe.formats.fields import (
    ROUTED_ALIASES,
    all_layers_are,
    head_dim,
    routing,
    routing_of,
    sizes,
    sizes_of,
)

ALIASES = ROUTED_ALIASES | {"num_mtp_layers": "num_nextn_predict_layers"}


def read(fields: Mapping[str, Any]) -> HybridMoEConfig:
    d = HFConfig(fields, aliases=ALIASES)
    all_layers_are(d, "full_attention")
    config = HybridMoEConfig(
        **sizes(d),
        head_dim=head_dim(d),
        mlp_dim=d.size("intermediate_size"),
        moe_dim=d.size("moe_intermediate_size"),
        num_experts=d.size("n_routed_experts"),
        first_dense_layers=d.count("first_k_dense_replace", 1),
        tie_embeddings=d.flag("tie_word_embeddings", False),
        attention=AttentionConfig(
            rope=Rope.from_hf(d, part=0.5),
            qk_norm=d.flag("use_qk_norm", False),
            use_bias=d.flag("attention_bias", False),
            output_bias=False,
            max_positions=d.size("max_position_embeddings", None),
        ),
        experts=ExpertsConfig(num_shared=d.count("n_shared_experts", 1), routing=routing(d)),
        norm=NormConfig(eps=d.number("rms_norm_eps", 1e-5)),
        num_mtp_layers=d.count("num_nextn_predict_layers", None) or 0,
    )
    d.finish()
    return config


def write(c: HybridMoEConfig) -> dict[str, Any]:
    part = {"partial_rotary_factor": c.attention.rope.part}  # said where it is 1, too
    return (
        sizes_of(c)
        | routing_of(c)
        | {
            "architectures": ["Glm4MoeForCausalLM"],
            "model_type": "glm4_moe",
            "n_shared_experts": c.experts.num_shared,
            "first_k_dense_replace": c.first_dense_layers,
            "attention_bias": c.attention.use_bias,
            "use_qk_norm": c.attention.qk_norm,
            "rope_parameters": c.attention.rope.to_hf() | part,
            "num_nextn_predict_layers": c.num_mtp_layers,
        }
    )
