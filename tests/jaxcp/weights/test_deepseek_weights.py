# SPDX-License-Identifier: Apache-2.0
"""DeepSeek's checkpoints and config.json files: every spelling is read, nothing is guessed."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from published import FLASH, PRO, R1, V32_EXP
from safetensors.numpy import load_file
from tiny_checkpoints import FIXTURES, assert_same, flat, tensors, write

from jaxcp import models, weights
from jaxcp.layers.stack import of_each_layer
from jaxcp.models.weight_table import sources

V3, V32, V4 = "deepseek-v3-tiny", "deepseek-v32-tiny", "deepseek-v4-tiny"


def fields(name):
    return json.loads((FIXTURES / name / "config.json").read_text())


def hub_names():
    return load_file(FIXTURES / V4 / "model_official_names.safetensors")


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", [V3, V32, V4])
def test_round_trip_is_exact(name, dtype, tmp_path):
    """Under the hub's names. A published file has both formats in it, and int64 tables."""
    kept = ("bias", "tid2eid", "hc_attn_fn", "attn_sink")
    before = {
        k: v if k.endswith(kept) else v.astype(dtype)
        for k, v in (hub_names() if name == V4 else tensors(name)).items()
    }
    model, _ = weights.load(write(tmp_path / "in", name, before, dtype=np.dtype(dtype).name))
    weights.save(model, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == before.keys()
    for k in before:
        assert after[k].dtype == before[k].dtype and after[k].tobytes() == before[k].tobytes(), k
    again, _ = weights.load(tmp_path / "out")
    assert again.config == model.config
    assert_same(again, model)


def inside(contents):
    """Hub names of V4 -> what transformers calls them in memory, experts fused."""
    names = (
        (".attn_norm.", ".input_layernorm."), (".ffn_norm.", ".post_attention_layernorm."),
        (".hc_attn_", ".attn_hc."), (".hc_ffn_", ".ffn_hc."), (".ffn.", ".mlp."),
        (".attn.indexer.weights_proj", ".attn.compressor.indexer.scorer.weights_proj"),
        (".attn.indexer.compressor", ".attn.compressor.indexer"),
        (".attn.indexer.wq_b", ".attn.compressor.indexer.q_b_proj"),
        (".attn.", ".self_attn."), (".attn_sink", ".sinks"), (".ape", ".position_bias"),
        (".wq_a.", ".q_a_proj."), (".wq_b.", ".q_b_proj."), (".q_norm.", ".q_a_norm."),
        (".wkv.", ".kv_proj."), (".wo_a.", ".o_a_proj."), (".wo_b.", ".o_b_proj."),
        (".wgate.", ".gate_proj."), ("compressor.norm.", "compressor.kv_norm."),
        ("indexer.norm.", "indexer.kv_norm."), (".gate.bias", ".gate.e_score_correction_bias"),
        ("shared_experts.w1", "shared_experts.gate_proj"), ("shared_experts.w2",
        "shared_experts.down_proj"), ("shared_experts.w3", "shared_experts.up_proj"),
    )  # fmt: skip
    top = {"embed.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}
    kept, experts = {}, {}
    for name, tensor in contents.items():
        new = top.get(name, "model." + name.replace("hc_head_", "hc_head.hc_"))
        for old, other in names:
            new = new.replace(old, other)
        if ".experts." in new:
            base, rest = new.split(".experts.")
            expert, kind, _ = rest.split(".")
            experts.setdefault((base, kind), {})[int(expert)] = tensor
        else:
            kept[new] = tensor
    stacked = {key: np.stack([x[e] for e in range(len(x))]) for key, x in experts.items()}
    for base in {base for base, _ in stacked}:
        both = [stacked[base, "w1"], stacked[base, "w3"]]
        kept[f"{base}.experts.gate_up_proj"] = np.concatenate(both, axis=1)
        kept[f"{base}.experts.down_proj"] = stacked[base, "w2"]
    return kept


def test_every_spelling_of_v4(tmp_path):
    as_written, _ = weights.load(FIXTURES / V4)
    assert_same(as_written, weights.load(write(tmp_path, V4, hub_names()))[0])
    contents = inside(hub_names())
    grads = {k.removeprefix("grad/") for k in np.load(FIXTURES / V4 / "grads.npz")}
    assert grads <= contents.keys()  # these names are transformers' own
    assert_same(as_written, weights.load(write(tmp_path, V4, contents))[0])


def test_draft_layers_of_which_config_says_nothing_are_left_out(tmp_path):
    draft = {k.replace("layers.2.", "mtp.0."): v for k, v in hub_names().items() if ".2." in k}
    model, _ = weights.load(write(tmp_path, V4, hub_names() | draft, num_nextn_predict_layers=0))
    assert_same(model, weights.load(FIXTURES / V4)[0])
    extra = {k.replace(".2.", ".3."): v for k, v in tensors(V3).items() if ".layers.2." in k}
    extra["model.layers.3.eh_proj.weight"] = np.ones((64, 128), np.float32)
    model, _ = weights.load(write(tmp_path, V3, tensors(V3) | extra, num_nextn_predict_layers=0))
    assert_same(model, weights.load(FIXTURES / V3)[0])


def test_what_is_float32_whatever_the_dtype():
    model, _ = weights.load(FIXTURES / V4, dtype=jnp.bfloat16)
    exact = ("streams.mix", "streams.base", "streams.scale", "sinks", "router_bias")
    exact += ("compressor.bias", "one.mix", "one.base", "one.scale")
    for path, leaf in flat(model).items():
        wanted = jnp.float32 if path.endswith(exact) else jnp.bfloat16
        wanted = jnp.int32 if path.endswith("experts_of_token") else wanted
        assert leaf.dtype == wanted, path


def test_a_table_of_another_format(tmp_path):
    contents = hub_names()
    contents["layers.0.ffn.gate.tid2eid"] = contents["layers.0.ffn.gate.tid2eid"].astype("float32")
    with pytest.raises(ValueError, match=r"not in I64, I32:\n    layers\.0\.ffn\.gate\.tid2eid"):
        weights.load(write(tmp_path, V4, contents))


@pytest.mark.parametrize(
    "published, billions, names",
    [
        # names of the hub's index, less scales and the draft layer's
        (FLASH, 284.33, 34_223),
        (PRO, 1573.00, None),
        (R1, 671.03, None),
        (V32_EXP, None, None),
    ],
    ids=["V4-Flash", "V4-Pro", "V3", "V3.2"],
)
def test_published_models(published, billions, names):
    config = models.config_from_dict(published)
    assert config.num_mtp_layers == 1
    assert models.config_from_dict(models.config_to_dict(config)) == config
    config = dataclasses.replace(config, num_mtp_layers=0)
    assert models.config_from_dict(models.config_to_dict(config)) == config
    leaves = of_each_layer(weights.abstract_model(config))
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    parameters = sum(math.prod(x.shape) for x in leaves.values() if isinstance(x, nnx.Param))
    assert billions is None or round(parameters / 1e9, 2) == billions
    found = sources(models.family_of(config).weights.TABLE, shapes)
    named = {name: source.shape for source in found.values() for name in source.names}
    assert names is None or len(named) == names
    if published is FLASH:
        assert config.layer_kinds == "WW" + "CH" * 20 + "C"
        assert named["layers.2.attn.indexer.compressor.wkv.weight"] == (256, 4096)
        assert named["layers.0.attn.wo_a.weight"] == (8192, 4096)
        assert named["layers.0.ffn.gate.tid2eid"] == (129280, 6)
        assert named["layers.42.hc_attn_fn"] == (24, 16384)
        assert config.compressed_rope.yarn.gain == 1 and config.rope.yarn is None
    if published is R1:
        scale = 192**-0.5 * (0.1 * math.log(40) + 1) ** 2
        assert math.isclose(config.attention_scale, scale) and config.rope.yarn.gain == 1


@pytest.mark.parametrize("name", [V3, V32, V4])
def test_configs_survive_a_round_trip(name):
    config = models.config_from_dict(fields(name))
    assert models.config_from_dict(models.config_to_dict(config)) == config
    assert models.config_to_dict(config)["model_type"] == fields(name)["model_type"]


@pytest.mark.parametrize(
    "published, change, message",
    [
        (R1, {"scoring_func": "softmax"}, "scoring_func"),
        (R1, {"q_lora_rank": None}, "q_lora_rank=null"),
        (R1, {"moe_layer_freq": 2}, "moe_layer_freq"),
        (R1, {"rope_interleave": False}, "rope_interleave"),
        (R1, {"index_topk": 2048}, "not known, and may change what is computed: .*index_topk"),
        (V32_EXP, {"layer_types": ["indexed_attention"] * 60 + ["full_attention"]}, "layer_types"),
        (FLASH, {"compress_ratios": [0, 1] + [4] * 41}, r"compress_ratios with \[1\]"),
        (FLASH, {"scoring_func": "sigmoid"}, "scoring_func"),
        (FLASH, {"kv_source_layers": [0]}, "kv_source_layers"),
        (FLASH, {"n_group": 8}, "n_group"),
    ],
)
def test_options_that_are_not_there(published, change, message):
    with pytest.raises(NotImplementedError, match=message):
        models.config_from_dict(published | change)


@pytest.mark.parametrize(
    "published, missing",
    [(FLASH, "compress_ratios"), (FLASH, "num_hash_layers"), (FLASH, "sliding_window"),
     (FLASH, "qk_rope_head_dim"), (FLASH, "index_topk"), (R1, "n_group"), (R1, "norm_topk_prob")],
)  # fmt: skip
def test_defaults_are_nobodys(published, missing):
    kept = {k: v for k, v in published.items() if k != missing}
    with pytest.raises(ValueError, match=f"needs the field '{missing}'"):
        models.config_from_dict(kept)


def test_two_answers_about_the_same_layer():
    kinds = ["sliding_attention"] * 43
    rates = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
    with pytest.raises(ValueError, match=r"layer_types and compress_ratios say W+ and WWCH"):
        models.config_from_dict(FLASH | {"layer_types": kinds, "compress_rates": rates})
