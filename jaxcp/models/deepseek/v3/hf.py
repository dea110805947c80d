# SPDX-License-Identifier: Apache-2.0
"""config.json of DeepSeek-V3, V3.2 and Kimi-K2, in both directions."""

from collections.abc import Mapping
from typing import Any

from jaxcp.layers.mla import IndexDims, LatentDims
from jaxcp.layers.rope import Rope, merged
from jaxcp.layers.routing import Routing
from jaxcp.models.deepseek.v3.config import DeepSeekV3Config
from jaxcp.models.hf_config import SILU, HFConfig

ALIASES = {
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
}


def read(fields: Mapping[str, Any]) -> DeepSeekV3Config:
    """Read a `config.json` of model_type deepseek_v3, deepseek_v32 or kimi_k2, which is V3.

    Raises:
      KeyError: a field that decides what is computed is not there.
      NotImplementedError: a field with a value, or of a name, that is not known here.
    """
    d = HFConfig(fields, aliases=ALIASES)
    layers, heads = d.size("num_hidden_layers"), d.size("num_attention_heads")
    d["q_lora_rank"] or _no_direct_queries()
    latent = LatentDims(
        q_rank=d.size("q_lora_rank"),
        kv_rank=d.size("kv_lora_rank"),
        nope_dim=d.size("qk_nope_head_dim"),
        rope_dim=d.size("qk_rope_head_dim"),
        value_dim=d.size("v_head_dim"),
    )
    d.only(
        hidden_act=SILU, attention_bias=(False,), mlp_bias=(False,),
        tie_word_embeddings=(False,), rope_interleave=(True,), scoring_func=("sigmoid",),
        topk_method=("noaux_tc",), moe_layer_freq=(1,), num_key_value_heads=(heads, None),
        qk_head_dim=(latent.nope_dim + latent.rope_dim,), head_dim=(latent.rope_dim,),
    )  # fmt: skip
    config = DeepSeekV3Config(
        vocab_size=d.size("vocab_size"),
        num_layers=layers,
        embed_dim=d.size("hidden_size"),
        num_heads=heads,
        latent=latent,
        index=_index(d, layers),
        mlp_dim=d.size("intermediate_size"),
        moe_dim=d.size("moe_intermediate_size"),
        num_experts=d.size("n_routed_experts"),
        num_experts_per_tok=d.size("num_experts_per_tok"),
        num_shared_experts=0 if d["n_shared_experts"] is None else d.count("n_shared_experts"),
        first_dense_layers=_dense_layers(d, layers),
        routing=Routing(
            normalise=d.flag("norm_topk_prob"),
            scale=d.number("routed_scaling_factor"),
            num_groups=d.size("n_group"),
            top_groups=d.size("topk_group"),
        ),
        rope=Rope.from_hf(d, interleaved=True),
        mscale_all_dim=float((merged(d) or {}).get("mscale_all_dim") or 0.0),
        max_positions=d.size("max_position_embeddings"),
        norm_eps=d.number("rms_norm_eps"),
        num_mtp_layers=d.count("num_nextn_predict_layers", None) or 0,
        dtype=d.dtype(published="bfloat16"),
    )
    d.finish()
    return config


def write(config: DeepSeekV3Config) -> dict[str, Any]:
    """Write the fields that `read` takes."""
    rope = config.rope.to_hf()
    if config.mscale_all_dim:
        rope |= {"mscale": config.mscale_all_dim, "mscale_all_dim": config.mscale_all_dim}
        rope["attention_factor"] = 1.0 if config.rope.yarn is None else config.rope.yarn.gain
    d = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "q_lora_rank": config.latent.q_rank,
        "kv_lora_rank": config.latent.kv_rank,
        "qk_nope_head_dim": config.latent.nope_dim,
        "qk_rope_head_dim": config.latent.rope_dim,
        "v_head_dim": config.latent.value_dim,
        "intermediate_size": config.mlp_dim,
        "moe_intermediate_size": config.moe_dim,
        "n_routed_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "n_shared_experts": config.num_shared_experts,
        "first_k_dense_replace": config.first_dense_layers,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": config.routing.normalise,
        "routed_scaling_factor": config.routing.scale,
        "n_group": config.routing.num_groups,
        "topk_group": config.routing.top_groups,
        "num_nextn_predict_layers": config.num_mtp_layers,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "rope_parameters": rope,
        "rope_interleave": True,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "dtype": config.dtype,
    }
    if config.index is None:
        return d
    return d | {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "layer_types": ["indexed_attention"] * config.num_layers,
        "index_n_heads": config.index.num_heads,
        "index_head_dim": config.index.head_dim,
        "index_topk": config.index.top_k,
    }


def _index(d: HFConfig, layers: int) -> IndexDims | None:
    is_sparse = d.model_type == "deepseek_v32"
    kind = "indexed_attention" if is_sparse else "full_attention"
    d.leading("layer_types", layers, kind, kind)
    if not is_sparse:
        return None
    return IndexDims(
        num_heads=d.size("index_n_heads"),
        head_dim=d.size("index_head_dim"),
        top_k=d.size("index_topk"),
    )


def _dense_layers(d: HFConfig, layers: int) -> int:
    dense = d.count("first_k_dense_replace")
    if d.leading("mlp_layer_types", layers, "dense", "sparse") not in (None, dense):
        raise ValueError(
            f"{d.model_type}: mlp_layer_types and first_k_dense_replace must agree; "
            f"got first_k_dense_replace={dense} and mlp_layer_types={d['mlp_layer_types']}"
        )
    return dense


def _no_direct_queries():
    raise NotImplementedError("deepseek: queries without a latent (q_lora_rank=null) are not there")
