# SPDX-License-Identifier: Apache-2.0
"""Configurations drawn over every field that a reader accepts and that changes a result.

`drawn(name, rng)` gives the fields of a config.json as transformers takes them, and those that say
the same in the way of files before it.
"""

TOKENS, LENGTH = 48, 30
FULL, WINDOW = "full_attention", "sliding_attention"


def drawn(name, rng):
    return FAMILIES[name](name, rng)


def one_of(rng, *options):
    return options[rng.integers(len(options))]


def rope_of(rng):
    """A `rope_parameters` of any kind that is known."""
    theta = {"rope_theta": one_of(rng, 500.0, 10_000.0, 1e6)}
    slower = {"factor": one_of(rng, 2.0, 8.0), "original_max_position_embeddings": 16}
    yarn = {"beta_fast": 8.0, "beta_slow": 1.0, "truncate": one_of(rng, False, True)}
    kind = one_of(rng, "default", "linear", "llama3", "yarn")
    more = {
        "default": {},
        "linear": {"factor": slower["factor"]},
        "llama3": slower | {"low_freq_factor": 1.0, "high_freq_factor": one_of(rng, 2.0, 4.0)},
        "yarn": slower | (yarn if rng.integers(2) else {"attention_factor": 1.25}),
    }[kind]
    return theta | {"rope_type": kind} | more


