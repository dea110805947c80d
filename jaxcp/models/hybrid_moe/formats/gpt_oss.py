# SPDX-License-Identifier: Apache-2.0
"""config.json of gpt-oss."""

from collections.abc import Mapping
from typing import Any

from jaxcp.layers.mlp import SwiGLU
from jaxcp.layers.rope import Rope
from jaxcp.layers.routing import Routing
from jaxcp.models.hf_config import HFConfig
from jaxcp.models.hybrid_moe.config import (
    AttentionConfig,
    ExpertsConfig,
    HybridMoEConfig,
    NormConfig,
)
from jaxcp.models.hybrid_moe.formats.fields import head_dim, kinds_of, pattern, sizes, sizes_of

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
ALIASES = {
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
}
HARMLESS = ("use_sliding_window",)  # `layer_types` says it


def read(fields: Mapping[str, Any]) -> HybridMoEConfig:
    d = HFConfig(fields, aliases=ALIASES, harmless=HARMLESS)
    rope = Rope.from_hf(d, theta=150_000.0, default=YARN)
    if rope.yarn is not None:
        d.agree(initial_context_length=rope.yarn.original_max_positions)
    config = HybridMoEConfig(
        **sizes(d),
        head_dim=head_dim(d, 64),
        mlp_dim=d.size("intermediate_size"),
        moe_dim=d.size("intermediate_size"),
        num_experts=d.size("num_local_experts"),
        first_dense_layers=0,
        layer_pattern=_pattern(d),
        window=d.size("sliding_window", None) if "sliding_window" in d else 128,
        tie_embeddings=d.flag("tie_word_embeddings", False),
        attention=AttentionConfig(
            rope=rope,
            qk_norm=False,
            use_bias=d.flag("attention_bias", True),
            sinks=True,
            max_positions=d.size("max_position_embeddings", None),
        ),
        experts=ExpertsConfig(
            num_shared=0,
            # softmax over the chosen is softmax over all, normalised
            routing=Routing(scores="softmax", selection_bias=False, linear_bias=True),
            activation=SwiGLU(
                limit=d.number("swiglu_limit", 7.0),
                alpha=d.number("swiglu_alpha", 1.702),
                shift=1.0,
            ),
            use_bias=True,
        ),
        norm=NormConfig(eps=d.number("rms_norm_eps", 1e-5), float32_scale=True),
    )
    d.finish()
    return config


def _pattern(d: HFConfig) -> str:
    layers = d.size("num_hidden_layers")
    types = d.kinds("layer_types", layers)
    return "LG"[:layers] if types is None else pattern(types, d.model_type)


def write(c: HybridMoEConfig) -> dict[str, Any]:
    return sizes_of(c) | {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "intermediate_size": c.moe_dim,
        "num_local_experts": c.num_experts,
        "attention_bias": c.attention.use_bias,
        "sliding_window": c.window,
        "layer_types": kinds_of(c),
        "swiglu_limit": c.experts.activation.limit,
        "swiglu_alpha": c.experts.activation.alpha,
    }
