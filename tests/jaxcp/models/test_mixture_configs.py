# SPDX-License-Identifier: Apache-2.0
"""config.json of GLM-4.5, MiniMax-M2 and MiMo-V2-Flash: as published, in other words, refused."""

import dataclasses
import json
import math

import pytest
from published import GLM_45, GLM_45_AIR, HY3, MIMO_V2_FLASH, MINIMAX_M25
from test_hybrid_config import named
from tiny_checkpoints import FIXTURES

from jaxcp import models, weights
from jaxcp.layers.rope import Rope, YaRN
from jaxcp.models.hybrid_moe import hf
from jaxcp.models.hybrid_moe.config import Heads
from jaxcp.training.identity import differences, plain

PUBLISHED = {"GLM-4.5": GLM_45, "Air": GLM_45_AIR, "M2.5": MINIMAX_M25, "MiMo": MIMO_V2_FLASH}
NVFP4 = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}


def read(fields, **change):
    return models.config_from_dict(fields | change)


@pytest.mark.parametrize(
    "fields, copies, billions",
    [
        # as the hub counts the files: GLM's MTP layer has the embedding and the head once more
        (GLM_45, 2 * 151_552 * 5120, 358),
        (GLM_45_AIR, 2 * 151_552 * 4096, 110),
        (MINIMAX_M25, 0, 229),
        (MIMO_V2_FLASH, 0, 309),
    ],
    ids=PUBLISHED,
)
def test_parameters(fields, copies, billions):
    count = sum(map(math.prod, named(read(fields)).values())) + copies
    assert round(count / 1e9) == billions
    without = named(read(fields, num_nextn_predict_layers=0))
    assert (len(without) < len(named(read(fields)))) == (fields["model_type"] == "glm4_moe")


def test_names_and_shapes():
    glm, m2, mimo = (named(read(x)) for x in (GLM_45, MINIMAX_M25, MIMO_V2_FLASH))
    assert glm["model.layers.91.mlp.gate.e_score_correction_bias"] == (160,)
    assert glm["model.layers.92.shared_head.norm.weight"] == (5120,)
    assert glm["model.layers.92.mlp.experts.159.down_proj.weight"] == (5120, 1536)
    assert "model.layers.0.self_attn.o_proj.bias" not in glm
    assert glm["model.layers.0.self_attn.q_proj.bias"] == (96 * 128,)
    assert m2["model.layers.61.block_sparse_moe.experts.255.w2.weight"] == (3072, 1536)
    assert m2["model.layers.0.self_attn.k_norm.weight"] == (8 * 128,)
    for layer, kv_heads in ((0, 4), (1, 8), (5, 4), (46, 8), (47, 4)):
        attention = f"model.layers.{layer}.self_attn"
        assert mimo[f"{attention}.k_proj.weight"] == (kv_heads * 192, 4096)
        assert mimo[f"{attention}.v_proj.weight"] == (kv_heads * 128, 4096)
        assert (f"{attention}.attention_sink_bias" in mimo) == (kv_heads == 8)


@pytest.mark.parametrize("fields", PUBLISHED.values(), ids=PUBLISHED)
def test_a_round_trip_says_the_same(fields):
    config = read(fields)
    written = models.config_to_dict(config)
    assert models.config_from_dict(json.loads(json.dumps(written))) == config
    assert written["model_type"] == hf.model_type(config) == fields["model_type"]
    names = {"layernorm_epsilon": "rms_norm_eps"}
    given = {names.get(k, k): v for k, v in fields.items()}
    given["dtype"] = given.get("torch_dtype", "bfloat16")
    given["routed_scaling_factor"] = given.get("routed_scaling_factor") or 1.0
    given["sliding_window"] = given.get("sliding_window_size", 0) + 1  # its authors' words
    assert {k: written[k] for k in written if k in given} == {
        k: given[k] for k in written if k in given
    }
    assert read(fields, **NVFP4) == config


def test_what_is_published():
    assert read(GLM_45).attention.rope == Rope(theta=1e6, part=0.5)
    m2 = read(MINIMAX_M25).attention
    assert m2.rope == Rope(theta=5e6, part=0.5) and m2.qk_norm and m2.qk_norm_together
    mimo = read(MIMO_V2_FLASH)
    assert [mimo.kind(i) for i in range(7)] == [*"GLLLLGL"] and mimo.window == 129
    assert mimo.heads(1) == Heads(
        num_heads=64, num_kv_heads=8, head_dim=192, value_dim=128, rope=Rope(part=0.334), sinks=True
    )
    assert mimo.heads(0) == dataclasses.replace(
        mimo.heads(1), num_kv_heads=4, rope=Rope(theta=5e6, part=0.334), sinks=False
    )
    assert mimo.heads(0).rope.turning(192) == 64


