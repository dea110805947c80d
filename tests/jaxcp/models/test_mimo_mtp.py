# SPDX-License-Identifier: Apache-2.0
"""The first layer of MiMo-V2-Flash that drafts: its tensors, and what it computes.

transformers leaves it out. What it drafts is checked against float64 NumPy written from its
description alone, which starts from the states that transformers computes of the trunk.
"""

import dataclasses
import functools
import json
import logging
import math

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from published import MIMO_V2_FLASH
from safetensors.numpy import load_file
from second_turns import assert_in_turns
from slow import slow_but
from tiny_checkpoints import FIXTURES, assert_same, tensors, write

import jaxcp
from jaxcp import Zigzag, models
from jaxcp.data.lookahead import following
from jaxcp.layers.stack import of_each_layer
from jaxcp.models.hybrid_moe import hf

NAME, FIRST = "mimo-v2-flash-tiny", "model.mtp.layers.0."
FIELD = "num_nextn_predict_layers"
CLOSE = {"atol": 1e-4, "rtol": 0}


@functools.cache
def contents():
    """The fixture, a layer with a window and one with an MLP once more with other numbers, and what
    joins them to the trunk; and a second layer, which drafts the token after."""
    rng, before = np.random.default_rng(1), tensors(NAME)
    window = {k.split("layers.1.")[1]: v for k, v in before.items() if "layers.1." in k}
    mlp = {k.split("layers.0.")[1]: v for k, v in before.items() if "layers.0.mlp." in k}
    window = {k: v for k, v in window.items() if not k.startswith("mlp.")}
    window["pre_mlp_layernorm.weight"] = window.pop("post_attention_layernorm.weight")
    layer = {k: v[::-1].copy() for k, v in (window | mlp).items()}
    for norm in ("enorm", "hnorm", "final_layernorm"):
        layer[f"{norm}.weight"] = (1 + rng.normal(scale=0.3, size=64)).astype(np.float32)
    layer["eh_proj.weight"] = rng.normal(scale=128**-0.5, size=(64, 128)).astype(np.float32)
    first = {f"{FIRST}{k}": v for k, v in layer.items()}
    return before | first, {k.replace("layers.0.", "layers.1."): -v for k, v in first.items()}


def test_the_first_is_read_and_saved(tmp_path, caplog):
    """config.json says nothing, as the published one."""
    both, second = contents()
    with caplog.at_level(logging.INFO):
        model, _ = jaxcp.load(write(tmp_path / "in", NAME, both | second))
    assert f"left out {len(second)} tensors, such as model.mtp.layers.1." in caplog.text
    assert (model.config.num_mtp_layers, model.config.mtp_kind) == (1, "L")
    assert hf.model_type(model.config) == "mimo_v2_flash"
    jaxcp.save(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())[FIELD] == 1
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == both.keys()
    assert all(after[k].tobytes() == np.ascontiguousarray(v).tobytes() for k, v in both.items())
    again, _ = jaxcp.load(tmp_path / "out")
    assert again.config == model.config
    assert_same(again, model)


def test_config_json_and_tensors_that_differ(tmp_path, caplog):
    both, second = contents()
    with caplog.at_level(logging.INFO):
        without, _ = jaxcp.load(write(tmp_path / "no", NAME, both | second, **{FIELD: 0}))
        assert f"left out {2 * len(second)} tensors" in caplog.text
        none, _ = jaxcp.load(write(tmp_path / "none", NAME, tensors(NAME), **{FIELD: 3}))
        assert "the checkpoint has none" in caplog.text
    assert none.config == without.config and without.config.num_mtp_layers == 0
    plain = jaxcp.load_config(FIXTURES / NAME)
    assert plain.num_mtp_layers is None
    assert dataclasses.replace(plain, num_mtp_layers=0) == without.config
    some = {k: v for k, v in both.items() if f"{FIRST}self_attn" not in k}
    with pytest.raises(ValueError, match=r"model\.mtp\.layers\.0\.self_attn\.q_proj\.weight"):
        jaxcp.load(write(tmp_path / "some", NAME, some))


def test_a_layer_of_this_kind_in_a_mixture_is_said():
    """No other format has it, and MiMo's has none that is as the last layer."""
    config = jaxcp.load_config(FIXTURES / NAME)
    for changes in ({"mtp_kind": "G"}, {"mtp_kind": "L", "first_dense_layers": 0, "window": 5}):
        mixed = dataclasses.replace(config, num_mtp_layers=1, **changes)
        said = json.loads(json.dumps(models.config_to_dict(mixed)))
        assert models.config_from_dict(said) == mixed
        ours = changes["mtp_kind"] == "G"
        assert said["model_type"] == ("jaxcp_hybrid_moe" if ours else "mimo_v2_flash")
    with pytest.raises(ValueError, match="mtp_kind must be G or L; got 'N'"):
        dataclasses.replace(config, mtp_kind="N")


