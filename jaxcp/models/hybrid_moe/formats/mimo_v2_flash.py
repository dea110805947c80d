# SPDX-License-Identifier: Apache-2.0
"""config.json of MiMo-V2-Flash: its authors' fields, and those of transformers.

The authors say `hybrid_layer_pattern`, `moe_layer_freq`, `swa_...` and `..._sink_bias`,
transformers `layer_types`, `mlp_layer_types` and a set of `rope_parameters` a kind of layer. Both
are read, must agree, and are written.
"""

from collections.abc import Mapping
from typing import Any

from jaxcp.layers.rope import Rope
from jaxcp.models.hf_config import HFConfig
from jaxcp.models.hybrid_moe.config import (
    AttentionConfig,
    ExpertsConfig,
    Heads,
    HybridMoEConfig,
    NormConfig,
)
from jaxcp.models.hybrid_moe.formats.fields import (
    ROUTED_ALIASES,
    kinds_of,
    pattern,
    routing,
    routing_of,
    sizes,
    sizes_of,
)

ALIASES = ROUTED_ALIASES | {
    "layernorm_epsilon": "rms_norm_eps",
    "swa_qk_head_dim": "swa_head_dim",
}
FULL, WINDOW = KINDS = "full_attention", "sliding_attention"
MLPS = "dense", "sparse"
PART = 0.334
DRAFTS = "num_nextn_predict_layers"
"""In no published file: what others ask for."""


def read(fields: Mapping[str, Any]) -> HybridMoEConfig:
    d = HFConfig(fields, aliases=ALIASES)
    d.only(n_shared_experts=(None, 0))
    layers, common = d.size("num_hidden_layers"), sizes(d)
    every_sixth = [WINDOW if i and (i + 1) % 6 else FULL for i in range(layers)]
    kinds = _kinds(d, "layer_types", "hybrid_layer_pattern", KINDS) or every_sixth
    full, window = _full(d, common), _window(d, common)
    scale = d.number("attention_value_scale", None) if "attention_value_scale" in d else 0.707
    config = HybridMoEConfig(
        **common | {"num_heads": window.num_heads, "num_kv_heads": window.num_kv_heads},
        head_dim=window.head_dim,
        mlp_dim=d.size("intermediate_size"),
        moe_dim=d.size("moe_intermediate_size"),
        num_experts=d.size("n_routed_experts"),
        first_dense_layers=_dense_layers(d, layers),
        layer_pattern=pattern(kinds, d.model_type),
        window=_reach(d),
        tie_embeddings=d.flag("tie_word_embeddings", False),
        attention=AttentionConfig(
            rope=window.rope,
            qk_norm=False,
            use_bias=d.flag("attention_bias", False),
            output_bias=False,
            sinks=window.sinks,
            value_dim=window.value_dim,
            value_scale=1.0 if scale is None else scale,
            full=full,
            max_positions=d.size("max_position_embeddings", None),
        ),
        experts=ExpertsConfig(num_shared=0, routing=routing(d)),
        norm=NormConfig(eps=d.number("rms_norm_eps", 1e-5)),
        **_drafting(d.count(DRAFTS, None)),
    )
    d.finish()
    return config


def _drafting(count: int | None) -> dict[str, Any]:
    """Read the first of the layers, each of which drafts another token."""
    return {"num_mtp_layers": count and 1, **({"mtp_kind": "L"} if count else {})}


def _full(d: HFConfig, common: Mapping[str, Any]) -> Heads:
    return Heads(
        num_heads=common["num_heads"],
        num_kv_heads=common["num_kv_heads"],
        head_dim=d.size("head_dim", 192),
        value_dim=d.size("v_head_dim", 128),
        rope=_rope(d, FULL, "rope_theta", 5e6),
        sinks=d.flag("add_full_attention_sink_bias", False),
    )


def _window(d: HFConfig, common: Mapping[str, Any]) -> Heads:
    """transformers has no fields for these, and twice the heads of keys."""
    return Heads(
        num_heads=d.size("swa_num_attention_heads", common["num_heads"]),
        num_kv_heads=d.size("swa_num_key_value_heads", 2 * common["num_kv_heads"]),
        head_dim=d.size("swa_head_dim", d.size("head_dim", 192)),
        value_dim=d.size("swa_v_head_dim", d.size("v_head_dim", 128)),
        rope=_rope(d, WINDOW, "swa_rope_theta", 1e4),
        sinks=d.flag("add_swa_attention_sink_bias", True),
    )


