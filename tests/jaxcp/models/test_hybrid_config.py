# SPDX-License-Identifier: Apache-2.0
"""config.json of Hy3, Qwen3-MoE, gpt-oss: as published, with fields left out, and refused."""

import dataclasses
import json
import math

import pytest
from published import HY3
from tiny_checkpoints import FIXTURES

from jaxcp import HybridMoEConfig, TrainConfig, models, weights
from jaxcp.layers.mlp import SwiGLU
from jaxcp.layers.rope import Llama3, Rope, YaRN
from jaxcp.layers.routing import Routing
from jaxcp.layers.stack import of_each_layer
from jaxcp.models.hybrid_moe import hf
from jaxcp.models.hybrid_moe.config import (
    AttentionConfig,
    ExpertsConfig,
    Heads,
    NGramConfig,
    NormConfig,
)
from jaxcp.models.weight_table import sources
from jaxcp.training import LossConfig

# As the hub has them, but for token ids, versions and what initialises
QWEN3_30B = {
    "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
    "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
    "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1e6,
    "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3_235B = QWEN3_30B | {
    "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536,
    "num_attention_heads": 64, "num_hidden_layers": 94,
}  # fmt: skip
GPT_OSS_120B = {
    "model_type": "gpt_oss", "attention_bias": True, "head_dim": 64, "hidden_act": "silu",
    "hidden_size": 2880, "intermediate_size": 2880, "initial_context_length": 4096,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "max_position_embeddings": 131072, "num_attention_heads": 64, "num_experts_per_tok": 4,
    "experts_per_token": 4, "num_hidden_layers": 36, "num_key_value_heads": 8,
    "num_local_experts": 128, "rms_norm_eps": 1e-5, "rope_theta": 150000, "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn",
        "original_max_position_embeddings": 4096, "truncate": False},
    "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 201088,
}  # fmt: skip
GPT_OSS_20B = GPT_OSS_120B | {
    "num_hidden_layers": 24, "num_local_experts": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
}  # fmt: skip
PUBLISHED = {
    "hy3": HY3, "30b": QWEN3_30B, "235b": QWEN3_235B, "120b": GPT_OSS_120B, "20b": GPT_OSS_20B,
}  # fmt: skip


def named(config):
    """Every tensor that a checkpoint of this configuration has, and its shape."""
    leaves = of_each_layer(weights.abstract_model(config))
    leaves = {path: leaf.shape for path, leaf in leaves.items()}
    found = sources(models.family_of(config).table(config), leaves)
    return {name: source.shape for source in found.values() for name in source.names}


# What is published


def test_names_parameters_and_bytes_of_hy3():
    """Counted by others in the headers of the published files."""
    shapes = named(models.config_from_dict(HY3))
    assert len(shapes) == 47_138
    float32 = {name for name in shapes if name.endswith("mlp.expert_bias")}
    count = sum(math.prod(shape) for name, shape in shapes.items() if name not in float32)
    assert count == 298_786_140_416
    assert sum(math.prod(shapes[name]) for name in float32) == 15_360
    assert 2 * count + 4 * 15_360 == 597_572_342_272
    assert shapes["model.layers.79.mlp.experts.191.down_proj.weight"] == (4096, 1536)
    assert shapes["model.layers.79.self_attn.o_proj.weight"] == (4096, 8192)
    assert shapes["model.layers.80.eh_proj.weight"] == (4096, 8192)
    assert len([name for name in shapes if name.startswith("model.layers.80.")]) == 593
    without = named(models.config_from_dict(HY3 | {"num_nextn_predict_layers": 0}))
    assert len(without) == 47_138 - 593


@pytest.mark.parametrize(
    "fields, billions",
    [(QWEN3_30B, 30.5), (QWEN3_235B, 235), (GPT_OSS_120B, 116.83), (GPT_OSS_20B, 20.91)],
)
def test_parameters_of_the_others(fields, billions):
    """As their authors round them."""
    shapes = named(models.config_from_dict(fields))
    count = sum(map(math.prod, shapes.values())) / 1e9
    digits = len(str(billions).partition(".")[2])
    assert round(count, digits) == billions
    assert "model.layers.0.mlp.experts.gate_up_proj" in shapes or fields["num_experts"] == 128


def test_what_is_published_of_gpt_oss():
    packed = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []}}
    config = models.config_from_dict(GPT_OSS_120B | packed)
    assert config == models.config_from_dict(GPT_OSS_120B)
    shapes = named(config)
    assert shapes["model.layers.35.mlp.experts.gate_up_proj"] == (128, 2880, 5760)
    assert shapes["model.layers.0.self_attn.sinks"] == (64,)
    assert (config.layer_pattern, config.window) == ("LG", 128)
    assert config.attention.rope.yarn == YaRN(
        factor=32.0, original_max_positions=4096, truncate=False
    )
    assert config.experts.activation == SwiGLU(limit=7.0, alpha=1.702, shift=1.0)


