# SPDX-License-Identifier: Apache-2.0
"""config.json of Qwen3-MoE."""

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

ALIASES = {"num_local_experts": "num_experts"}
HARMLESS = ("max_window_layers",)  # of Qwen2: here all layers have a window, or none


def read(fields: Mapping[str, Any]) -> HybridMoEConfig:
    d = HFConfig(fields, aliases=ALIASES, harmless=HARMLESS)
    d.only(qk_norm=(True,), use_qk_norm=(True,))
    window = d.size("sliding_window", None) if "sliding_window" in d else 4096
    windowed = d.flag("use_sliding_window", False) and window is not None
    all_layers_are(d, "sliding_attention" if windowed else "full_attention")
    dense, step = d.places("mlp_only_layers") or [], d.size("decoder_sparse_step", 1)
    if sorted(dense) != list(range(len(dense))) or step != 1:
        raise NotImplementedError(
            "qwen3_moe: dense layers must come first; "
            f"got mlp_only_layers={dense}, decoder_sparse_step={step}"
        )
    config = HybridMoEConfig(
        **sizes(d),
        head_dim=head_dim(d),
        mlp_dim=d.size("intermediate_size"),
        moe_dim=d.size("moe_intermediate_size"),
        num_experts=d.size("num_experts"),
        first_dense_layers=len(dense),
        layer_pattern="L" if windowed else "G",
        window=window if windowed else None,
        tie_embeddings=d.flag("tie_word_embeddings", False),
        attention=AttentionConfig(
            rope=Rope.from_hf(d),
            use_bias=d.flag("attention_bias", False),
            max_positions=d.size("max_position_embeddings", None),
        ),
        experts=ExpertsConfig(
            num_shared=0,
            routing=Routing(
                scores="softmax", selection_bias=False, normalise=d.flag("norm_topk_prob", False)
            ),
        ),
        norm=NormConfig(eps=d.number("rms_norm_eps", 1e-6)),
    )
    d.finish()
    return config


def write(c: HybridMoEConfig) -> dict[str, Any]:
    windowed = c.layer_pattern == "L"
    return sizes_of(c) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "intermediate_size": c.mlp_dim,
        "moe_intermediate_size": c.moe_dim,
        "num_experts": c.num_experts,
        "mlp_only_layers": list(range(c.first_dense_layers)),
        "decoder_sparse_step": 1,
        "norm_topk_prob": c.experts.routing.normalise,
        "attention_bias": c.attention.use_bias,
        "use_sliding_window": windowed,
        "sliding_window": c.window if windowed else None,
    }
