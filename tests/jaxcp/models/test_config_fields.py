# SPDX-License-Identifier: Apache-2.0
"""Every field of every family's config.json is read, harmless, or refused by name.

fixtures/config_fields.json walks the configuration classes of transformers: for each field another
valid value, what transformers' logits make of it on the tiny checkpoint ("same", "differ", "fails":
the tensors no longer fit, or it cannot run), what jaxcp does ("loads", "changes" its config object,
"refuses"), and the default of the class. tests/jaxcp/models/test_hf_config.py holds it against the
installed transformers.
"""

import json

import pytest
from tiny_checkpoints import FIXTURES

from jaxcp import models

WALK = json.loads((FIXTURES / "config_fields.json").read_text())["fields"]
CANNOT_RUN = {"return_dict"}  # asked for a tuple, transformers' own heads fail
OR_NULL = {
    "partial_rotary_factor", "rope_theta", "attention_value_scale", "routed_scaling_factor",
}  # fmt: skip


def fields_of(name):
    return json.loads((FIXTURES / name / "config.json").read_text())


def read(fields):
    """The config object, or the refusal."""
    try:
        return models.config_from_dict(fields)
    except (NotImplementedError, ValueError) as error:
        return error


@pytest.mark.parametrize("name", WALK)
def test_another_value_of_a_field(name):
    base = fields_of(name)
    before = models.config_from_dict(base)
    for field, (other, theirs, ours, _) in WALK[name].items():
        found = read(base | {field: other})
        if isinstance(found, Exception):
            outcome = "refuses"
        else:
            outcome = "loads" if found == before else "changes"
        assert outcome == ours, (field, other, found)
        assert outcome != "loads" or theirs == "same" or field in CANNOT_RUN, field


@pytest.mark.parametrize("name", WALK)
def test_a_field_that_is_not_there_is_its_default_or_an_error(name):
    base = fields_of(name)
    base.pop("expert_hidden_dim", None)  # another name of moe_intermediate_size
    # what the tensors say, layers that draft, what limits nothing (GPT-2's is not optional), and
    # what latent attention has by its other fields
    others = {"dtype", "num_nextn_predict_layers", "max_position_embeddings"}
    others |= {"num_key_value_heads", "head_dim"} if "kv_lora_rank" in base else set()
    for field, (*_, default) in WALK[name].items():
        if field in base.keys() - others:
            found = read({k: v for k, v in base.items() if k != field})
            if not isinstance(found, Exception) and default is not None:
                assert found == read(base | {field: default}), field


@pytest.mark.parametrize("name", WALK)
def test_an_unknown_field_is_refused_by_name(name):
    for extra in ({"other_scale": 0.5}, {"final_logit_softcapping": 30.0}):
        with pytest.raises(NotImplementedError, match=rf"not known.*{next(iter(extra))}"):
            models.config_from_dict(fields_of(name) | extra)
    quantized = {"quantization_config": {"quant_method": "hqq"}}
    with pytest.raises(NotImplementedError, match=r"quant_method of jaxcp, fp8.*got hqq"):
        models.config_from_dict(fields_of(name) | quantized)
    harmless = {"final_logit_softcapping": None, "eod_token_id": 3, "temperature": 0.5}
    assert read(fields_of(name) | harmless) == read(fields_of(name))


@pytest.mark.parametrize("name", WALK)
def test_values_of_another_type(name):
    """A number in quotes, a fraction of a layer, nothing, NaN: named, and never computed with."""
    base = fields_of(name)
    for field, value in base.items():
        wrongs = []
        if type(value) is int and not field.endswith("_token_id"):
            wrongs = [str(value), value + 0.5, -value - 1, [value]]
        elif type(value) is float and field not in ("initializer_range", "router_aux_loss_coef"):
            wrongs = [str(value), None, float("nan"), float("inf"), True]
        if read(base | {field: "x"}) == read(base):
            continue  # harmless whatever it says
        for wrong in wrongs:
            if wrong is not None or field not in OR_NULL:
                found = read(base | {field: wrong})
                named = field.replace("num_local_experts", "experts")  # or its other name
                assert isinstance(found, Exception) and named in str(found), (field, wrong, found)