@pytest.mark.parametrize("fields", PUBLISHED.values(), ids=PUBLISHED)
def test_a_round_trip_says_the_same(fields):
    """And every field of the file that we write back has its value."""
    config = models.config_from_dict(fields)
    written = models.config_to_dict(config)
    assert models.config_from_dict(written) == config
    assert written["model_type"] == hf.model_type(config) == fields["model_type"]
    given = fields | {"rope_parameters": config.attention.rope.to_hf()}
    given["dtype"] = given.get("dtype") or given["torch_dtype"]
    assert {k: given[k] for k in written if k in given} == {
        k: v for k, v in written.items() if k in given
    }
    assert json.loads(json.dumps(written)) == written


# What transformers takes where a field is not there


def test_defaults_are_those_of_transformers():
    def without(fields, *names):
        names = (*names, "rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps")
        return models.config_from_dict({k: v for k, v in fields.items() if k not in names})

    hy3 = without(HY3, "enable_moe_fp32_combine", "router_scaling_factor", "first_k_dense_replace")
    assert hy3.experts.float32_sum and hy3.experts.routing.scale == 2.826
    assert hy3.attention.rope.theta == 11158840 and hy3.first_dense_layers == 1
    assert not models.config_from_dict(HY3).experts.float32_sum
    qwen = without(QWEN3_30B, "norm_topk_prob", "head_dim", "attention_bias")
    assert not qwen.experts.routing.normalise and qwen.head_dim == 64
    assert qwen.attention.rope.theta == 10_000 and qwen.norm.eps == 1e-6
    oss = without(GPT_OSS_120B, "layer_types", "swiglu_limit", "sliding_window", "attention_bias")
    expected = models.config_from_dict(GPT_OSS_120B)
    assert oss == expected


# Hidden switches


def test_qwen3_windows_only_where_it_says_so():
    fields = QWEN3_30B | {"sliding_window": 64}
    assert models.config_from_dict(fields).layer_pattern == "G"
    config = models.config_from_dict(fields | {"use_sliding_window": True})
    assert (config.layer_pattern, config.window) == ("L", 64)
    assert models.config_from_dict(models.config_to_dict(config)) == config


def test_the_expert_count_has_two_names():
    renamed = {k: v for k, v in QWEN3_30B.items() if k != "num_experts"} | {
        "num_local_experts": 128
    }
    assert models.config_from_dict(renamed) == models.config_from_dict(QWEN3_30B)


@pytest.mark.parametrize(
    "fields, change",
    [
        (HY3, {"qk_norm": False}),
        (HY3, {"moe_router_use_sigmoid": False}),
        (HY3, {"hidden_act": "gelu"}),
        (HY3, {"tie_word_embeddings": True}),
        (HY3, {"attention_bias": True}),
        (HY3, {"sliding_window": 128}),
        (HY3, {"num_nextn_predict_layers": 2}),
        (HY3, {"quantization_config": {"quant_method": "hqq"}}),
        (HY3, {"mlp_layer_types": ["sparse", "dense"] * 40}),
        (HY3, {"mlp_layer_types": ["dense"]}),
        (HY3, {"rope_parameters": {"rope_type": "dynamic", "alpha": 1000.0}}),
        (GPT_OSS_120B, {"quantization_config": {"quant_method": "hqq"}}),
        (QWEN3_30B, {"mlp_only_layers": [3]}),
        (QWEN3_30B, {"decoder_sparse_step": 2}),
        (QWEN3_30B, {"shared_expert_intermediate_size": 64}),
        (QWEN3_30B, {"layer_types": ["full_attention"]}),
        (QWEN3_30B, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
        (GPT_OSS_120B, {"layer_types": ["full_attention"]}),
        (GPT_OSS_120B, {"layer_types": ["chunked_attention"] * 36}),
        (GPT_OSS_120B, {"final_logit_softcapping": 30.0}),
        (GPT_OSS_120B, {"hidden_act": "gelu"}),
        (GPT_OSS_120B, {"partial_rotary_factor": 0.5}),
    ],
)
def test_what_is_not_there_is_refused_by_name(fields, change):
    name = next(iter(change))
    name = {"num_nextn_predict_layers": "num_mtp_layers", "rope_scaling": "rope_(param|type)"}.get(
        name, name
    )
    with pytest.raises(NotImplementedError, match=name):
        models.config_from_dict(fields | change)


@pytest.mark.parametrize(
    "fields, change, message",
    [
        (HY3, {"expert_hidden_dim": 768}, "got 1536 and 768"),
        (
            HY3,
            {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 78},
            "2 dense layers, first_k_dense_replace=1",
        ),
        (HY3, {"num_experts": None}, "num_experts"),
        (QWEN3_30B, {"num_experts_per_tok": 200}, "got 200 of 128"),
    ],
)
def test_fields_that_contradict_each_other(fields, change, message):
    given = {k: v for k, v in (fields | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        models.config_from_dict(given)


# Mixtures

MIXTURE = HybridMoEConfig(
    vocab_size=32, num_layers=3, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=16, moe_dim=8, num_experts=4, num_experts_per_tok=2, layer_pattern="LNG", window=5,
    attention=AttentionConfig(
        full=Heads(num_heads=2, num_kv_heads=1, head_dim=6, value_dim=5, rope=Rope(part=0.7)),
        rope=Rope(yarn=YaRN(factor=2.0, original_max_positions=9)), output_bias=False,
    ),
    experts=ExpertsConfig(routing=Routing(scale=1.5)), ngram=NGramConfig(width=3),
)  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"ngram": NGramConfig(), "layer_pattern": "G", "attention": AttentionConfig(sinks=True)},
        {"ngram": NGramConfig(), "norm": NormConfig(float32_scale=True), "num_mtp_layers": 1},
        {
            "attention": AttentionConfig(
                rope=Rope(llama3=Llama3(factor=2.0, original_max_positions=9))
            )
        },
        {"attention": AttentionConfig(rope=Rope(linear=2.0))},
    ],
)
def test_a_mixture_is_taken_for_nothing_else(change):
    """A file that another program would read as one of its models, and compute something else."""
    config = dataclasses.replace(MIXTURE, **change)
    assert models.config_to_dict(config)["model_type"] == "jaxcp_hybrid_moe"
    assert models.config_from_dict(json.loads(json.dumps(models.config_to_dict(config)))) == config
    with pytest.raises(ValueError, match=r"not known.*'drop'"):
        models.config_from_dict(models.config_to_dict(config) | {"drop": 0.5})


