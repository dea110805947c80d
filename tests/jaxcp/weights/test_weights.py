# SPDX-License-Identifier: Apache-2.0
"""Checkpoints load as transformers computes them, under every name, and save as they were."""

import itertools
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import FIXTURES, assert_same, flat, random_model, tensors, write

from jaxcp import models, weights
from jaxcp.layers.parameter import RouterBias
from jaxcp.layers.stack import members
from jaxcp.models.gpt.model import GPTConfig
from jaxcp.models.hybrid_moe.config import ExpertsConfig, HybridMoEConfig
from jaxcp.models.weight_table import Row, sources
from jaxcp.sharding import sharding_of
from jaxcp.text.tokenizer import byte_level
from jaxcp.weights.files import open_checkpoint

BOTH = pytest.mark.parametrize("name", ["hy3-tiny", "gpt2-tiny"])
OTHERS = "hy3-tiny", "gpt2-tiny", "qwen3-moe-tiny", "gpt-oss-tiny"
LATER = "llama-tiny", "mistral-tiny", "qwen2-tiny", "qwen3-tiny", "glm4-moe-tiny"
LATER += "minimax-m2-tiny", "mimo-v2-flash-tiny"
DTYPES = "float32", "bfloat16", "float16"


def inputs(name):
    reference = np.load(FIXTURES / name / "reference.npz")
    tokens = jnp.asarray(reference["input_ids"], jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return reference, tokens, positions


def same_tensors(folder, expected):
    """The checkpoint has these, bit for bit, and no others."""
    checkpoint = open_checkpoint(folder)
    assert checkpoint.shapes.keys() == expected.keys()
    for name, tensor in expected.items():
        found = checkpoint.read(name)
        assert found.dtype == tensor.dtype and found.tobytes() == tensor.tobytes(), name


# What is loaded is the model


def test_logits_are_those_of_transformers():
    """Those of the others: test_hybrid_moe.py."""
    model, tokenizer = weights.load(FIXTURES / "gpt2-tiny")
    reference, tokens, positions = inputs("gpt2-tiny")
    logits = jax.jit(lambda model: model(tokens, positions))(model)
    np.testing.assert_allclose(logits, reference["logits"], atol=1e-4, rtol=0)
    assert tokenizer is None


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*itertools.product(OTHERS, DTYPES), *((name, "bfloat16") for name in LATER)],
)
def test_round_trip_is_exact(name, dtype, tmp_path):
    before = {
        k: v if k.endswith(("expert_bias", "correction_bias")) else v.astype(jnp.dtype(dtype))
        for k, v in tensors(name).items()
    }
    model, _ = weights.load(write(tmp_path / "in", name, before, dtype=dtype))
    assert model.config.dtype == dtype
    weights.save(model, tmp_path / "out", byte_level())
    same_tensors(tmp_path / "out", before)
    again, tokenizer = weights.load(tmp_path / "out")
    assert again.config == model.config
    assert_same(again, model)
    assert tokenizer.decode(tokenizer.encode("ü")) == "ü"


@BOTH
def test_dtype_is_that_of_parameters_and_computation(name):
    model, _ = weights.load(FIXTURES / name, dtype=jnp.bfloat16)
    assert model.config.dtype == "bfloat16"
    for keys, leaf in nnx.to_flat_state(nnx.state(model)):
        expected = jnp.float32 if isinstance(leaf, RouterBias) else jnp.bfloat16
        assert leaf.get_value().dtype == expected, keys


