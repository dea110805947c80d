# SPDX-License-Identifier: Apache-2.0
"""Llama, Mistral, Qwen2 and Qwen3 compute what transformers computes, on any mesh and in turns."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import (
    LLAMA_31_8B,
    LLAMA_31_70B,
    LLAMA_31_405B,
    MISTRAL_7B,
    QWEN2_05B,
    QWEN2_7B,
    QWEN3_06B,
    QWEN3_8B,
    QWEN3_17B,
    QWEN3_32B,
)
from tiny_checkpoints import FIXTURES, assert_same, tensors, write

import jaxcp
from jaxcp import AllGather, DenseConfig, MeshConfig, models
from jaxcp.inference.sampling import Sampling
from jaxcp.layers.stack import of_each_layer
from jaxcp.models.base import embed
from jaxcp.models.weight_table import sources
from jaxcp.training import OptimizerConfig, TextSource, TrainConfig, flops, read_metrics, train

CLOSE = {"atol": 1e-4, "rtol": 0}
NAMES = "llama-tiny", "mistral-tiny", "qwen2-tiny", "qwen3-tiny"
ALL = pytest.mark.parametrize("name", NAMES)
MESHES = {"seq": 2, "model": 2}, {"seq": 8}


ON_MESHES = [(name, axes) for name in NAMES for axes in MESHES]
ON_ONE_MESH = [("llama-tiny", {"seq": 8}), ("qwen2-tiny", {"seq": 8})] + [
    (name, {"seq": 2, "model": 2}) for name in ("mistral-tiny", "qwen3-tiny")
]
"""Programs over caches take long to compile: each family on one mesh, each mesh with a window."""


def reference(name):
    return np.load(FIXTURES / name / "reference.npz")


@functools.cache
def loaded(name):
    return jaxcp.load(FIXTURES / name)[0]


@jax.jit
def states(model, tokens):
    """Give the input of the first layer, the output of each, and the logits."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x = embed(model.embed, tokens, jnp.float32)
    out, attend = [x], model.attend_over(positions)
    for layer in model.layers:
        x, _ = layer(x, positions, attend)
        out.append(x)
    out[-1] = model.final_norm(x)
    return out, model.logits(out[-1])


@ALL
def test_every_layer_is_that_of_transformers(name):
    expected = reference(name)
    found, logits = states(loaded(name), jnp.asarray(expected["input_ids"], jnp.int32))
    for layer, x in enumerate(found):
        np.testing.assert_allclose(x, expected[f"hidden_{layer:02d}"], **CLOSE, err_msg=f"{layer}")
    np.testing.assert_allclose(logits, expected["logits"], **CLOSE)
    assert f"hidden_{len(found):02d}" not in expected


@pytest.mark.slow
@pytest.mark.parametrize(("name", "axes"), ON_MESHES)
def test_over_a_mesh_it_is_that_of_transformers(name, axes, mesh_of):
    """37 tokens divide by no mesh: there are pads."""
    mesh_of(**axes)
    expected = reference(name)
    model, _ = jaxcp.load(FIXTURES / name)
    np.testing.assert_allclose(
        jaxcp.logits(model, expected["input_ids"]), expected["logits"], **CLOSE
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "axes"), ON_ONE_MESH)
def test_turns_and_then_tokens_are_the_whole_sequence(name, axes, mesh_of):
    """A window of 11, or 7, ends inside the second turn, and inside the cache."""
    mesh_of(**axes)
    expected = reference(name)
    tokens, logits = expected["input_ids"], expected["logits"]
    model, _ = jaxcp.load(FIXTURES / name)
    cache, end = model.init_cache(batch_size=2, max_len=40), 0
    for turn in (17, 5, 12):
        start, end = end, end + turn
        found, cache = jaxcp.prefill(model, cache, tokens[:, start:end], strategy=AllGather())
        np.testing.assert_allclose(found, logits[:, end - 1], **CLOSE, err_msg=f"to {end}")
    for at in range(end, 37):
        found, cache = jaxcp.decode_step(model, cache, tokens[:, at])
        np.testing.assert_allclose(found, logits[:, at], **CLOSE, err_msg=f"token {at}")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "axes"), [("llama-tiny", {}), ("qwen2-tiny", {}), *ON_ONE_MESH])
def test_greedy_tokens_are_those_of_transformers(name, axes, mesh_of):
    """Through the engine, beside another row, and again in two turns of a conversation."""
    if axes:
        mesh_of(**axes)
    expected = reference(name)
    ids, greedy = expected["input_ids"].tolist(), expected["greedy"].tolist()
    engine = jaxcp.Engine(jaxcp.load(FIXTURES / name)[0], None, max_len=64, stop_tokens=())
    first, _ = engine.generate([ids[0], ids[1]], Sampling(max_new_tokens=12))
    assert first.tokens == greedy
    after = engine.generate([[*ids[0], *greedy[:5]]], Sampling(max_new_tokens=7))[0]
    assert after.tokens == greedy[5:]


