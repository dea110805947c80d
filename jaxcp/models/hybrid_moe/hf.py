# SPDX-License-Identifier: Apache-2.0
"""config.json of Hy3, Qwen3-MoE and gpt-oss, in both directions, and of mixtures.

Where a field is not there, it is what transformers takes then. The published files and those
defaults differ (Hy3's `enable_moe_fp32_combine`, Qwen3's `norm_topk_prob`), so none is left to
chance: every field that matters is read, and written.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxcp.layers.mlp import SwiGLU
from jaxcp.layers.rope import Llama3, Rope, YaRN
from jaxcp.layers.routing import Routing
from jaxcp.models.hf_config import HARMLESS_NAMES, SILU, HFConfig, shortest_cycle
from jaxcp.models.hybrid_moe.config import (
    AttentionConfig,
    ExpertsConfig,
    HybridMoEConfig,
    NGramConfig,
    NormConfig,
)

OURS = "jaxcp_hybrid_moe"
KINDS = {"sliding_attention": "L", "full_attention": "G"}
OLD_OURS = {"layer_pattern": (None, "G"), "ngram_width": (None, 1)}
"""jaxcp's own, of files before jaxcp_hybrid_moe."""


def _sizes(d: HFConfig) -> dict[str, Any]:
    """Read the fields that the three have in common."""
    d.only(hidden_act=SILU, **OLD_OURS)
    return {
        "vocab_size": d.size("vocab_size"),
        "num_layers": d.size("num_hidden_layers"),
        "embed_dim": d.size("hidden_size"),
        "num_heads": d.size("num_attention_heads"),
        "num_kv_heads": d.size("num_key_value_heads"),
        "num_experts_per_tok": d.size("num_experts_per_tok"),
        "dtype": d.dtype(published="bfloat16"),
    }


def _head_dim(d: HFConfig, *default: int) -> int:
    if default and "head_dim" not in d:
        return default[0]
    return d.size("head_dim", None) or d.size("hidden_size") // d.size("num_attention_heads")


def _all_layers_are(d: HFConfig, kind: str) -> None:
    """Raises where `layer_types` does not say again what other fields say of all layers."""
    types = d.kinds("layer_types", d.size("num_hidden_layers"))
    if types is not None and set(types) != {kind}:
        raise NotImplementedError(
            f"{d.model_type}: all layers are {kind} by the other fields; got layer_types={types}"
        )


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
        "tie_word_embeddings": c.tie_embeddings,
        "dtype": c.dtype,
    } | ({} if limit is None else {"max_position_embeddings": limit})


# Hy3


HY_V3_ALIASES = {
    "num_local_experts": "num_experts",
    "expert_hidden_dim": "moe_intermediate_size",
}
# How precisely a program computes; logits and attention are float32 here.
HY_V3_HARMLESS = "enable_attention_fp32_softmax", "enable_lm_head_fp32", "use_grouped_mm"