def test_mimo_in_the_words_of_transformers():
    """As its converter says them; a window of 128 is one of 129 in the authors' `..._size`."""
    theirs = {
        k: v
        for k, v in MIMO_V2_FLASH.items()
        if not k.startswith(("swa_", "add_", "hybrid_", "sliding", "attention_chunk", "rope_theta"))
        and k not in ("moe_layer_freq", "layernorm_epsilon", "scoring_func", "topk_method")
        and k not in ("n_shared_experts", "partial_rotary_factor")
    }
    kinds = ["sliding_attention" if x else "full_attention"
             for x in MIMO_V2_FLASH["hybrid_layer_pattern"]]  # fmt: skip
    part = {"rope_type": "default", "partial_rotary_factor": 0.334}
    rope = {"full_attention": part | {"rope_theta": 5e6},
            "sliding_attention": part | {"rope_theta": 1e4}}  # fmt: skip
    theirs |= {"layer_types": kinds, "mlp_layer_types": ["dense"] + ["sparse"] * 47}
    theirs |= {"rms_norm_eps": 1e-5, "rope_parameters": rope, "sliding_window": 129}
    assert read(theirs) == read(MIMO_V2_FLASH)
    defaults = {
        k: v
        for k, v in theirs.items()
        if k not in ("layer_types", "mlp_layer_types", "rope_parameters", "sliding_window")
    }
    assert read(defaults) == read(MIMO_V2_FLASH)


def test_no_format_takes_another_for_its_own():
    """The names of tensors go by it, and the fields of one nearly say what another's do."""
    glm = {"attention_bias": False, "partial_rotary_factor": 1.0}  # Hy3 but for names
    mimo = {"hybrid_layer_pattern": [0] * 48, "attention_value_scale": None, "v_head_dim": 192}
    mimo |= {"swa_v_head_dim": 192, "swa_num_key_value_heads": 4, "swa_rope_theta": 5000000}
    for fields in (GLM_45 | glm, MIMO_V2_FLASH | mimo | {"add_swa_attention_sink_bias": False}):
        config = read(fields)
        assert models.config_to_dict(config)["model_type"] == fields["model_type"]
        assert models.config_from_dict(models.config_to_dict(config)) == config
        others = dataclasses.replace(config.attention, sinks=True, full=None)
        mixture = dataclasses.replace(config, attention=others)
        assert models.config_to_dict(mixture)["model_type"] == "jaxcp_hybrid_moe"