@pytest.mark.parametrize(
    "name, alias, other",
    [
        ("gpt2-tiny", "hidden_size", "n_embd"),
        ("gpt2-tiny", "n_ctx", "n_positions"),
        ("hy3-tiny", "num_local_experts", "num_experts"),
        ("gpt-oss-tiny", "experts_per_token", "num_experts_per_tok"),
        ("deepseek-v3-tiny", "num_local_experts", "n_routed_experts"),
        ("deepseek-v4-tiny", "intermediate_size", "moe_intermediate_size"),
        ("glm4-moe-tiny", "num_local_experts", "n_routed_experts"),
        ("minimax-m2-tiny", "num_experts", "num_local_experts"),
        ("mimo-v2-flash-tiny", "num_local_experts", "n_routed_experts"),
    ],
)
def test_two_names_of_one_thing(name, alias, other):
    base = fields_of(name)
    assert read(base | {alias: base[other]}) == read(base)
    with pytest.raises(ValueError, match=alias):
        models.config_from_dict(base | {alias: base[other] + 1})


def test_a_config_older_than_model_type():
    """distilgpt2 of 2019, as the hub had it."""
    fields = {
        "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "embd_pdrop": 0.1,
        "finetuning_task": None, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
        "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 6, "n_positions": 1024,
        "num_labels": 1, "output_attentions": False, "output_hidden_states": False,
        "pruned_heads": {}, "resid_pdrop": 0.1, "summary_activation": None,
        "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
        "summary_use_proj": True, "torchscript": False, "use_bfloat16": False, "vocab_size": 50257,
    }  # fmt: skip
    config = models.config_from_dict(fields)
    assert (config.num_layers, config.max_positions, config.dtype) == (6, 1024, "float32")
    for names in (None, [], ["Other"], ["GPT2LMHeadModel", "GptOssForCausalLM"], "GPT2LMHeadModel"):
        with pytest.raises(ValueError, match=r"needed a model_type.*got None"):
            models.config_from_dict(fields | {"architectures": names})
    with pytest.raises(NotImplementedError, match="pruned_heads"):
        models.config_from_dict(fields | {"pruned_heads": {"0": [1]}})
    for name in WALK:
        base = fields_of(name)
        assert read({k: v for k, v in base.items() if k != "model_type"}) == read(base)


def test_kimi_k2_is_deepseek_v3():
    v3 = fields_of("deepseek-v3-tiny")
    assert read(v3 | {"model_type": "kimi_k2"}) == read(v3)
    with pytest.raises(NotImplementedError, match=r"kimi_k2: not known.*index_topk"):
        models.config_from_dict(v3 | {"model_type": "kimi_k2", "index_topk": 4})


@pytest.mark.parametrize(
    "groups",
    [
        {"n_group": 3, "topk_group": 1},  # does not divide 8 experts
        {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 5},  # a group holds 4
        {"n_group": 8, "topk_group": 8},  # a group's score is the sum of two
        {"n_group": 2, "topk_group": 3},
    ],
)
@pytest.mark.parametrize("name", ["deepseek-v3-tiny", "deepseek-v32-tiny"])
def test_groups_that_cannot_work(name, groups):
    with pytest.raises(ValueError, match="groups"):
        models.config_from_dict(fields_of(name) | groups)


def test_harmless_spellings():
    full = ["full_attention"]
    for name, spelling in (
        ("qwen3-moe-tiny", {"layer_types": full * 3, "hidden_act": "swish", "qkv_bias": False}),
        ("qwen3-moe-tiny", {"use_sliding_window": True, "sliding_window": None}),
        ("hy3-tiny", {"layer_types": ["attention"] * 4, "sliding_window": None, "n_group": 1}),
        ("deepseek-v3-tiny", {"layer_types": full * 3, "num_key_value_heads": None}),
        ("deepseek-v32-tiny", {"layer_types": ["deepseek_sparse_attention"] * 3}),
        ("gpt2-tiny", {"is_decoder": True, "add_cross_attention": False, "n_inner": 256}),
        ("gpt-oss-tiny", {"rope_scaling": None, "partial_rotary_factor": None}),
    ):
        assert models.config_from_dict(fields_of(name) | spelling) == read(fields_of(name))
    windowed = {"use_sliding_window": True, "sliding_window": 5}
    base = fields_of("qwen3-moe-tiny") | windowed
    assert read(base | {"layer_types": ["sliding_attention"] * 3}) == read(base)
    with pytest.raises(NotImplementedError, match="layer_types"):
        models.config_from_dict(base | {"layer_types": full * 3})
