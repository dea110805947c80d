# SPDX-License-Identifier: Apache-2.0
"""config.json of DeepSeek-V4, the hub's and transformers', in both directions."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxcp.layers.compressed import SharedHeadDims
from jaxcp.layers.mla import IndexDims
from jaxcp.layers.rope import Rope, merged
from jaxcp.models.deepseek.v4.config import DeepSeekV4Config, ExpertDims, StreamDims
from jaxcp.models.hf_config import SILU, HFConfig

KINDS = {
    "W": "sliding_attention",
    "C": "compressed_sparse_attention",
    "H": "heavily_compressed_attention",
}
"""A layer's kind -> what transformers calls it."""
HUB_RATIOS = {0: "W", 4: "C", 128: "H"}
"""Kinds of layers, by what `compress_ratios` in the hub's config.json says of them."""
ALIASES = {
    "num_local_experts": "n_routed_experts",
    "intermediate_size": "moe_intermediate_size",
}


def read(fields: Mapping[str, Any]) -> DeepSeekV4Config:
    """Read a `config.json` of model_type deepseek_v4, the hub's or transformers'.

    Raises:
      KeyError: a field that decides what is computed is not there. Nothing is left to the
        defaults of transformers, whose layer types are not those of any published model.
      NotImplementedError: a field with a value, or of a name, that is not known here.
    """
    d = HFConfig(fields, aliases=ALIASES)
    d["scoring_func"]  # must be there
    d.only(
        hidden_act=SILU, attention_bias=(False,), mlp_bias=(False,),
        tie_word_embeddings=(False,), scoring_func=("sqrtsoftplus",),
        topk_method=("noaux_tc",), norm_topk_prob=(True,), num_key_value_heads=(1,),
        router_jitter_noise=(0.0,),
    )  # fmt: skip
    heads = SharedHeadDims(
        num_heads=d.size("num_attention_heads"),
        head_dim=d.size("head_dim"),
        rope_dim=_rope_dim(d),
        q_rank=d.size("q_lora_rank"),
        out_rank=d.size("o_lora_rank"),
        out_groups=d.size("o_groups"),
    )
    kinds, sparse_ratio, heavy_ratio = _layers(d)
    rope, compressed_rope = _ropes(d)
    config = DeepSeekV4Config(
        vocab_size=d.size("vocab_size"),
        num_layers=d.size("num_hidden_layers"),
        embed_dim=d.size("hidden_size"),
        heads=heads,
        layer_kinds=kinds,
        sparse_ratio=sparse_ratio,
        heavy_ratio=heavy_ratio,
        window=d.size("sliding_window"),
        index=IndexDims(
            num_heads=d.size("index_n_heads"),
            head_dim=d.size("index_head_dim"),
            top_k=d.size("index_topk"),
        ),
        experts=ExpertDims(
            dim=d.size("moe_intermediate_size"),
            count=d.size("n_routed_experts"),
            per_tok=d.size("num_experts_per_tok"),
            shared=d.count("n_shared_experts"),
            hash_layers=_hash_layers(d),
            route_scale=d.number("routed_scaling_factor"),
            limit=d.number("swiglu_limit"),
        ),
        streams=StreamDims(
            count=d.size("hc_mult"),
            iterations=d.size("hc_sinkhorn_iters"),
            eps=d.number("hc_eps"),
        ),
        rope=rope,
        compressed_rope=compressed_rope,
        max_positions=d.size("max_position_embeddings"),
        norm_eps=d.number("rms_norm_eps"),
        num_mtp_layers=d.count("num_nextn_predict_layers", None) or 0,
        dtype=d.dtype(published="bfloat16"),
    )
    d.finish()
    return config


def write(config: DeepSeekV4Config) -> dict[str, Any]:
    """Write the fields that `read` takes, and transformers."""
    h, e = config.heads, config.experts
    part = {"partial_rotary_factor": h.rope_dim / h.head_dim}
    learned = config.num_layers - e.hash_layers
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": h.num_heads,
        "num_key_value_heads": 1,
        "head_dim": h.head_dim,
        "qk_rope_head_dim": h.rope_dim,
        "q_lora_rank": h.q_rank,
        "o_lora_rank": h.out_rank,
        "o_groups": h.out_groups,
        "layer_types": [KINDS[kind] for kind in config.layer_kinds],
        "compress_rates": {KINDS["C"]: config.sparse_ratio, KINDS["H"]: config.heavy_ratio},
        "sliding_window": config.window,
        "index_n_heads": config.index.num_heads,
        "index_head_dim": config.index.head_dim,
        "index_topk": config.index.top_k,
        "moe_intermediate_size": e.dim,
        "n_routed_experts": e.count,
        "num_experts_per_tok": e.per_tok,
        "n_shared_experts": e.shared,
        "num_hash_layers": e.hash_layers,
        "mlp_layer_types": ["hash_moe"] * e.hash_layers + ["moe"] * learned,
        "scoring_func": "sqrtsoftplus",
        "norm_topk_prob": True,
        "routed_scaling_factor": e.route_scale,
        "swiglu_limit": e.limit,
        "hc_mult": config.streams.count,
        "hc_sinkhorn_iters": config.streams.iterations,
        "hc_eps": config.streams.eps,
        "rope_theta": config.rope.theta,
        "compress_rope_theta": config.compressed_rope.theta,
        "rope_parameters": {
            "main": config.rope.to_hf() | part,
            "compress": config.compressed_rope.to_hf() | part,
        },
        "max_position_embeddings": config.max_positions,
        "num_nextn_predict_layers": config.num_mtp_layers,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "dtype": config.dtype,
    }