def common(rng, kv_heads, head_dim):
    """The fields that all have, and `intermediate_size`."""
    heads = kv_heads * int(rng.integers(1, 4))
    return {
        "vocab_size": TOKENS, "num_hidden_layers": int(rng.integers(1, 5)),
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "hidden_size": heads * head_dim, "hidden_act": one_of(rng, "silu", "silu", "swish"),
        "intermediate_size": one_of(rng, 32, 56), "max_position_embeddings": 128,
        "rms_norm_eps": one_of(rng, 1e-6, 1e-3), "attention_dropout": 0.25,
        "tie_word_embeddings": one_of(rng, False, True), "initializer_range": 0.1,
        "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def older(fields):
    """The same of before `rope_parameters`.

    What transformers saves has all that it works out: `layer_types`, of `max_window_layers`.
    """
    rope = dict(fields["rope_parameters"])
    said = {k: v for k, v in fields.items() if k != "rope_parameters"}
    said |= {k: rope.pop(k) for k in ("rope_theta", "partial_rotary_factor") if k in rope}
    return said | {"rope_scaling": None if rope["rope_type"] == "default" else rope}


# Dense models


def dense(name, rng):
    head_dim = one_of(rng, 4, 8, 12)
    fields = common(rng, one_of(rng, 2, 4), head_dim) | {"rope_parameters": rope_of(rng)}
    if rng.integers(2) or name == "qwen3":  # whose head_dim is 128 where there is none
        fields["head_dim"] = one_of(rng, head_dim, 6, 16)
    if name in ("llama", "qwen3"):
        fields["attention_bias"] = one_of(rng, False, True)
    if name == "llama":
        fields |= {"mlp_bias": one_of(rng, False, True), "pretraining_tp": 2}
    fields |= windows_of(rng, name, fields["num_hidden_layers"])
    return fields, older(fields)


def windows_of(rng, name, layers):
    window = int(rng.integers(1, LENGTH))
    if name == "llama":
        return {}
    if name == "mistral":
        return {"sliding_window": None if rng.integers(3) == 0 else window}
    fields = {"use_sliding_window": bool(rng.integers(4)), "sliding_window": window}
    fields["max_window_layers"] = int(rng.integers(0, layers + 2))
    if fields["use_sliding_window"] and rng.integers(2):
        fields["layer_types"] = [one_of(rng, FULL, WINDOW) for _ in range(layers)]
    return fields


# Mixtures


def routed(rng):
    """The fields of DeepSeek-V3's router."""
    groups = one_of(rng, 1, 1, 2, 4)
    opened = int(rng.integers(1, groups + 1))
    return {
        "n_routed_experts": 8, "n_group": groups, "topk_group": opened,
        "num_experts_per_tok": int(rng.integers(1, min(4, 8 // groups * opened) + 1)),
        "moe_intermediate_size": one_of(rng, 16, 24), "norm_topk_prob": one_of(rng, True, False),
        "routed_scaling_factor": one_of(rng, 1.0, 2.5),
    }  # fmt: skip


def glm4_moe(_, rng):
    fields = common(rng, one_of(rng, 2, 4), 8) | routed(rng) | {"rope_parameters": rope_of(rng)}
    fields |= {
        "first_k_dense_replace": int(rng.integers(0, fields["num_hidden_layers"] + 1)),
        "n_shared_experts": one_of(rng, 1, 2), "attention_bias": one_of(rng, True, False),
        "use_qk_norm": one_of(rng, True, False), "num_nextn_predict_layers": one_of(rng, 0, 1),
    }  # fmt: skip
    if rng.integers(2):
        fields["head_dim"] = one_of(rng, 8, 12, 16)
    if rng.integers(3):  # a half where it is not said
        fields["rope_parameters"]["partial_rotary_factor"] = one_of(rng, 0.5, 0.26, 1.0)
        if fields.get("head_dim") == 12:
            fields["rope_parameters"]["partial_rotary_factor"] = one_of(rng, 0.334, 0.5, 1.0)
    return fields, older(fields)


def minimax_m2(_, rng):
    fields = common(rng, one_of(rng, 2, 4), 8) | {"rope_parameters": rope_of(rng)}
    turning = one_of(rng, 4, 8, 16)
    fields |= {
        "head_dim": 16, "num_local_experts": one_of(rng, 6, 8),
        "num_experts_per_tok": int(rng.integers(1, 5)), "router_jitter_noise": 0.5,
    }  # fmt: skip
    if turning < 16:
        fields["rope_parameters"]["partial_rotary_factor"] = turning / 16
    said = older(fields)
    said.pop("partial_rotary_factor", None)
    said |= {"rotary_dim": turning, "use_qk_norm": True, "qk_norm_type": "per_layer"}
    said |= {"use_routing_bias": True, "scoring_func": "sigmoid", "shared_intermediate_size": 0}
    return fields, said | {"attn_type_list": [1] * fields["num_hidden_layers"]}


def mimo_v2_flash(_, rng):
    fields = common(rng, one_of(rng, 2, 4), 8) | routed(rng)
    heads, layers = fields["num_key_value_heads"], fields["num_hidden_layers"]
    fields |= {
        "num_attention_heads": 2 * heads * int(rng.integers(1, 3)),  # windows have twice the keys
        "head_dim": one_of(rng, 8, 12), "v_head_dim": one_of(rng, 4, 6, 8, 16),
        "sliding_window": int(rng.integers(2, LENGTH)),
        "attention_bias": one_of(rng, True, False),
        "attention_value_scale": one_of(rng, None, 0.707, 1.5),
    }  # fmt: skip
    if rng.integers(4):
        fields["layer_types"] = [one_of(rng, FULL, WINDOW) for _ in range(layers)]
    if rng.integers(2):
        dense = int(rng.integers(0, layers + 1))
        fields["mlp_layer_types"] = ["dense"] * dense + ["sparse"] * (layers - dense)
    part = {"partial_rotary_factor": one_of(rng, 0.334, 0.5, 1.0)}
    if fields["head_dim"] == 8:
        part = {"partial_rotary_factor": one_of(rng, 0.25, 0.5, 1.0)}
    windows = {"rope_type": "default", "rope_theta": one_of(rng, 500.0, 1e4)}
    both = {FULL: rope_of(rng) | part, WINDOW: one_of(rng, windows, rope_of(rng)) | part}
    fields["rope_parameters"] = both
    return fields, authors(fields) if both[WINDOW]["rope_type"] == "default" else fields


def authors(fields):
    """The fields of MiMo-V2-Flash's authors, who count what a window has before its token."""
    layers, heads = fields["num_hidden_layers"], fields["num_key_value_heads"]
    kinds = [FULL if not i or (i + 1) % 6 == 0 else WINDOW for i in range(layers)]
    kinds = fields.get("layer_types", kinds)
    mlps = fields.get("mlp_layer_types", ["dense"] + ["sparse"] * (layers - 1))
    drop = "layer_types", "mlp_layer_types", "sliding_window", "rms_norm_eps", "rope_parameters"
    full, window = (fields["rope_parameters"][kind] for kind in (FULL, WINDOW))
    said = {k: v for k, v in fields.items() if k not in drop} | older({"rope_parameters": full})
    before = fields["sliding_window"] - 1
    return said | {
        "hybrid_layer_pattern": [int(kind == WINDOW) for kind in kinds],
        "moe_layer_freq": [int(mlp == "sparse") for mlp in mlps],
        "sliding_window": before, "sliding_window_size": before, "attention_chunk_size": before,
        "layernorm_epsilon": fields["rms_norm_eps"], "swa_rope_theta": window["rope_theta"],
        "swa_num_attention_heads": fields["num_attention_heads"],
        "swa_num_key_value_heads": 2 * heads, "swa_head_dim": fields["head_dim"],
        "swa_v_head_dim": fields["v_head_dim"], "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc", "n_shared_experts": None,
    }  # fmt: skip


FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), dense),
    "glm4_moe": glm4_moe,
    "minimax_m2": minimax_m2,
    "mimo_v2_flash": mimo_v2_flash,
}