def test_a_plain_one_has_the_format_of_its_family():
    plain = dataclasses.replace(
        MIXTURE, layer_pattern="G", window=None, attention=AttentionConfig(), ngram=NGramConfig()
    )
    assert models.config_to_dict(plain)["model_type"] == hf.model_type(plain) == "hy_v3"
    assert models.config_from_dict(models.config_to_dict(plain)) == plain
    remat = dataclasses.replace(plain, remat=True)
    assert hf.model_type(remat) == "hy_v3"
    assert models.config_to_dict(remat) == models.config_to_dict(plain)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layer_pattern": "GX"}, "layer_pattern is made of G, L and N; got 'GX'"),
        ({"layer_pattern": ""}, "layer_pattern is made of G, L and N; got ''"),
        ({"window": None}, "a pattern with L needs window >= 1; got window=None"),
        ({"window": 0}, "needs window >= 1; got window=0"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads; got 3 and 4"),
        ({"attention": AttentionConfig(rope=Rope(part=0.4))}, "got 3 of 8, by part=0.4"),
        ({"head_dim": 7}, "head_dim must be even for rotary positions; got 7"),
        ({"num_experts_per_tok": 5}, "1 <= num_experts_per_tok <= num_experts; got 5 of 4"),
        ({"num_experts_per_tok": 0}, "got 0 of 4"),
        ({"first_dense_layers": 4}, "0 <= first_dense_layers <= num_layers; got 4 of 3"),
        ({"num_mtp_layers": 2}, "num_mtp_layers must be 0 or 1"),
        ({"num_mtp_layers": 1}, "an MTP layer embeds single tokens; got ngram.width=3"),
    ],
)
def test_a_hybrid_that_makes_no_sense(change, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        dataclasses.replace(MIXTURE, **change)


def test_an_mtp_layer_is_not_trained_unawares(tmp_path):
    plain = dataclasses.replace(MIXTURE, ngram=NGramConfig())
    run = {"seq_len": 8, "batch_size": 1, "steps": 1, "data": "*.bin", "out_dir": tmp_path}
    assert TrainConfig(model=plain, **run).model == plain
    drafting = dataclasses.replace(plain, num_mtp_layers=1)
    assert TrainConfig(model=drafting, **run).losses.mtp_loss_weight == 0.3
    with pytest.raises(ValueError, match="mtp_loss_weight must be >= 0; got mtp_loss_weight=-1"):
        LossConfig(mtp_loss_weight=-1)
    with pytest.raises(ValueError, match="an MTP layer without a loss would only decay"):
        TrainConfig(model=drafting, losses=LossConfig(mtp_loss_weight=0.0), **run)


def test_fixtures_are_of_their_families():
    for name, kind in (("hy3", "hy_v3"), ("qwen3-moe", "qwen3_moe"), ("gpt-oss", "gpt_oss")):
        config = weights.load_config(FIXTURES / f"{name}-tiny")
        assert hf.model_type(config) == kind
        assert models.config_from_dict(models.config_to_dict(config)) == config