@BOTH
def test_shards_are_one_checkpoint(name, tmp_path):
    names = sorted(everything := tensors(name))
    files = {f"model-{i + 1:05d}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, held in files.items():
        save_file({k: everything[k] for k in held}, tmp_path / file)
    weight_map = {k: file for file, held in files.items() for k in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(FIXTURES / name / "config.json", tmp_path)
    model, _ = weights.load(tmp_path)
    assert_same(model, weights.load(FIXTURES / name)[0])
    weights.save(model, tmp_path / "again", shard_bytes=300_000)
    same_tensors(tmp_path / "again", everything)
    shards = sorted(p.name for p in (tmp_path / "again").glob("*.safetensors"))
    assert len(shards) >= 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "again/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in everything.values())
    assert set(index["weight_map"].values()) == set(shards)
    with pytest.raises(ValueError, match="needed a folder without a sharded checkpoint"):
        weights.save(weights.load(FIXTURES / name)[0], tmp_path)


@BOTH
def test_leaves_lie_on_the_mesh_as_the_model_says(name, mesh_of, tmp_path):
    whole, _ = weights.load(FIXTURES / name)
    mesh_of(seq=4, model=2)
    model, _ = weights.load(FIXTURES / name)
    spread = 0
    for keys, leaf in nnx.to_flat_state(nnx.state(model)):
        value = leaf.get_value()
        assert value.sharding.spec == sharding_of(leaf), keys
        assert len(value.sharding.device_set) == 8
        spread += len(members(".".join(map(str, keys)))) * (not value.is_fully_replicated)
    assert spread >= 4 * model.config.num_layers
    assert_same(model, whole)
    weights.save(model, tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors").keys() == tensors(name).keys()
    assert_same(weights.load(tmp_path / "out")[0], whole)


def test_a_mesh_that_does_not_divide_the_heads(mesh_of):
    mesh_of(model=8)
    with pytest.raises(
        ValueError, match=r"needed a mesh that divides layers\.0\.attention\.k \(64, 2, 16\)"
    ):
        weights.load(FIXTURES / "hy3-tiny")


# Names


def rename(contents, *pairs):
    for old, new in pairs:
        contents = {k.replace(old, new): v for k, v in contents.items()}
    return contents


def fused(contents, layers=(1, 2, 3)):
    """The experts of every layer in two tensors, as transformers holds them in memory."""
    kept = {k: v for k, v in contents.items() if ".experts." not in k}
    for i in layers:
        prefix = f"model.layers.{i}.mlp.experts"
        gate, up, down = (
            np.stack([contents[f"{prefix}.{e}.{kind}_proj.weight"] for e in range(8)])
            for kind in ("gate", "up", "down")
        )
        kept |= {
            f"{prefix}.gate_up_proj": np.concatenate([gate, up], 1),
            f"{prefix}.down_proj": down,
        }
    return kept


@pytest.mark.parametrize(
    "alias",
    [
        lambda t: rename(t, ("router.gate.", "gate.")),
        lambda t: rename(t, ("router.gate.", "gate.wg.")),
        lambda t: rename(
            t, ("expert_bias", "e_score_correction_bias"), ("shared_mlp", "shared_experts")
        ),
        fused,
    ],
)
def test_aliases_of_hy3(alias, tmp_path):
    renamed = alias(tensors("hy3-tiny"))
    assert renamed.keys() != tensors("hy3-tiny").keys()
    model, _ = weights.load(write(tmp_path / "in", "hy3-tiny", renamed))
    assert_same(model, weights.load(FIXTURES / "hy3-tiny")[0])
    weights.save(model, tmp_path / "out")
    same_tensors(tmp_path / "out", renamed)


def test_qwen3_as_transformers_holds_it(tmp_path):
    renamed = fused(tensors("qwen3-moe-tiny"), (0, 1, 2))
    model, _ = weights.load(write(tmp_path / "in", "qwen3-moe-tiny", renamed))
    assert_same(model, weights.load(FIXTURES / "qwen3-moe-tiny")[0])
    weights.save(model, tmp_path / "out")
    same_tensors(tmp_path / "out", renamed)


def test_gpt2_as_openai_named_it(tmp_path):
    contents = rename(tensors("gpt2-tiny"), ("transformer.", ""))
    bare = contents
    contents = contents | {
        f"h.{i}.attn.bias": np.ones((1, 1, 64, 64), np.float32) for i in range(3)
    }
    contents |= {
        "h.0.attn.masked_bias": np.float32([-1e4]),
        "lm_head.weight": contents["wte.weight"],
    }
    model, _ = weights.load(write(tmp_path, "gpt2-tiny", contents))
    assert_same(model, weights.load(FIXTURES / "gpt2-tiny")[0])
    weights.save(model, tmp_path / "out")
    same_tensors(tmp_path / "out", bare)
    contents["lm_head.weight"] = contents["wte.weight"] + 1
    with pytest.raises(ValueError, match=r"lm_head\.weight \(is not wte\.weight\)"):
        weights.load(write(tmp_path, "gpt2-tiny", contents))


def test_draft_layer_is_left_out_knowingly(tmp_path, caplog):
    contents = tensors("hy3-tiny")
    draft = {k.replace(".3.", ".4."): v for k, v in contents.items() if ".layers.3." in k}
    draft |= {"model.layers.4.eh_proj.weight": np.ones((64, 128), np.float32)}
    with caplog.at_level(logging.INFO, "jaxcp.weights"):
        model, _ = weights.load(
            write(tmp_path, "hy3-tiny", contents | draft, num_nextn_predict_layers=0)
        )
    assert_same(model, weights.load(FIXTURES / "hy3-tiny")[0])
    assert f"left out {len(draft)} tensors" in caplog.text and "model.layers.4" in caplog.text


def test_the_draft_layer_is_kept_where_the_config_speaks_of_it(tmp_path):
    both = tensors("hy3-tiny") | load_file(FIXTURES / "hy3-tiny/model_mtp.safetensors")
    model, _ = weights.load(write(tmp_path / "in", "hy3-tiny", both))
    assert model.config.num_mtp_layers == 1
    weights.save(model, tmp_path / "out")
    same_tensors(tmp_path / "out", both)
    # transformers saves a checkpoint without it, and a config.json that still says 1
    without, _ = weights.load(FIXTURES / "hy3-tiny")
    assert without.config.num_mtp_layers == 0
    weights.save(without, write(tmp_path / "there", "hy3-tiny", tensors("hy3-tiny")))
    with pytest.raises(ValueError, match="without a checkpoint of another configuration"):
        weights.save(model, tmp_path / "there")


def test_a_layer_too_many_is_no_draft_layer(tmp_path):
    kinds = {"num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"]}
    for draft_layers, message in ((0, "left over"), (1, "missing")):
        kinds["num_nextn_predict_layers"] = draft_layers
        with pytest.raises(ValueError, match=rf"{message}:\n    model\.layers\.3\."):
            weights.load(write(tmp_path, "hy3-tiny", tensors("hy3-tiny"), **kinds))


HYBRID = HybridMoEConfig(
    vocab_size=32, num_layers=3, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=24, moe_dim=12, num_experts=3, num_experts_per_tok=2,
    first_dense_layers=2, layer_pattern="LN", window=5, experts=ExpertsConfig(num_shared=0),
)  # fmt: skip


def test_a_hybrid_of_ours_round_trips(tmp_path):
    model = random_model(HYBRID)
    weights.save(model, tmp_path / "out")
    again, _ = weights.load(tmp_path / "out")
    assert again.config == HYBRID
    assert_same(again, model)
    assert weights.load_config(tmp_path / "out") == HYBRID


def test_rows_without_biases():
    config = GPTConfig(
        vocab_size=32, max_positions=8, num_layers=1, num_heads=2, embed_dim=8, use_bias=False
    )
    leaves = {path: leaf.shape for path, leaf in flat(weights.abstract_model(config)).items()}
    assert "layers.0.attention.q_bias" not in leaves
    sources(models.FAMILIES["gpt2"].weights.TABLE, leaves)


def test_a_leaf_without_a_row():
    table = [Row("w", "(n h) d", "q", "d n h")]
    with pytest.raises(ValueError, match=r"needed a row for the leaf k \(1, 2, 3\)"):
        sources(table, {"q": (1, 2, 3), "k": (1, 2, 3)})
    with pytest.raises(ValueError, match=r"needed a row for the leaf q \(6,\)"):
        sources(table, {"q": (6,)})


def test_bfloat16_survives_numpy(tmp_path):
    """safetensors reads and writes bfloat16 through ml_dtypes, without a framework."""
    save_file({"x": np.float32([1.5, -2]).astype(ml_dtypes.bfloat16)}, tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors")["x"].dtype == ml_dtypes.bfloat16
