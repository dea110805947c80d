# SPDX-License-Identifier: Apache-2.0
"""config.json of Qwen3-Next, Qwen3.5 and Kimi Linear: sizes, both directions, refusals by name."""

import dataclasses
import json
import logging
import math

import jax
import numpy as np
import pytest
from published import (
    KIMI_LINEAR_48B,
    QWEN3_NEXT_80B,
    QWEN35_27B,
    QWEN35_35B,
    QWEN35_397B,
    QWEN35_397B_TEXT,
)
from tiny_checkpoints import FIXTURES, assert_same, tensors, write

import jaxcp
from jaxcp import models
from jaxcp.layers.stack import of_each_layer
from jaxcp.models.weight_table import sources

PUBLISHED = [
    # parameters that transformers 5.24 makes of the configuration, selection biases included; it
    # makes no MTP layer
    pytest.param(QWEN3_NEXT_80B, 79_674_391_296, id="Qwen3-Next-80B-A3B"),
    pytest.param(QWEN35_397B, 396_346_350_336, id="Qwen3.5-397B-A17B", marks=pytest.mark.slow),
    pytest.param(QWEN35_35B, 34_660_610_688, id="Qwen3.5-35B-A3B", marks=pytest.mark.slow),
    pytest.param(QWEN35_27B, 26_895_998_464, id="Qwen3.5-27B", marks=pytest.mark.slow),
    pytest.param(KIMI_LINEAR_48B, 49_122_681_728, id="Kimi-Linear-48B-A3B"),
]


@pytest.mark.parametrize("published, parameters", PUBLISHED)
def test_published_models(published, parameters):
    config = models.config_from_dict(published)
    assert models.config_from_dict(models.config_to_dict(config)) == config
    leaves = of_each_layer(jaxcp.abstract_model(config))
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    own = (math.prod(shape) for name, shape in shapes.items() if not name.startswith("mtp."))
    assert sum(own) == parameters
    family = models.family_of(config)
    assert sources(family.table(config), shapes).keys() == shapes.keys()


