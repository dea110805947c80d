# SPDX-License-Identifier: Apache-2.0
"""config.json of Hy3, Qwen3-MoE and gpt-oss, in both directions, and of mixtures.

Where a field is not there, it is what transformers takes then. The published files and those
defaults differ (Hy3's `enable_moe_fp32_combine`, Qwen3's `norm_topk_prob`), so none is left to
chance: every field that matters is read, and written.
"""

import dataclasses
from typing import Any

from jaxcp.layers.mlp import SwiGLU
from jaxcp.layers.rope import Rope, YaRN
from jaxcp.layers.routing import Routing
from jaxcp.models.hybrid_moe.config import (
    AttentionConfig,
    ExpertsConfig,
    HybridMoEConfig,
    NGramConfig,
    NormConfig,
)

OURS = "jaxcp_hybrid_moe"
KINDS = {"sliding_attention": "L", "full_attention": "G"}
NEUTRAL: dict[str, tuple] = {
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "layer_types": (None,),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "attention_chunk_size": (None,),
    "no_rope_layers": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "attention_multiplier": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "swiglu_limit": (None,),
    "swiglu_alpha": (None,),
    "n_group": (None, 1),
    "scoring_func": (None,),
    "num_shared_experts": (None, 0),
    "shared_expert_intermediate_size": (None, 0),
    "kv_lora_rank": (None,),
    "index_topk": (None,),
    "hc_mult": (None,),
    "qk_norm": (True,),
    "moe_router_use_sigmoid": (True,),
    # jaxcp's own, of files before jaxcp_hybrid_moe
    "layer_pattern": (None, "G"),
    "ngram_width": (None, 1),
}
"""Fields that change what a model computes, and the values that do not. A family reads some."""


QUANTISED = None, "jaxcp", "fp8", "mxfp4", "modelopt", "compressed-tensors"
"""Whose tensors say by themselves how they are quantised, see `jaxcp.quantised_files`."""


def _refuse_others(d: dict[str, Any], *reads: str) -> None:
    wrong = {k: d[k] for k, same in NEUTRAL.items() if k in d and k not in reads}
    wrong = {k: v for k, v in wrong.items() if v not in NEUTRAL[k]}
    _refuse_other_formats(d)
    if wrong:
        wanted = {k: NEUTRAL[k][0] for k in wrong}
        raise NotImplementedError(f"{d['model_type']}: supported are {wanted}; got {wrong}")


def _refuse_other_formats(d: dict[str, Any]) -> None:
    method = (d.get("quantization_config") or {}).get("quant_method")
    if method not in QUANTISED:
        raise NotImplementedError(
            f"{d['model_type']}: quantization_config has a quant_method of "
            f"{', '.join(map(str, QUANTISED[1:]))}; got {method}"
        )


def _sizes(d: dict[str, Any]) -> dict[str, Any]:
    """What the three have in common."""
    return {
        "vocab_size": d["vocab_size"],
        "num_layers": d["num_hidden_layers"],
        "embed_dim": d["hidden_size"],
        "num_heads": d["num_attention_heads"],
        "num_kv_heads": d["num_key_value_heads"],
        "num_experts_per_tok": d["num_experts_per_tok"],
        "dtype": d.get("dtype") or d.get("torch_dtype") or "float32",
    }


def _sizes_of(c: HybridMoEConfig) -> dict[str, Any]:
    limit = c.attention.max_positions
    return {
        "vocab_size": c.vocab_size,
        "num_hidden_layers": c.num_layers,
        "hidden_size": c.embed_dim,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "num_experts_per_tok": c.num_experts_per_tok,
        "rms_norm_eps": c.norm.eps,
        "rope_parameters": c.attention.rope.to_hf(),
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": c.dtype,
    } | ({} if limit is None else {"max_position_embeddings": limit})


# Hy3


