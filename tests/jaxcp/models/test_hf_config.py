# SPDX-License-Identifier: Apache-2.0
"""The walk over config.json (test_config_fields.py) against the transformers that is installed."""

import dataclasses

import numpy as np
import pytest
from test_config_fields import CANNOT_RUN, WALK, fields_of, read
from tiny_checkpoints import FIXTURES, assert_same, random_model

import jaxcp

transformers = pytest.importorskip("transformers", reason="needs pip install jaxcp[hf]")
torch = pytest.importorskip("torch", reason="needs pip install jaxcp[hf]")
pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to mend


def class_of(name):
    return transformers.models.auto.CONFIG_MAPPING[fields_of(name)["model_type"]]


def logits(model, tokens):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens)).logits.numpy()


def from_folder(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


@pytest.mark.parametrize("name", WALK)
def test_no_field_of_the_class_is_passed_over(name):
    """A later transformers may have more: those must be refused until somebody looks at them."""
    config = class_of(name)
    names = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)
    for field in names - WALK[name].keys():
        for value in (0.123, "other", True, 7):
            found = read(fields_of(name) | {field: value})
            assert isinstance(found, Exception), f"transformers has a new field, {field}"


@pytest.mark.parametrize("name", WALK)
def test_harmless_fields_change_no_logits(name):
    """All at once; window fields of Qwen3-MoE do nothing only one without the other."""
    changed = {
        field: other
        for field, (other, _, ours, _) in WALK[name].items()
        if ours == "loads" and field not in CANNOT_RUN | {"use_sliding_window"}
    }
    tokens = np.random.default_rng(0).integers(0, fields_of(name)["vocab_size"], (1, 24))
    before = from_folder(FIXTURES / name)
    fields = {k: v for k, v in (fields_of(name) | changed).items() if k != "model_type"}
    config = class_of(name)(**fields)
    after = type(before)._from_config(config, attn_implementation="eager", dtype=torch.float32)
    after.load_state_dict(before.state_dict())
    np.testing.assert_array_equal(logits(before, tokens), logits(after, tokens))
    assert read(fields_of(name) | changed) == read(fields_of(name))


@pytest.mark.parametrize("name, tied", [("gpt2", False), ("qwen3-moe", True), ("gpt-oss", True)])
def test_heads_that_are_tied_or_not(name, tied, tmp_path):
    config = jaxcp.load_config(FIXTURES / f"{name}-tiny")
    model = random_model(dataclasses.replace(config, tie_embeddings=tied))
    jaxcp.save(model, tmp_path / "ours")
    theirs = from_folder(tmp_path / "ours")
    assert theirs.config.tie_word_embeddings is tied
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24))
    expected = logits(theirs, tokens)
    theirs.save_pretrained(tmp_path / "theirs")
    again, _ = jaxcp.load(tmp_path / "theirs")
    assert again.config == model.config
    assert_same(again, model)
    found = jaxcp.logits(again, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def test_rope_scaling_beside_rope_parameters():
    """As transformers has it where the theta is its default; another theta it forgets."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    fields = fields_of("qwen3-moe-tiny") | {"rope_scaling": yarn}
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0}
    theirs = class_of("qwen3-moe-tiny")(**{k: v for k, v in fields.items() if k != "model_type"})
    rope = read(fields).attention.rope
    frequencies, gain = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](theirs)
    np.testing.assert_allclose(rope.frequencies(16), frequencies.numpy(), rtol=1e-6)
    assert rope.yarn.gain == pytest.approx(gain)
