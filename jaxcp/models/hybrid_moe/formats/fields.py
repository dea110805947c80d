# SPDX-License-Identifier: Apache-2.0
"""Fields of config.json that the formats of a hybrid MoE have in common."""

from typing import Any

from jaxcp.layers.routing import Routing
from jaxcp.models.hf_config import SILU, HFConfig, shortest_cycle
from jaxcp.models.hybrid_moe.config import HybridMoEConfig

KINDS = {"sliding_attention": "L", "full_attention": "G"}
OLD_OURS = {"layer_pattern": (None, "G"), "ngram_width": (None, 1)}
"""jaxcp's own, of files before jaxcp_hybrid_moe."""
ROUTED_ALIASES = {"num_local_experts": "n_routed_experts"}


def sizes(d: HFConfig) -> dict[str, Any]:
    """Read the fields that all have in common."""
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


def head_dim(d: HFConfig, *default: int) -> int:
    """Read the channels of a head: those of all heads divided by their number by default."""
    if default and "head_dim" not in d:
        return default[0]
    return d.size("head_dim", None) or d.size("hidden_size") // d.size("num_attention_heads")


def all_layers_are(d: HFConfig, kind: str) -> None:
    """Raises where `layer_types` does not say again what other fields say of all layers."""
    types = d.kinds("layer_types", d.size("num_hidden_layers"))
    if types is not None and set(types) != {kind}:
        raise NotImplementedError(
            f"{d.model_type}: all layers are {kind} by the other fields; got layer_types={types}"
        )


def sizes_of(c: HybridMoEConfig) -> dict[str, Any]:
    """Write the fields that all have in common."""
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


def routing(d: HFConfig) -> Routing:
    """Read the router of DeepSeek-V3, which others took over."""
    d.only(scoring_func=("sigmoid", None), topk_method=("noaux_tc", None))
    scale = d.number("routed_scaling_factor", None)
    return Routing(
        normalise=d.flag("norm_topk_prob", True),
        scale=1.0 if scale is None else scale,
        num_groups=d.size("n_group", 1),
        top_groups=d.size("topk_group", 1),
    )


def routing_of(c: HybridMoEConfig) -> dict[str, Any]:
    """Write the fields that `routing` reads, and the sizes of experts."""
    r = c.experts.routing
    return {
        "intermediate_size": c.mlp_dim,
        "moe_intermediate_size": c.moe_dim,
        "n_routed_experts": c.num_experts,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": r.normalise,
        "routed_scaling_factor": r.scale,
        "n_group": r.num_groups,
        "topk_group": r.top_groups,
    }


def pattern(kinds: list[str], model_type: str) -> str:
    """Make the pattern of layers of what `layer_types` says of each.

    Raises:
      NotImplementedError: another kind than those of `KINDS`.
    """
    if set(kinds) - KINDS.keys():
        raise NotImplementedError(
            f"{model_type}: layer_types are of {list(KINDS)}; got layer_types={kinds}"
        )
    return shortest_cycle("".join(KINDS[kind] for kind in kinds))


def kinds_of(c: HybridMoEConfig) -> list[str]:
    """Name the kind of each layer as `layer_types` does."""
    names = {letter: kind for kind, letter in KINDS.items()}
    return [names.get(c.kind(i), "no positions") for i in range(c.num_layers)]