def _read_hy_v3(fields: Mapping[str, Any]) -> HybridMoEConfig:
    d = HFConfig(fields, aliases=HY_V3_ALIASES, harmless=HY_V3_HARMLESS)
    d.only(
        attention_bias=(False,), tie_word_embeddings=(False,), qk_norm=(True,),
        moe_router_use_sigmoid=(True,),
    )  # fmt: skip
    _all_layers_are(d, "full_attention")
    config = HybridMoEConfig(
        **_sizes(d),
        head_dim=_head_dim(d, 128),
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


QWEN3_MOE_ALIASES = {"num_local_experts": "num_experts"}
QWEN3_MOE_HARMLESS = ("max_window_layers",)  # of Qwen2: here all layers have a window, or none


def _read_qwen3_moe(fields: Mapping[str, Any]) -> HybridMoEConfig:
    d = HFConfig(fields, aliases=QWEN3_MOE_ALIASES, harmless=QWEN3_MOE_HARMLESS)
    d.only(qk_norm=(True,), use_qk_norm=(True,))
    window = d.size("sliding_window", None) if "sliding_window" in d else 4096
    windowed = d.flag("use_sliding_window", False) and window is not None
    _all_layers_are(d, "sliding_attention" if windowed else "full_attention")
    dense, step = d.places("mlp_only_layers") or [], d.size("decoder_sparse_step", 1)
    if sorted(dense) != list(range(len(dense))) or step != 1:
        raise NotImplementedError(
            "qwen3_moe: dense layers must come first; "
            f"got mlp_only_layers={dense}, decoder_sparse_step={step}"
        )
    config = HybridMoEConfig(
        **_sizes(d),
        head_dim=_head_dim(d),
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


GPT_OSS_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
GPT_OSS_ALIASES = {
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
}
GPT_OSS_HARMLESS = ("use_sliding_window",)  # `layer_types` says it


def _read_gpt_oss(fields: Mapping[str, Any]) -> HybridMoEConfig:
    d = HFConfig(fields, aliases=GPT_OSS_ALIASES, harmless=GPT_OSS_HARMLESS)
    rope = Rope.from_hf(d, theta=150_000.0, default=GPT_OSS_YARN)
    if rope.yarn is not None:
        d.agree(initial_context_length=rope.yarn.original_max_positions)
    config = HybridMoEConfig(
        **_sizes(d),
        head_dim=_head_dim(d, 64),
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
    if types is None:
        return "LG"[:layers]
    if set(types) - KINDS.keys():
        raise NotImplementedError(
            f"gpt_oss: layer_types are of {list(KINDS)}; got layer_types={types}"
        )
    return shortest_cycle("".join(KINDS[kind] for kind in types))


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


# Mixtures: our own fields, as they are


def _read_ours(fields: Mapping[str, Any]) -> HybridMoEConfig:
    d = HFConfig(fields)
    given = {k: d[k] for k in d if k not in HARMLESS_NAMES}
    d.finish()
    attention, experts = dict(given["attention"]), dict(given["experts"])
    rope = dict(attention["rope"])
    try:
        for name, kind in (("yarn", YaRN), ("llama3", Llama3)):
            rope[name] = None if rope.get(name) is None else _made(kind, rope[name])
        attention["rope"] = _made(Rope, rope)
        experts["routing"] = _made(Routing, experts["routing"])
        experts["activation"] = _made(SwiGLU, experts["activation"])
        given |= {
            "attention": _made(AttentionConfig, attention),
            "experts": _made(ExpertsConfig, experts),
            "norm": _made(NormConfig, given["norm"]),
            "ngram": _made(NGramConfig, given["ngram"]),
        }
        return _made(HybridMoEConfig, given)
    except TypeError as error:
        raise ValueError(
            f"{OURS}: a field that is not known, not there, or of another type: {error}"
        ) from error


def _made(cls: Any, values: Mapping[str, Any]) -> Any:
    """`cls(**values)`; TypeError where a value is not of its field's type."""
    for field in dataclasses.fields(cls):
        kind: Any = field.type
        value = values.get(field.name, field.default)
        is_good = isinstance(value, int | float if kind is float else kind)
        if field.name in values and (not is_good or isinstance(value, bool) != (kind is bool)):
            raise TypeError(f"{field.name} must be {kind}; got {value!r}")
    return cls(**values)


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


def read(fields: Mapping[str, Any]) -> HybridMoEConfig:
    """Read a `config.json` of model_type hy_v3, qwen3_moe or gpt_oss, or one that `write` wrote.

    Raises:
      NotImplementedError: a field that changes what the model computes and is not known here.
      ValueError: fields that contradict each other.
    """
    return READERS[fields["model_type"]](fields)


def model_type(config: HybridMoEConfig) -> str:
    """Name the format that a configuration survives: hy_v3, qwen3_moe, gpt_oss, or `OURS`."""
    for name, writer in WRITERS.items():
        try:
            again = READERS[name](writer(config))
        except (NotImplementedError, ValueError):
            continue
        if again == dataclasses.replace(config, remat=False, reproducible_experts=False):
            return name
    return OURS


def write(config: HybridMoEConfig) -> dict[str, Any]:
    """Write the fields that `read` takes, with the model_type that they came from.

    A mixture that none of the three can express gets a model_type of ours, jaxcp_hybrid_moe,
    which no other program takes for something else.
    """
    return WRITERS.get(model_type(config), _write_ours)(config)
