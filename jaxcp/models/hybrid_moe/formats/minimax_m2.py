# SPDX-License-Identifier: Apache-2.0
"""config.json of MiniMax-M2, M2.5 and M2.7."""

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

ALIASES = {"num_experts": "num_local_experts"}
# Of training, and of layers that draft, which no published checkpoint has.
HARMLESS = "router_jitter_noise", "use_mtp", "num_mtp_modules", "mtp_transformer_layers"
FULL = 1
"""The word of `attn_type_list` for full attention; 0 is that of MiniMax-M1 for a linear one."""


def read(fields: Mapping[str, Any]) -> HybridMoEConfig:
    d = HFConfig(fields, aliases=ALIASES, harmless=HARMLESS)
    d.only(
        use_qk_norm=(True,), qk_norm_type=("per_layer",), use_routing_bias=(True,),
        scoring_func=("sigmoid",), shared_intermediate_size=(0, None), attention_bias=(False,),
        attn_type_list=([FULL] * d.size("num_hidden_layers"), None),
    )  # fmt: skip
    all_layers_are(d, "full_attention")
    channels, width = head_dim(d, 128), d.size("intermediate_size")
    config = HybridMoEConfig(
        **sizes(d),
        head_dim=channels,
        mlp_dim=width,
        moe_dim=width,
        num_experts=d.size("num_local_experts"),
        first_dense_layers=0,
        tie_embeddings=d.flag("tie_word_embeddings", False),
        attention=AttentionConfig(
            rope=_rope(d, channels),
            qk_norm_together=True,
            max_positions=d.size("max_position_embeddings", None),
        ),
        experts=ExpertsConfig(num_shared=0, routing=Routing()),
        norm=NormConfig(eps=d.number("rms_norm_eps", 1e-6)),
    )
    d.finish()
    return config


def _rope(d: HFConfig, channels: int) -> Rope:
    """Published files count the channels that turn, transformers has their fraction."""
    count = d.size("rotary_dim", None)
    rope = Rope.from_hf(d, theta=5e6, part=1.0 if count is None else count / channels)
    if count is not None and rope.turning(channels) != count:
        raise ValueError(
            f"minimax_m2: rotary_dim must be what partial_rotary_factor says of head_dim; got "
            f"rotary_dim={count}, partial_rotary_factor={rope.part}, head_dim={channels}"
        )
    return rope


def write(c: HybridMoEConfig) -> dict[str, Any]:
    return sizes_of(c) | {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        "intermediate_size": c.moe_dim,
        "num_local_experts": c.num_experts,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "rotary_dim": c.attention.rope.turning(c.head_dim),
    }