def _rope_dim(d: HFConfig) -> int:
    size, part = d.size("qk_rope_head_dim", None), d.number("partial_rotary_factor", None)
    if size is None and part is None:
        raise KeyError("qk_rope_head_dim")
    given = {int(x) for x in (size, part and d.size("head_dim") * part) if x is not None}
    if len(given) > 1:
        raise ValueError(
            "qk_rope_head_dim and partial_rotary_factor * head_dim must be the same; "
            f"got {size} and {part} * {d['head_dim']}"
        )
    return given.pop()


def _layers(d: HFConfig) -> tuple[str, int, int]:
    """`(layer_kinds, sparse_ratio, heavy_ratio)`; extra ratios at the end are of draft layers."""
    count = d.size("num_hidden_layers")
    types, ratios = d.kinds("layer_types", count), d.places("compress_ratios")
    rates = dict(d.get("compress_rates") or {})
    patterns = []
    if types is not None:
        letters = {name: kind for kind, name in KINDS.items()}
        patterns.append("".join(_each(types, letters, "layer_types")))
        sparse, heavy = (d["compress_rates"][KINDS[kind]] for kind in "CH")
    else:
        sparse, heavy = rates.get(KINDS["C"], 4), rates.get(KINDS["H"], 128)
    if unknown := rates.keys() - {KINDS["C"], KINDS["H"]}:
        raise NotImplementedError(f"deepseek_v4: compress_rates, not known are {sorted(unknown)}")
    if ratios is not None:
        patterns.append("".join(_each(ratios[:count], HUB_RATIOS, "compress_ratios")))
        if (sparse, heavy) != (4, 128):
            raise ValueError(f"compress_ratios are of 4 and 128; got compress_rates={rates}")
    if not patterns:
        raise KeyError("compress_ratios")
    if len(set(patterns)) > 1:
        raise ValueError(
            f"layer_types and compress_ratios say {' and '.join(patterns)}: not the same"
        )
    return patterns[0], sparse, heavy


def _each(values: Sequence, known: Mapping, field: str) -> list[str]:
    if unknown := sorted(set(values) - known.keys()):
        raise NotImplementedError(
            f"deepseek_v4: {field} are of {list(known)}; got {field} with {unknown}"
        )
    return [known[value] for value in values]


def _hash_layers(d: HFConfig) -> int:
    layers, given = d.size("num_hidden_layers"), d.count("num_hash_layers", None)
    listed = d.leading("mlp_layer_types", layers, "hash_moe", "moe")
    counts = {min(x, layers) for x in (given, listed) if x is not None}
    if not counts:
        raise KeyError("num_hash_layers")
    if len(counts) > 1:
        raise ValueError(
            f"deepseek_v4: mlp_layer_types has {listed} hash_moe, num_hash_layers={given}; "
            "make them agree"
        )
    return counts.pop()


def _ropes(d: HFConfig) -> tuple[Rope, Rope]:
    """Read the rotary positions of window layers, and of layers with compressed entries."""
    rope = merged(d) or {}
    if "main" in rope and "compress" in rope:
        d.get("rope_theta"), d.get("compress_rope_theta")  # theirs are inside
        main, compressed = dict(rope.pop("main")), dict(rope.pop("compress"))
        if rope:
            raise NotImplementedError(f"deepseek_v4: rope_parameters, not known are {sorted(rope)}")
    else:
        bases = d["rope_theta"], d["compress_rope_theta"]
        if rope.get("rope_theta", bases[0]) not in bases:
            raise ValueError(
                f"deepseek_v4: rope_theta must be one number; got {rope['rope_theta']} among the "
                f"rope_parameters and {bases[0]} beside them"
            )
        main, compressed = {"rope_theta": bases[0]}, rope | {"rope_theta": bases[1]}
        if rope.get("rope_type") == "yarn":
            compressed.setdefault("attention_factor", 1.0)  # V4 does not scale cos and sin
    part = _rope_dim(d) / d["head_dim"]
    for one in (main, compressed):
        if one.pop("partial_rotary_factor", part) != part:
            raise ValueError(f"partial_rotary_factor must be {part} everywhere")
    main, compressed = ({"rope_parameters": one} for one in (main, compressed))
    return Rope.from_hf(main, interleaved=True), Rope.from_hf(compressed, interleaved=True)
