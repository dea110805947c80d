# SPDX-License-Identifier: Apache-2.0
"""The layer that drafts, of Qwen3-Next and Qwen3.5: its tensors, and what it computes.

transformers leaves it out. What it drafts is checked against float64 NumPy written from its
description alone, which starts from the states that transformers computes of the trunk.
"""

import functools
import json
import logging
import math

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from published import QWEN3_NEXT_80B, QWEN35_27B
from safetensors.numpy import load_file
from second_turns import assert_in_turns
from slow import slow_but
from tiny_checkpoints import FIXTURES, assert_same, tensors, write

import jaxcp
from jaxcp import Zigzag, models
from jaxcp.data.lookahead import following
from jaxcp.layers.stack import of_each_layer
from jaxcp.models.weight_table import sources

NEXT, QWEN35 = "qwen3-next-tiny", "qwen3-5-moe-tiny"
FIELD = {NEXT: "num_nextn_predict_layers", QWEN35: "mtp_num_hidden_layers"}
ALL = pytest.mark.parametrize("name", [NEXT, QWEN35])
CLOSE = {NEXT: {"atol": 2e-4, "rtol": 0}, QWEN35: {"atol": 4e-4, "rtol": 0}}
"""States of the trunk in transformers' float32 are off by up to 2.8e-4 (`test_hf_recurrent`)."""


def small(rng, *shape):
    return rng.normal(scale=shape[-1] ** -0.5, size=shape).astype(np.float32)


@functools.cache
def contents(name):
    """The fixture, its last layer once more with other numbers, and what joins it to the trunk.

    Qwen3.5's experts lie together, as its authors have them.
    """
    rng, before = np.random.default_rng(1), tensors(name)
    last = {k.split("layers.3.")[1]: v[::-1] for k, v in before.items() if ".layers.3." in k}
    if name == QWEN35:
        gate, up, down = (
            np.stack([last.pop(f"mlp.experts.{e}.{k}_proj.weight") for e in range(8)])
            for k in ("gate", "up", "down")
        )
        last |= {"mlp.experts.gate_up_proj": np.concatenate([gate, up], 1)}
        last |= {"mlp.experts.down_proj": down}
    norms = "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"
    mtp = {f"mtp.layers.0.{k}": v for k, v in last.items()}
    mtp |= {f"mtp.{k}.weight": small(rng, 64) for k in norms}
    return before | mtp | {"mtp.fc.weight": small(rng, 64, 128)}


def written(folder, name, **fields):
    return write(folder, name, contents(name), **fields)


@ALL
def test_round_trip_is_exact(name, tmp_path):
    """config.json says that there is a layer, or, as Qwen3-Next's, nothing."""
    fields = {FIELD[name]: 1} if name == QWEN35 else {}
    model, _ = jaxcp.load(written(tmp_path / "in", name, **fields))
    assert model.config.num_mtp_layers == 1
    jaxcp.save(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())[FIELD[name]] == 1
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == contents(name).keys()
    for k, v in contents(name).items():
        assert after[k].tobytes() == np.ascontiguousarray(v).tobytes(), k
    again, _ = jaxcp.load(tmp_path / "out")
    assert again.config == model.config
    assert_same(again, model)