def _read_hy_v3(d: dict[str, Any]) -> HybridMoEConfig:
    _refuse_others(d, "num_shared_experts")
    width = d.get("moe_intermediate_size") or d["expert_hidden_dim"]
    if d.get("expert_hidden_dim", width) != width:
        raise ValueError(
            "hy_v3: moe_intermediate_size and expert_hidden_dim are one thing; "
            f"got {width} and {d['expert_hidden_dim']}"
        )
    return HybridMoEConfig(
        **_sizes(d),
        head_dim=d.get("head_dim", 128),
        mlp_dim=d["intermediate_size"],
        moe_dim=width,
        num_experts=d["num_experts"],
        first_dense_layers=_dense_layers(d),
        attention=AttentionConfig(
            rope=_rope(d, 11_158_840.0),
            max_positions=d.get("max_position_embeddings"),
        ),
        experts=ExpertsConfig(
            num_shared=d.get("num_shared_experts", 1),
            routing=Routing(
                selection_bias=d.get("moe_router_enable_expert_bias", True),
                normalise=d.get("route_norm", True),
                scale=d.get("router_scaling_factor", 2.826),
            ),
            float32_sum=d.get("enable_moe_fp32_combine", True),
        ),
        norm=NormConfig(eps=d.get("rms_norm_eps", 1e-5)),
        num_mtp_layers=d.get("num_nextn_predict_layers") or 0,
    )


def _dense_layers(d: dict[str, Any]) -> int:
    """transformers reads `mlp_layer_types` alone, vLLM `first_k_dense_replace` alone."""
    types, layers = d.get("mlp_layer_types"), d["num_hidden_layers"]
    if types is None:
        return d.get("first_k_dense_replace", min(1, layers))
    dense = types.count("dense")
    if types != ["dense"] * dense + ["sparse"] * (layers - dense):
        raise NotImplementedError(
            f"hy_v3: {layers} mlp_layer_types, the dense ones first; got mlp_layer_types={types}"
        )
    if d.get("first_k_dense_replace", dense) != dense:
        raise ValueError(
            f"hy_v3: mlp_layer_types has {dense} dense layers, "
            f"first_k_dense_replace={d['first_k_dense_replace']}; make them agree"
        )
    return dense