def test_published_size():
    """Its authors count 0.33 B parameters of a layer that drafts."""
    config = models.config_from_dict(MIMO_V2_FLASH | {FIELD: 1})
    leaves = of_each_layer(jaxcp.abstract_model(config))
    sizes = [math.prod(x.shape) for name, x in leaves.items() if name.startswith("mtp.")]
    assert round(sum(sizes) / 1e9, 2) == 0.33


def rms(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def turned(x):
    """Half of the 16 channels of `x [B, T, N, 16]` turn by position, channel i with i + 4."""
    angle = np.arange(x.shape[1])[:, None] * 10_000.0 ** (-np.arange(4) / 4)
    both = (x[..., :4] + 1j * x[..., 4:8]) * np.exp(1j * angle)[None, :, None]
    return np.concatenate([both.real, both.imag, x[..., 8:]], -1)


def attention(w, x):
    """Four heads with keys and values of their own, a window of 9 and a sink each."""
    b, t, _ = x.shape
    q, k, v = (x @ w[f"self_attn.{name}_proj.weight"].T for name in "qkv")
    q, k, v = turned(q.reshape(b, t, 4, 16)), turned(k.reshape(b, t, 4, 16)), 0.707 * v
    far = np.arange(t)[:, None] - np.arange(t)
    scores = np.exp(np.einsum("bthc,bshc->bhts", q, k) / 4) * ((far >= 0) & (far < 9))
    sinks = np.exp(w["self_attn.attention_sink_bias"])[:, None, None]
    p = scores / (scores.sum(-1, keepdims=True) + sinks)
    out = np.einsum("bhts,bshc->bthc", p, v.reshape(b, t, 4, 12)).reshape(b, t, 48)
    return out @ w["self_attn.o_proj.weight"].T


@functools.cache
def expected():
    """Logits of the token after next and of the one after that, `[2, 37, 256]` each."""
    reference = np.load(FIXTURES / NAME / "reference.npz")
    whole = {k: v.astype(np.float64) for k, v in contents()[0].items()}
    w = {k.removeprefix(FIRST): v for k, v in whole.items() if k.startswith(FIRST)}
    state, found = reference["hidden_04"].astype(np.float64), []
    after = following(reference["input_ids"], 2)
    for depth in range(2):
        embedded = whole["model.embed_tokens.weight"][after[..., depth]]
        parts = rms(embedded, w["enorm.weight"]), rms(state, w["hnorm.weight"])
        x = np.concatenate(parts, -1) @ w["eh_proj.weight"].T
        x = x + attention(w, rms(x, w["input_layernorm.weight"]))
        y = rms(x, w["pre_mlp_layernorm.weight"])
        gate = y @ w["mlp.gate_proj.weight"].T
        y = gate / (1 + np.exp(-gate)) * (y @ w["mlp.up_proj.weight"].T)
        state = rms(x + y @ w["mlp.down_proj.weight"].T, w["final_layernorm.weight"])
        found.append(state @ whole["lm_head.weight"].T)
    return found


def laid_out():
    tokens = np.load(FIXTURES / NAME / "reference.npz")["input_ids"].astype(np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return {"tokens": tokens, "positions": positions, "after": following(tokens, 2)}


@pytest.mark.parametrize(
    "axes",
    slow_but([{}, {"seq": 2, "model": 2}, {"seq": 3}, {"data": 2, "expert": 2}], lambda x: x == {}),
)
def test_drafts_are_those_of_the_equations(axes, mesh_of, tmp_path):
    """Drafts the token after next, and with the state of that draft the one after."""
    folder, batch = write(tmp_path, NAME, contents()[0]), laid_out()
    shards = axes.get("seq", 1)
    if axes:
        mesh_of(**axes)
        batch = Zigzag().permute(batch, shards)
        batch = {k: jax.device_put(v, P("data", "seq")) for k, v in batch.items()}
    run = jax.jit(lambda m, b: m.mtp_logits(b["tokens"], b["after"], b["positions"]))
    found = run(jaxcp.load(folder)[0], batch)
    for one, wanted in zip(found, expected(), strict=True):
        one = Zigzag().inverse(one, shards, 37) if axes else one
        np.testing.assert_allclose(one, wanted, **CLOSE)


def test_a_draft_in_a_second_turn_is_that_of_the_whole_sequence(tmp_path):
    model, _ = jaxcp.load(write(tmp_path, NAME, contents()[0]))
    assert_in_turns(model, laid_out(), expected()[0], **CLOSE)