def _rope(d: HFConfig, kind: str, theta: str, default: float) -> Rope:
    names = {"rope_theta": theta, "partial_rotary_factor": "partial_rotary_factor",
             "max_position_embeddings": "max_position_embeddings"}  # fmt: skip
    names |= {"rope_scaling": "rope_scaling"} if kind == FULL else {}
    fields, part = {name: d.get(key) for name, key in names.items()}, PART
    sets = d.get("rope_parameters")
    if sets is not None:
        if not isinstance(sets, Mapping) or set(sets) != {*KINDS}:
            raise ValueError(
                f"mimo_v2_flash: rope_parameters are a set for each of {', '.join(KINDS)}; "
                f"got {sets!r}"
            )
        fields["rope_parameters"] = sets[kind]
        # as transformers has it where a set does not say
        part = PART if (sets[kind] or {}).get("rope_type", "default") == "default" else 1.0
    return Rope.from_hf(fields, theta=default, part=part)


def _kinds(d: HFConfig, names: str, numbers: str, words: tuple[str, str]) -> list[str] | None:
    """Read what a list of words, or one of 0 and 1, says of each layer."""
    layers, listed = d.size("num_hidden_layers"), d.places(numbers)
    kinds = d.kinds(names, layers)
    if listed is None:
        return kinds
    if len(listed) != layers or set(listed) - {0, 1}:
        raise ValueError(f"mimo_v2_flash: {numbers} is 0 or 1 for each layer; got {listed}")
    said = [words[i] for i in listed]
    if kinds not in (None, said):
        raise ValueError(f"mimo_v2_flash: {names} and {numbers} must agree; got {kinds}, {listed}")
    return said


def _dense_layers(d: HFConfig, layers: int) -> int:
    kinds = _kinds(d, "mlp_layer_types", "moe_layer_freq", MLPS)
    if kinds is None:
        return 1
    count = kinds.count("dense")
    if kinds != ["dense"] * count + ["sparse"] * (layers - count):
        raise NotImplementedError(
            f"mimo_v2_flash: dense layers come first; got mlp_layer_types={kinds}"
        )
    return count


def _reach(d: HFConfig) -> int:
    """Count the tokens that a query of a window layer sees, its own included.

    `sliding_window_size` counts those before it, as SGLang, which the model is served by, has it;
    published files say the same number under `sliding_window`, which transformers then corrects.
    """
    before, window = d.size("sliding_window_size", None), d.size("sliding_window", None)
    d.only(attention_chunk_size=(None, before, window))
    if before is None:
        return 129 if window is None else window
    if window not in (None, before, before + 1):
        raise ValueError(
            f"mimo_v2_flash: sliding_window is sliding_window_size, or one more; got {window} and "
            f"{before}"
        )
    return before + 1


def write(c: HybridMoEConfig) -> dict[str, Any]:
    full, window, kinds = c.heads_of("G"), c.heads_of("L"), kinds_of(c)
    mlps = [MLPS[i >= c.first_dense_layers] for i in range(c.num_layers)]
    said = {
        "architectures": ["MiMoV2FlashForCausalLM"],
        "model_type": "mimo_v2_flash",
        "layer_types": kinds,
        "hybrid_layer_pattern": [int(kind == WINDOW) for kind in kinds],
        "mlp_layer_types": mlps,
        "moe_layer_freq": [MLPS.index(mlp) for mlp in mlps],
        "num_attention_heads": full.num_heads,
        "swa_num_attention_heads": window.num_heads,
        "num_key_value_heads": full.num_kv_heads,
        "swa_num_key_value_heads": window.num_kv_heads,
        "head_dim": full.head_dim,
        "swa_head_dim": window.head_dim,
        "v_head_dim": full.value_dim,
        "swa_v_head_dim": window.value_dim,
        "add_full_attention_sink_bias": full.sinks,
        "add_swa_attention_sink_bias": window.sinks,
        "attention_bias": c.attention.use_bias,
        "attention_value_scale": c.attention.value_scale,
        "layernorm_epsilon": c.norm.eps,
        "rope_theta": full.rope.theta,
        "swa_rope_theta": window.rope.theta,
        "rope_parameters": {
            kind: heads.rope.to_hf() | {"partial_rotary_factor": heads.rope.part}
            for kind, heads in zip(KINDS, (full, window), strict=True)
        },
    }
    if full.rope.part == window.rope.part:
        said["partial_rotary_factor"] = full.rope.part
    if c.num_mtp_layers is not None:
        said[DRAFTS] = c.num_mtp_layers
    if c.window is not None:
        said |= {"sliding_window": c.window, "sliding_window_size": c.window - 1}
    return sizes_of(c) | routing_of(c) | said