def _write_hy_v3(c: HybridMoEConfig) -> dict[str, Any]:
    routing, sparse = c.experts.routing, c.num_layers - c.first_dense_layers
    return _sizes_of(c) | {
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


# Qwen3-MoE


def _read_qwen3_moe(d: dict[str, Any]) -> HybridMoEConfig:
    _refuse_others(d, "attention_bias", "sliding_window", "use_sliding_window")
    windowed = d.get("use_sliding_window", False)
    dense, step = d.get("mlp_only_layers") or [], d.get("decoder_sparse_step", 1)
    if sorted(dense) != list(range(len(dense))) or step != 1:
        raise NotImplementedError(
            "qwen3_moe: dense layers must come first; "
            f"got mlp_only_layers={dense}, decoder_sparse_step={step}"
        )
    return HybridMoEConfig(
        **_sizes(d),
        head_dim=d.get("head_dim") or d["hidden_size"] // d["num_attention_heads"],
        mlp_dim=d["intermediate_size"],
        moe_dim=d["moe_intermediate_size"],
        num_experts=_num_experts(d),
        first_dense_layers=len(dense),
        layer_pattern="L" if windowed else "G",
        window=d.get("sliding_window", 4096) if windowed else None,
        attention=AttentionConfig(
            rope=_rope(d, 10_000.0),
            use_bias=d.get("attention_bias", False),
            max_positions=d.get("max_position_embeddings"),
        ),
        experts=ExpertsConfig(
            num_shared=0,
            routing=Routing(
                scores="softmax", selection_bias=False, normalise=d.get("norm_topk_prob", False)
            ),
        ),
        norm=NormConfig(eps=d.get("rms_norm_eps", 1e-6)),
    )


def _write_qwen3_moe(c: HybridMoEConfig) -> dict[str, Any]:
    windowed = c.layer_pattern == "L"
    return _sizes_of(c) | {
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


# gpt-oss


def _read_gpt_oss(d: dict[str, Any]) -> HybridMoEConfig:
    reads = ["attention_bias", "sliding_window", "layer_types", "swiglu_limit", "swiglu_alpha"]
    reads += ["use_sliding_window"]  # which transformers does not read here
    _refuse_others(d, *reads)
    layers = d["num_hidden_layers"]
    types = d.get("layer_types") or [list(KINDS)[i % 2] for i in range(layers)]
    if len(types) != layers or set(types) - KINDS.keys():
        raise NotImplementedError(
            f"gpt_oss: {layers} layer_types out of {list(KINDS)}; got layer_types={types}"
        )
    pattern = "".join(KINDS[kind] for kind in types)
    period = next(n for n in range(1, layers + 1) if pattern == (pattern[:n] * layers)[:layers])
    return HybridMoEConfig(
        **_sizes(d),
        head_dim=d.get("head_dim") or d["hidden_size"] // d["num_attention_heads"],
        mlp_dim=d["intermediate_size"],
        moe_dim=d["intermediate_size"],
        num_experts=_num_experts(d),
        first_dense_layers=0,
        layer_pattern=pattern[:period],
        window=d.get("sliding_window", 128),
        attention=AttentionConfig(
            rope=_rope(d, 150_000.0, yarn=GPT_OSS_YARN),
            qk_norm=False,
            use_bias=d.get("attention_bias", True),
            sinks=True,
            max_positions=d.get("max_position_embeddings"),
        ),
        experts=ExpertsConfig(
            num_shared=0,
            # softmax over the chosen is softmax over all, normalised
            routing=Routing(scores="softmax", selection_bias=False, linear_bias=True),
            activation=SwiGLU(
                limit=d.get("swiglu_limit", 7.0), alpha=d.get("swiglu_alpha", 1.702), shift=1.0
            ),
            use_bias=True,
        ),
        norm=NormConfig(eps=d.get("rms_norm_eps", 1e-5), float32_scale=True),
    )


def _write_gpt_oss(c: HybridMoEConfig) -> dict[str, Any]:
    types = {letter: kind for kind, letter in KINDS.items()}
    return _sizes_of(c) | {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "intermediate_size": c.moe_dim,
        "num_local_experts": c.num_experts,
        "attention_bias": c.attention.use_bias,
        "sliding_window": c.window,
        "layer_types": [types.get(c.kind(i), "no positions") for i in range(c.num_layers)],
        "swiglu_limit": c.experts.activation.limit,
        "swiglu_alpha": c.experts.activation.alpha,
    }


GPT_OSS_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _rope(d: dict[str, Any], theta: float, yarn: dict[str, Any] | None = None) -> Rope:
    """`theta`, `yarn`: where the file says nothing."""
    given = d.get("rope_parameters") or d.get("rope_scaling")
    return Rope.from_hf({"rope_theta": theta, **d, "rope_parameters": given or yarn})


def _num_experts(d: dict[str, Any]) -> int:
    return d["num_experts"] if "num_experts" in d else d["num_local_experts"]


# Mixtures: our own fields, as they are


def _read_ours(d: dict[str, Any]) -> HybridMoEConfig:
    _refuse_other_formats(d)
    others = "model_type", "architectures", "quantization_config"
    fields = {k: v for k, v in d.items() if k not in others}
    attention, experts = dict(fields["attention"]), dict(fields["experts"])
    rope = dict(attention["rope"])
    try:
        rope["yarn"] = None if rope["yarn"] is None else YaRN(**rope["yarn"])
        attention["rope"] = Rope(**rope)
        experts["routing"] = Routing(**experts["routing"])
        experts["activation"] = SwiGLU(**experts["activation"])
        fields |= {
            "attention": AttentionConfig(**attention),
            "experts": ExpertsConfig(**experts),
            "norm": NormConfig(**fields["norm"]),
            "ngram": NGramConfig(**fields["ngram"]),
        }
        return HybridMoEConfig(**fields)
    except TypeError as error:
        raise ValueError(f"{OURS}: a field that is not known, or not there: {error}") from error


def _write_ours(c: HybridMoEConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(c)
    del fields["remat"], fields["reproducible_experts"]
    return {"model_type": OURS, "architectures": ["JaxcpHybridMoE"], **fields}


READERS = {
    "hy_v3": _read_hy_v3,
    "qwen3_moe": _read_qwen3_moe,
    "gpt_oss": _read_gpt_oss,
    OURS: _read_ours,
}
WRITERS = {"hy_v3": _write_hy_v3, "qwen3_moe": _write_qwen3_moe, "gpt_oss": _write_gpt_oss}


def read(fields: dict[str, Any]) -> HybridMoEConfig:
    return READERS[fields["model_type"]](fields)


def model_type(config: HybridMoEConfig) -> str:
    """The format that a config survives."""
    for name, writer in WRITERS.items():
        try:
            again = READERS[name](writer(config))
        except (NotImplementedError, ValueError):
            continue
        if again == dataclasses.replace(config, remat=False, reproducible_experts=False):
            return name
    return OURS


def write(config: HybridMoEConfig) -> dict[str, Any]:
    return WRITERS.get(model_type(config), _write_ours)(config)