@ALL
def test_config_json_and_tensors_that_differ(name, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        without, _ = jaxcp.load(written(tmp_path / "no", name, **{FIELD[name]: 0}))
        assert f"left out {len(contents(name)) - len(tensors(name))} tensors" in caplog.text
        none = write(tmp_path / "none", name, tensors(name), **{FIELD[name]: 1})
        assert jaxcp.load(none)[0].config == without.config
        assert "the checkpoint has none" in caplog.text
    assert without.config.num_mtp_layers == 0
    with pytest.raises(ValueError, match="needs a model with an MTP layer"):
        without.draft(None, None, None, None)
    some = {k: v for k, v in contents(name).items() if "mtp.layers.0.self_attn" not in k}
    with pytest.raises(ValueError, match=r"mtp\.layers\.0\.self_attn\.q_proj\.weight"):
        jaxcp.load(write(tmp_path / "some", name, some))
    fields = json.loads((FIXTURES / name / "config.json").read_text())
    for more, message in (
        ({FIELD[name]: 2}, "num_mtp_layers must be 0 or 1"),
        ({"mtp_use_dedicated_embeddings": True}, "mtp_use_dedicated_embeddings"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            models.config_from_dict(fields | more)


def counted(published, **fields):
    """`{tensor: shape}` of a published model, and its parameters."""
    config = models.config_from_dict(published | fields)
    leaves = of_each_layer(jaxcp.abstract_model(config))
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    found = sources(models.family_of(config).table(config), shapes).values()
    names = {name: source.shape for source in found for name in source.names}
    return names, sum(math.prod(shape) for shape in shapes.values())


def test_published_sizes():
    """The hub counts 81,324,862,720 parameters of Qwen3-Next-80B-A3B, this layer included."""
    names, count = counted(QWEN3_NEXT_80B, num_nextn_predict_layers=1)
    assert count == 81_324_862_720
    assert sum(math.prod(s) for k, s in names.items() if k.startswith("mtp.")) == 1_650_471_424


def test_published_tensors():
    """Shapes of Qwen3.5-27B and 3.6-27B, as programs that read the published files list them."""
    names, _ = counted(QWEN35_27B)
    assert {k: s for k, s in names.items() if k.startswith("mtp.")} == {
        "mtp.fc.weight": (5120, 10240),
        "mtp.layers.0.input_layernorm.weight": (5120,),
        "mtp.layers.0.mlp.down_proj.weight": (5120, 17408),
        "mtp.layers.0.mlp.gate_proj.weight": (17408, 5120),
        "mtp.layers.0.mlp.up_proj.weight": (17408, 5120),
        "mtp.layers.0.post_attention_layernorm.weight": (5120,),
        "mtp.layers.0.self_attn.k_norm.weight": (256,),
        "mtp.layers.0.self_attn.k_proj.weight": (1024, 5120),
        "mtp.layers.0.self_attn.o_proj.weight": (5120, 6144),
        "mtp.layers.0.self_attn.q_norm.weight": (256,),
        "mtp.layers.0.self_attn.q_proj.weight": (12288, 5120),
        "mtp.layers.0.self_attn.v_proj.weight": (1024, 5120),
        "mtp.norm.weight": (5120,),
        "mtp.pre_fc_norm_embedding.weight": (5120,),
        "mtp.pre_fc_norm_hidden.weight": (5120,),
    }


def rms(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * (1 + weight)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def swiglu(x, gate, up, down):
    g = x @ gate.T
    return (g * sigmoid(g) * (x @ up.T)) @ down.T


def turned(x, theta):
    """Half of the 16 channels of `x [B, T, N, 16]` turn by position, channel i with i + 4."""
    angle = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(4) / 4)
    turn = np.exp(1j * angle)[None, :, None]
    both = (x[..., :4] + 1j * x[..., 4:8]) * turn
    return np.concatenate([both.real, both.imag, x[..., 8:]], -1)


def attention(w, x, theta):
    """Four heads, whose query is followed by its gate, of two of keys and values."""
    b, t, _ = x.shape
    q = (x @ w["self_attn.q_proj.weight"].T).reshape(b, t, 4, 32)
    k = (x @ w["self_attn.k_proj.weight"].T).reshape(b, t, 2, 16)
    v = (x @ w["self_attn.v_proj.weight"].T).reshape(b, t, 2, 16)
    gate = q[..., 16:].reshape(b, t, 64)
    q = turned(rms(q[..., :16], w["self_attn.q_norm.weight"]), theta)
    k = turned(rms(k, w["self_attn.k_norm.weight"]), theta)
    k, v = (np.repeat(each, 2, axis=2) for each in (k, v))
    scores = np.where(np.tri(t, dtype=bool), np.einsum("bthc,bshc->bhts", q, k) / 4, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    out = np.einsum("bhts,bshc->bthc", p / p.sum(-1, keepdims=True), v).reshape(b, t, 64)
    return (out * sigmoid(gate)) @ w["self_attn.o_proj.weight"].T


def experts(w, x):
    """Two of eight by softmax, whose weights sum to one; and one that all go through, gated."""
    logits = x @ w["mlp.gate.weight"].T
    chosen = np.argsort(-logits, -1)[..., :2]
    p = np.exp(np.take_along_axis(logits, chosen, -1))
    p = p / p.sum(-1, keepdims=True)
    if "mlp.experts.gate_up_proj" in w:
        both, down = w["mlp.experts.gate_up_proj"], w["mlp.experts.down_proj"]
        each = [(both[e, :32], both[e, 32:], down[e]) for e in range(8)]
    else:
        parts = "gate", "up", "down"
        each = [[w[f"mlp.experts.{e}.{k}_proj.weight"] for k in parts] for e in range(8)]
    shared = [w[f"mlp.shared_expert.{k}_proj.weight"] for k in ("gate", "up", "down")]
    y = sigmoid(x @ w["mlp.shared_expert_gate.weight"].T) * swiglu(x, *shared)
    for e, matrices in enumerate(each):
        y = y + ((chosen == e) * p).sum(-1, keepdims=True) * swiglu(x, *matrices)
    return y


def expected(name):
    """Logits of the token after next and of the one after that, `[2, 37, 256]` each."""
    reference = np.load(FIXTURES / name / "reference.npz")
    w = {k: v.astype(np.float64) for k, v in contents(name).items()}
    of_block = {k.removeprefix("mtp.layers.0."): v for k, v in w.items()}
    theta = 1e7 if name == QWEN35 else 1e6
    state, found = reference["hidden_04"].astype(np.float64), []
    after = following(reference["input_ids"], 2)
    for depth in range(2):
        e = rms(w["model.embed_tokens.weight"][after[..., depth]],
                w["mtp.pre_fc_norm_embedding.weight"])  # fmt: skip
        h = rms(state, w["mtp.pre_fc_norm_hidden.weight"])
        x = np.concatenate([e, h], -1) @ w["mtp.fc.weight"].T
        x = x + attention(of_block, rms(x, of_block["input_layernorm.weight"]), theta)
        y = rms(x, of_block["post_attention_layernorm.weight"])
        x = x + experts(of_block, y)
        state = rms(x, w["mtp.norm.weight"])
        found.append(state @ w["lm_head.weight"].T)
    return found


def laid_out(name):
    tokens = np.load(FIXTURES / name / "reference.npz")["input_ids"].astype(np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return {"tokens": tokens, "positions": positions, "after": following(tokens, 2)}


@functools.partial(jax.jit, static_argnums=2)
def drafts(model, b, length):
    return model.mtp_logits(b["tokens"], b["after"], b["positions"], length=length)


ON_MESHES = [
    (NEXT, {}),
    (NEXT, {"seq": 2, "model": 2}),
    (NEXT, {"seq": 3}),
    (NEXT, {"data": 2, "seq": 2}),
    (QWEN35, {}),
    (QWEN35, {"seq": 3, "expert": 2}),
]


@pytest.mark.parametrize(("name", "axes"), slow_but(ON_MESHES, lambda case: case == ON_MESHES[0]))
def test_drafts_are_those_of_the_equations(name, axes, mesh_of, tmp_path):
    """Drafts the token after next, and with the state of that draft the one after."""
    folder, batch = written(tmp_path, name), laid_out(name)
    length, shards = batch["tokens"].shape[1], axes.get("seq", 1)
    if axes:
        mesh_of(**axes)
        batch = Zigzag().permute(batch, shards)
        batch = {k: jax.device_put(v, P("data", "seq")) for k, v in batch.items()}
    found = drafts(jaxcp.load(folder)[0], batch, length)
    for one, wanted in zip(found, expected(name), strict=True):
        one = Zigzag().inverse(one, shards, length) if axes else one
        np.testing.assert_allclose(one, wanted, **CLOSE[name])


def test_a_draft_in_a_second_turn_is_that_of_the_whole_sequence(tmp_path):
    model, _ = jaxcp.load(written(tmp_path, NEXT))
    assert_in_turns(model, laid_out(NEXT), expected(NEXT)[0], **CLOSE[NEXT])