def test_frequencies_that_old_checkpoints_carry_are_left_out(tmp_path):
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(8) for i in range(4)}
    model, _ = jaxcp.load(write(tmp_path / "old", "llama-tiny", tensors("llama-tiny") | extra))
    assert_same(model, loaded("llama-tiny"))
    with pytest.raises(ValueError, match=r"left over:\n    model\.layers\.0\.self_attn\.other"):
        extra = {"model.layers.0.self_attn.other": np.ones(8)}
        jaxcp.load(write(tmp_path / "other", "llama-tiny", tensors("llama-tiny") | extra))


# Configurations


PUBLISHED = [
    # parameters, and tensors: 9, 11 or 12 a layer, and 3, or 2 with a tied head
    pytest.param(LLAMA_31_8B, 8_030_261_248, 291, id="Llama-3.1-8B"),
    pytest.param(LLAMA_31_70B, 70_553_706_496, 723, marks=pytest.mark.slow, id="Llama-3.1-70B"),
    pytest.param(LLAMA_31_405B, 405_853_388_800, 1137, marks=pytest.mark.slow, id="Llama-3.1-405B"),
    pytest.param(MISTRAL_7B, 7_241_732_096, 291, marks=pytest.mark.slow, id="Mistral-7B-v0.1"),
    pytest.param(QWEN2_05B, 494_032_768, 290, marks=pytest.mark.slow, id="Qwen2.5-0.5B"),
    pytest.param(QWEN2_7B, 7_615_616_512, 339, marks=pytest.mark.slow, id="Qwen2.5-7B"),
    pytest.param(QWEN3_06B, 596_049_920, 310, id="Qwen3-0.6B"),
    pytest.param(QWEN3_17B, 1_720_574_976, 310, marks=pytest.mark.slow, id="Qwen3-1.7B"),
    pytest.param(QWEN3_8B, 8_190_735_360, 399, marks=pytest.mark.slow, id="Qwen3-8B"),
    pytest.param(QWEN3_32B, 32_762_123_264, 707, marks=pytest.mark.slow, id="Qwen3-32B"),
]


@pytest.mark.parametrize("published, parameters, names", PUBLISHED)
def test_published_models(published, parameters, names):
    config = models.config_from_dict(published)
    assert models.config_from_dict(models.config_to_dict(config)) == config
    assert models.config_to_dict(config)["model_type"] == published["model_type"]
    leaves = of_each_layer(jaxcp.abstract_model(config))
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters
    found = sources(models.family_of(config).weights.TABLE, shapes)
    named = {name for source in found.values() for name in source.names}
    assert len(named) == len(shapes) == names


BASE = DenseConfig(
    vocab_size=32, num_layers=4, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24
)


@pytest.mark.parametrize(
    "change, model_type",
    [
        ({}, "llama"),
        ({"qkv_bias": True, "output_bias": True, "mlp_bias": True}, "llama"),
        ({"layer_pattern": "L", "window": 5}, "mistral"),
        ({"layer_pattern": "LLLLG", "window": 5}, "mistral"),  # of four layers
        ({"qkv_bias": True, "layer_pattern": "GL", "window": 5}, "qwen2"),
        ({"qk_norm": True, "layer_pattern": "LGG", "window": 5, "tie_embeddings": True}, "qwen3"),
        ({"qk_norm": True, "qkv_bias": True, "output_bias": True, "window": 3}, "qwen3"),
    ],
)
def test_a_config_is_saved_in_the_format_that_can_say_it(change, model_type):
    config = dataclasses.replace(BASE, **change, remat=True)
    fields = models.config_to_dict(config)
    assert fields["model_type"] == model_type
    again = models.config_from_dict(fields)
    assert [again.kind(i) for i in range(4)] == [config.kind(i) for i in range(4)]
    window = config.window if "L" in config.layer_pattern else None
    same = {"layer_pattern": again.layer_pattern, "window": window, "remat": False}
    assert again == dataclasses.replace(config, **same)
    assert models.config_to_dict(again) == fields