@pytest.mark.parametrize(
    "fields, change",
    [
        (GLM_45, {"hidden_act": "gelu"}),
        (GLM_45, {"scoring_func": "softmax"}),
        (GLM_45, {"topk_method": "greedy"}),
        (GLM_45, {"layer_types": ["sliding_attention"] * 92}),
        (GLM_45, {"sliding_window": 128}),
        (GLM_45, {"num_nextn_predict_layers": 2}),
        (GLM_45, {"partial_rotary_factor": 0.26}),  # 33 channels
        (GLM_45, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
        (GLM_45, {"n_group": 3}),
        (GLM_45, {"kv_lora_rank": 512}),
        (GLM_45, {"quantization_config": {"quant_method": "hqq"}}),
        (MINIMAX_M25, {"use_qk_norm": False}),
        (MINIMAX_M25, {"qk_norm_type": "per_head"}),
        (MINIMAX_M25, {"use_routing_bias": False}),
        (MINIMAX_M25, {"scoring_func": "softmax"}),
        (MINIMAX_M25, {"shared_intermediate_size": 1536}),
        (MINIMAX_M25, {"attn_type_list": [0] + [1] * 61}),
        (MINIMAX_M25, {"rotary_dim": 63}),
        (MINIMAX_M25, {"partial_rotary_factor": 1.0}),
        (MINIMAX_M25, {"sliding_window": 128}),
        (MINIMAX_M25, {"attention_bias": True}),
        (MIMO_V2_FLASH, {"n_shared_experts": 1}),
        (MIMO_V2_FLASH, {"hybrid_layer_pattern": [0, 1]}),
        (MIMO_V2_FLASH, {"hybrid_layer_pattern": [2] * 48}),
        (MIMO_V2_FLASH, {"layer_types": ["full_attention"] * 48}),
        (MIMO_V2_FLASH, {"moe_layer_freq": [1] * 47 + [0]}),
        (MIMO_V2_FLASH, {"mlp_layer_types": ["sparse"] * 48}),
        (MIMO_V2_FLASH, {"sliding_window": 64}),
        (MIMO_V2_FLASH, {"attention_chunk_size": 64}),
        (MIMO_V2_FLASH, {"scoring_func": "softmax"}),
        (MIMO_V2_FLASH, {"attention_value_scale": "0.7"}),
        (MIMO_V2_FLASH, {"rope_parameters": {"rope_theta": 1e4}}),
        (MIMO_V2_FLASH, {"swa_num_key_value_heads": 5}),
        (MIMO_V2_FLASH, {"swa_rotary_dim": 32}),
    ],
)
def test_what_is_not_there_is_refused_by_name(fields, change):
    name = {
        "num_nextn_predict_layers": "num_mtp_layers", "rope_scaling": "rope_type",
        "n_group": "num_groups", "quantization_config": "quant_method",
        "swa_num_key_value_heads": "num_kv_heads", "rotary_dim": "rotary_dim|channels must turn",
        "partial_rotary_factor": "partial_rotary_factor|channels must turn",
        "mlp_layer_types": "moe_layer_freq", "moe_layer_freq": "mlp_layer_types",
        "layer_types": "layer_types",
    }.get(next(iter(change)), next(iter(change)))  # fmt: skip
    with pytest.raises((NotImplementedError, ValueError), match=name):
        read(fields, **change)


def test_a_set_of_rope_parameters_for_each_kind():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    full = yarn | {"rope_theta": 1e6, "partial_rotary_factor": 0.5}
    window = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    fields = json.loads((FIXTURES / "mimo-v2-flash-tiny" / "config.json").read_text())
    both = {"full_attention": full, "sliding_attention": window}
    config = read(fields, rope_parameters=both)
    long = YaRN(factor=4.0, original_max_positions=64)
    assert config.heads(0).rope == Rope(theta=1e6, part=0.5, yarn=long)
    # what transformers takes where a set that slows does not say its part
    assert config.heads(1).rope == Rope(linear=2.0)
    assert models.config_from_dict(models.config_to_dict(config)) == config


@pytest.mark.parametrize(
    "fields, near",
    [
        ({"model_type": "glm_moe_dsa"}, "Near it in name: glm4_moe. A new"),
        ({"model_type": "minimax_m3"}, "Near it in name: minimax_m2. A new"),
        ({"model_type": "mimo"}, "Near it in name: mimo_v2_flash. A new"),
        ({"model_type": "qwen3_vl"}, "Near it in name: qwen3"),
        (
            {"model_type": "deepseek_ref", "architectures": ["DeepseekV4ForCausalLM"]},
            "Near it in name: deepseek_v4",
        ),
        ({"model_type": "step3p7"}, "None is near it in name. A new"),
        ({"model_type": None, "architectures": ["Glm4ForCausalLM"]}, "name: glm4_moe"),
    ],
)
def test_an_unknown_model_type_names_its_neighbours(fields, near):
    with pytest.raises(ValueError, match=near):
        models.config_from_dict(fields)


def test_a_width_of_dense_layers_is_no_count_of_them(tmp_path):
    """MiniMax-M3's config.json has one of 12,288; it is refused for what it is."""
    fields = MINIMAX_M25 | {"model_type": "minimax_m3", "dense_intermediate_size": 12288}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="Near it in name: minimax_m2"):
        weights.load_config(tmp_path)


def test_a_run_from_before_these_features_goes_on():
    old = json.loads(json.dumps(plain(read(HY3))))
    for name in ("output_bias", "value_dim", "full"):
        assert old["attention"].pop(name) is None
    assert not {"qk_norm_together", "value_scale"} & old["attention"].keys()
    assert not {"part", "linear"} & old["attention"]["rope"].keys()
    assert differences(old, plain(read(HY3))) == []


def test_fixtures_are_of_their_families():
    for name in ("glm4_moe", "minimax_m2", "mimo_v2_flash"):
        config = weights.load_config(FIXTURES / f"{name.replace('_', '-')}-tiny")
        assert hf.model_type(config) == name
        assert models.config_from_dict(models.config_to_dict(config)) == config
