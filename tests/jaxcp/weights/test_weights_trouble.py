# SPDX-License-Identifier: Apache-2.0
"""Bad checkpoints say what is wrong with them, and no save destroys a good one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_checkpoints import FIXTURES, assert_same, flat, tensors, write

from jaxcp import weights
from jaxcp.weights import loading, saving

# Bad checkpoints


def test_everything_wrong_is_listed_at_once(tmp_path):
    contents = tensors("hy3-tiny")
    del contents["model.norm.weight"], contents["model.layers.2.mlp.experts.5.up_proj.weight"]
    contents["model.layers.1.self_attn.q_proj.weight"] = np.zeros((32, 64), np.float32)
    contents["lm_head.weight"] = contents["lm_head.weight"].T
    contents["model.layers.0.self_attn.rotary.inv_freq"] = np.zeros(8, np.float32)
    contents["model.embed_tokens.weight"] = np.zeros((256, 64), np.int8)
    with pytest.raises(ValueError) as caught:
        weights.load(write(tmp_path, "hy3-tiny", contents))
    message = str(caught.value)
    for expected in (
        "2 missing:",
        "model.norm.weight (64,)",
        "model.layers.2.mlp.experts.5.up_proj.weight (32, 64)",
        "1 left over:",
        "model.layers.0.self_attn.rotary.inv_freq (8,)",
        "2 of a wrong shape:",
        "model.layers.1.self_attn.q_proj.weight: expected (64, 64), got (32, 64)",
        "lm_head.weight: expected (256, 64), got (64, 256)",
        "1 not in F32, BF16, F16, MXFP4, int8",
        "model.embed_tokens.weight: I8",
    ):
        assert expected in message, message


def test_a_long_list_is_cut(tmp_path):
    with pytest.raises(ValueError, match=r"125 missing:") as caught:
        weights.load(write(tmp_path, "hy3-tiny", {"other": np.zeros(1, np.float32)}))
    assert str(caught.value).count("\n") < loading.LISTED + 10


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.2.mlp.experts.5.up_proj.weight"]
)
def test_nan_and_inf_are_found_by_name(name, tmp_path):
    contents = tensors("hy3-tiny")
    contents[name].flat[:2] = np.nan, np.inf
    contents["model.layers.1.mlp.expert_bias"][3] = -np.inf
    folder = write(tmp_path, "hy3-tiny", contents)
    with pytest.raises(ValueError) as caught:
        weights.load(folder)
    message = str(caught.value)
    assert "has 2 tensors with NaN or Inf" in message and "allow_nonfinite=True" in message
    assert f"{name} {contents[name].shape}: 2 of them, as float32" in message
    assert "model.layers.1.mlp.expert_bias (8,): 1 of them" in message
    model, _ = weights.load(folder, allow_nonfinite=True)
    assert sum(not np.isfinite(x).all() for x in flat(model).values()) == 2


def test_what_overflows_in_the_dtype_asked_for(tmp_path):
    contents = tensors("gpt2-tiny")
    contents["transformer.ln_f.weight"][0] = 1e5
    folder = write(tmp_path, "gpt2-tiny", contents)
    with pytest.raises(ValueError, match=r"ln_f\.weight \(64,\): 1 of them, as float16"):
        weights.load(folder, dtype="float16")
    weights.load(folder, dtype="bfloat16")


def test_no_config(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            FileNotFoundError, match=r"needed a checkpoint folder with config\.json"
        ):
            weights.load(folder)


@pytest.mark.parametrize("text", [b"", b'{"model_type": ', b"\xff\xfe", b"[1]"])
def test_config_that_is_no_json_object(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"needed (a )?JSON.*config\.json"):
        weights.load(tmp_path)


@pytest.mark.parametrize("fields", [{"model_type": "mamba"}, {}])
def test_unknown_model_type(fields, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"jaxcp knows \(gpt2, .*hy_v3, .*\); got"):
        weights.load_config(tmp_path)


def test_config_without_a_field(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="gpt2 config needs the field 'vocab_size'"):
        weights.load_config(tmp_path)


def test_not_a_config():
    with pytest.raises(
        ValueError,
        match=r"needed a model config \(GPTConfig, .*HybridMoEConfig, DenseConfig.*\); got dict",
    ):
        weights.abstract_model({})


def test_no_safetensors(tmp_path):
    shutil.copy(FIXTURES / "gpt2-tiny/config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"needed model\.safetensors or"):
        weights.load(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_truncated_safetensors(size, tmp_path):
    shutil.copy(FIXTURES / "gpt2-tiny/config.json", tmp_path)
    whole = (FIXTURES / "gpt2-tiny/model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r"needed a whole safetensors file.*truncated"):
        weights.load(tmp_path)


def test_shards_that_are_not_there(tmp_path):
    shutil.copy(FIXTURES / "gpt2-tiny/config.json", tmp_path)
    save_file({"b": np.zeros(1, np.float32)}, tmp_path / "b.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors", "c": "c"}})
    )
    with pytest.raises(
        FileNotFoundError, match=r"names 3 files; 2 are not there: a\.safetensors, c\."
    ):
        weights.load(tmp_path)
    for text in ("{}", '{"weight_map": {}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="needed a weight_map"):
            weights.load(tmp_path)


# Saving never destroys


def test_saving_again_replaces_the_weights_only(tmp_path):
    out = write(tmp_path / "out", "hy3-tiny", tensors("hy3-tiny"), _name_or_path="kept")
    (out / "notes.txt").write_text("kept")
    model, _ = weights.load(out)
    model.embed.set_value(model.embed.get_value() + 1)
    weights.save(model, out)
    again, _ = weights.load(out)
    assert_same(again, model)
    assert '"_name_or_path": "kept"' in (out / "config.json").read_text()
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "model.safetensors",
        "notes.txt",
    ]


def test_saving_several_files_over_one(tmp_path):
    out = write(tmp_path / "out", "gpt2-tiny", tensors("gpt2-tiny"))
    model, _ = weights.load(out)
    with pytest.raises(ValueError, match=r"without model\.safetensors for weights in \d+ files"):
        weights.save(model, out, shard_bytes=300_000)
    assert_same(weights.load(out)[0], model)


def test_saving_over_another_model(tmp_path):
    out = write(tmp_path / "out", "hy3-tiny", tensors("hy3-tiny"))
    gpt, _ = weights.load(FIXTURES / "gpt2-tiny")
    with pytest.raises(
        ValueError, match="needed a folder without a checkpoint of another configuration"
    ):
        weights.save(gpt, out)
    with pytest.raises(ValueError, match=r"config\.json is a file"):
        weights.save(gpt, out / "config.json")
    assert_same(weights.load(out)[0], weights.load(FIXTURES / "hy3-tiny")[0])


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    out = write(tmp_path / "out", "gpt2-tiny", tensors("gpt2-tiny"))
    model, _ = weights.load(out)

    def full(contents, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(saving, "save_file", full)
    for target in (out, tmp_path / "new"):
        with pytest.raises(OSError, match="no space left"):
            weights.save(model, target)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert_same(weights.load(out)[0], model)


KILLED = """
import os, signal, sys
from jaxcp import weights
from jaxcp.weights import saving
from flax import nnx
model, _ = weights.load(sys.argv[1])
def killed(contents, file, metadata):
    open(file, "wb").write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
saving.save_file = killed
weights.save(model, sys.argv[2])
"""


def test_a_save_that_is_killed_leaves_what_was_there(tmp_path):
    out = write(tmp_path / "out", "gpt2-tiny", tensors("gpt2-tiny"))
    before = (out / "model.safetensors").read_bytes()
    done = subprocess.run([sys.executable, "-c", KILLED, out, out], cwd=Path(__file__).parents[3])
    assert done.returncode < 0
    assert (out / "model.safetensors").read_bytes() == before
    model, _ = weights.load(out)
    weights.save(model, out)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(weights.load(out)[0], model)