@pytest.mark.parametrize(
    "change",
    [
        {"layer_pattern": "GL", "window": 5},
        {"qk_norm": True, "mlp_bias": True},
        {"output_bias": True},
    ],
)
def test_a_config_that_no_format_can_say_is_refused(change):
    with pytest.raises(NotImplementedError, match=r"llama, mistral, qwen2, qwen3 cannot say"):
        models.config_to_dict(dataclasses.replace(BASE, **change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layer_pattern": "GN"}, "layer_pattern is made of G and L; got 'GN'"),
        ({"layer_pattern": "L"}, "needs window >= 1; got window=None"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads; got 3 and 4"),
        ({"head_dim": 7}, "head_dim must be even"),
    ],
)
def test_sizes_that_contradict_each_other(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **change)


@pytest.mark.parametrize(
    "published, change, message",
    [
        (LLAMA_31_8B, {"sliding_window": 4096}, "sliding_window"),
        (LLAMA_31_8B, {"layer_types": ["sliding_attention"] * 32}, "all layers are full_attention"),
        (LLAMA_31_8B, {"hidden_act": "gelu"}, "hidden_act"),
        (LLAMA_31_8B, {"num_attention_heads": 48, "num_key_value_heads": 8}, "must divide hidden"),
        (LLAMA_31_8B, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        (LLAMA_31_8B, {"num_experts": 8}, "num_experts"),
        (LLAMA_31_8B, {"qk_norm": True}, "qk_norm"),
        (MISTRAL_7B, {"attention_bias": True}, "attention_bias"),
        (MISTRAL_7B, {"layer_types": ["full_attention"] * 32}, "all layers are sliding_attention"),
        (MISTRAL_7B, {"num_key_value_heads": None}, "num_kv_heads|num_key_value"),
        (QWEN2_7B, {"attention_bias": False}, "attention_bias"),
        (QWEN2_7B, {"use_mrope": True}, "use_mrope"),
        (QWEN2_7B, {"dual_chunk_attention_config": {"chunk_size": 9}}, "dual_chunk_attention"),
        (QWEN3_8B, {"layer_types": ["sliding_attention"] * 36}, "needs use_sliding_window"),
        (QWEN3_8B, {"layer_types": ["chunked_attention"] * 36}, "chunked_attention"),
        (QWEN3_8B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_there_is_refused_by_name(published, change, message):
    fields = {k: v for k, v in (published | change).items() if k != "num_key_value_heads" or v}
    with pytest.raises((NotImplementedError, ValueError), match=message):
        models.config_from_dict(fields)


def test_the_layers_of_a_qwen_that_have_a_window():
    """`layer_types`, or those from `max_window_layers` on; none without `use_sliding_window`."""
    fields = QWEN2_7B | {"num_hidden_layers": 4, "max_window_layers": 3, "sliding_window": 9}
    assert models.config_from_dict(fields).layer_pattern == "G"
    on = fields | {"use_sliding_window": True}
    read = models.config_from_dict(on)
    assert (read.layer_pattern, read.window) == ("GGGL", 9)
    assert models.config_from_dict(on | {"max_window_layers": 28}).window is None
    assert models.config_from_dict(on | {"max_window_layers": 0}).layer_pattern == "L"
    kinds = ["full_attention", "sliding_attention"] * 2
    assert models.config_from_dict(on | {"layer_types": kinds}).layer_pattern == "GL"


# Training


def test_flops_of_a_llama():
    """6 N a token, N without the embedding, and 12 heads x head_dim a pair of query and key."""
    config = models.config_from_dict(LLAMA_31_8B | {"num_hidden_layers": 2})
    layer = (8_030_261_248 - 2 * 128_256 * 4096 - 65 * 4096) // 32  # less embedding, head, norms
    assert flops.matrix_weights(config) == 2 * layer + 128_256 * 4096
    assert flops.attended(config) == (flops.Attended(None, 2 * 32 * 128),)
    biased = dataclasses.replace(config, qkv_bias=True, mlp_bias=True, tie_embeddings=True)
    assert flops.matrix_weights(biased) == flops.matrix_weights(config)
    windowed = models.config_from_dict(MISTRAL_7B | {"num_hidden_layers": 2})
    assert flops.attended(windowed) == (flops.Attended(4096, 2 * 32 * 128),)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2-tiny", "qwen3-tiny"])
def test_two_steps_of_training(name, tmp_path):
    """From random weights of each shape, on one device and on four, remat too."""
    config = dataclasses.replace(jaxcp.load_config(FIXTURES / name), vocab_size=256)
    losses = []
    for mesh, remat in ((MeshConfig(), False), (MeshConfig(seq=2, model=2), True)):
        out = train(
            TrainConfig(
                model=dataclasses.replace(config, remat=remat),
                seq_len=30,
                batch_size=2,
                steps=2,
                data=TextSource(),
                out_dir=tmp_path / str(mesh.size),
                mesh=mesh,
                log_every=1,
                optimizer=OptimizerConfig(warmup_steps=1),
            )
        )
        records = read_metrics(out.metrics_path)
        losses.append([record["loss"] for record in records])
        assert len(records) == 2 and all(record["grad_norm"] > 0 for record in records)
    assert losses[0][1] < losses[0][0]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