@pytest.mark.parametrize(
    "published, change, message",
    [
        (QWEN3_NEXT_80B, {"hidden_act": "gelu"}, "hidden_act"),
        (QWEN3_NEXT_80B, {"use_sliding_window": True}, "use_sliding_window"),
        (QWEN3_NEXT_80B, {"linear_qk_norm": False}, "linear_qk_norm"),
        (QWEN3_NEXT_80B, {"layer_types": ["sliding_attention"] * 48}, "sliding_attention"),
        (QWEN3_NEXT_80B, {"layer_types": ["full_attention"] * 48}, "must agree"),
        (QWEN3_NEXT_80B, {"linear_num_key_heads": 24}, "must divide num_value_heads"),
        (QWEN3_NEXT_80B, {"partial_rotary_factor": 0.005}, "an even number of channels"),
        (QWEN3_NEXT_80B, {"rope_scaling": {"mrope_section": [11, 11, 10]}}, "mrope_section"),
        (QWEN35_397B_TEXT, {"attn_output_gate": False}, "attn_output_gate"),
        (QWEN35_397B_TEXT, {"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype"),
        (QWEN35_397B_TEXT, {"norm_topk_prob": False}, "norm_topk_prob"),
        (QWEN35_397B_TEXT, {"mlp_only_layers": [1]}, "mlp_only_layers"),
        (QWEN35_397B, {"text_config": QWEN3_NEXT_80B}, "text_config is of qwen3_5_moe_text"),
        (QWEN35_397B, {"text_config": None}, "text_config must be an object"),
        (QWEN35_397B, {"audio_config": {}}, "audio_config"),
        (KIMI_LINEAR_48B, {"mla_use_nope": False}, "mla_use_nope"),
        (KIMI_LINEAR_48B, {"hidden_act": "situ"}, "hidden_act"),
        (KIMI_LINEAR_48B, {"num_key_value_heads": 8}, "num_key_value_heads"),
        (KIMI_LINEAR_48B, {"moe_router_activation_func": "softmax"}, "moe_router_activation_func"),
        (KIMI_LINEAR_48B, {"attention_bias": True}, "attention_bias"),
        (KIMI_LINEAR_48B, {"mla_use_output_gate": True}, "mla_use_output_gate"),
        (
            KIMI_LINEAR_48B,
            {"linear_attn_config": {**KIMI_LINEAR_48B["linear_attn_config"],
                                    "gate_lower_bound": -5.0}},
            "gate_lower_bound",
        ),
        (KIMI_LINEAR_48B, {"linear_num_heads": 16}, "linear_num_heads=16 and num_heads=32"),
        (KIMI_LINEAR_48B, {"num_hidden_layers": 26}, "must number 26 layers"),
        (KIMI_LINEAR_48B, {"layer_types": ["full_attention"] * 27}, "must agree"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused_by_name(published, change, message):
    with pytest.raises((NotImplementedError, ValueError), match=message):
        models.config_from_dict(published | change)


def test_layers_with_an_mlp():
    """`mlp_only_layers` and `decoder_sparse_step` of Qwen3-Next."""
    few = QWEN3_NEXT_80B | {"num_hidden_layers": 8}
    assert models.config_from_dict(few).mlp_pattern == "E"
    read = models.config_from_dict(few | {"mlp_only_layers": [1]})
    assert (read.mlp_pattern, read.mlp_dim) == ("EDEEEEE", 5120)
    assert models.config_from_dict(few | {"decoder_sparse_step": 2}).mlp_pattern == "DE"
    dense = models.config_from_dict(few | {"num_experts": 0})
    assert (dense.mlp_pattern, dense.experts) == ("D", None)
    assert models.config_from_dict(models.config_to_dict(read)) == read
    assert models.config_from_dict(models.config_to_dict(dense)) == dense
    with pytest.raises(NotImplementedError, match="qwen3_5_text cannot say"):
        models.config_to_dict(dataclasses.replace(read, format="qwen3_5_text"))


def test_the_text_part_of_a_checkpoint_that_sees_pictures(tmp_path, caplog):
    """As the hub has it: another prefix, tensors of pictures and of drafts, which a line names."""
    name = "qwen3-5-moe-tiny"
    plain, _ = jaxcp.load(FIXTURES / name)
    text = models.config_to_dict(plain.config)
    nested = {
        key.replace("model.", "model.language_model.", 1): x for key, x in tensors(name).items()
    }
    others = {"model.visual.patch_embed.weight": 2, "mtp.fc.weight": 3}
    nested |= {key: np.ones(size, np.float32) for key, size in others.items()}
    fields = {**QWEN35_397B, "text_config": text | {"mtp_num_hidden_layers": 0}}
    folder = write(tmp_path / "whole", name, nested)
    (folder / "config.json").write_text(json.dumps(fields))
    with caplog.at_level(logging.INFO):
        model, _ = jaxcp.load(folder)
    assert "left out 2 tensors" in caplog.text
    assert "the part that sees pictures is not" in caplog.text
    assert model.config == dataclasses.replace(plain.config, num_mtp_layers=0)
    assert_same(model, plain)
    jaxcp.save(model, tmp_path / "again")
    again, _ = jaxcp.load(tmp_path / "again")
    assert_same(again, plain)


def test_training_needs_rows_that_fill_their_pieces(tmp_path):
    config = jaxcp.load_config(FIXTURES / "qwen3-next-tiny")
    options = {"model": config, "batch_size": 2, "steps": 1, "data": jaxcp.TextSource(),
               "out_dir": tmp_path}  # fmt: skip
    mesh = jaxcp.MeshConfig(seq=4)
    with pytest.raises(ValueError, match=r"seq_len to divide by 8.*got seq_len=36"):
        jaxcp.TrainConfig(seq_len=36, mesh=mesh, **options)
    assert jaxcp.TrainConfig(seq_len=40, mesh=mesh, **options).seq_len == 40
    assert jaxcp.TrainConfig(seq_len=37, **options).seq_len == 37


def test_no_layer_of_a_bfloat16_model_widens_its_states():
    for name in ("qwen3-next-tiny", "kimi-linear-tiny"):
        config = jaxcp.load_config(FIXTURES / name)
        model = jaxcp.abstract_model(dataclasses.replace(config, dtype="bfloat16"))
        ids = jax.ShapeDtypeStruct((1, 4), np.int32)
        hidden, _ = jax.eval_shape(lambda m, x: m.hidden(x, x), model, ids)
        assert hidden.dtype == "bfloat16"
