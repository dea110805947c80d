# SPDX-License-Identifier: Apache-2.0
"""A hybrid MoE computes, layer by layer, what transformers computes; Hy3 drafts so; mixtures of all
features compute the same however they are spread and cached."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file
from tiny_checkpoints import FIXTURES, assert_same, random_model, tensors, write

import jaxcp
from jaxcp import AllGather, HybridMoEConfig, RingPassQ, Zigzag
from jaxcp.attention.over_cache import OverCache
from jaxcp.data.lookahead import following
from jaxcp.layers.mlp import SwiGLU
from jaxcp.layers.rope import Rope, YaRN
from jaxcp.layers.routing import Routing
from jaxcp.models.base import embed
from jaxcp.models.hybrid_moe.config import (
    AttentionConfig,
    ExpertsConfig,
    Heads,
    NGramConfig,
    NormConfig,
)
from jaxcp.weights.placement import place

CLOSE = {"atol": 1e-4, "rtol": 0}
FAMILIES = "hy3", "qwen3-moe", "gpt-oss", "glm4-moe", "minimax-m2", "mimo-v2-flash"
ALL = pytest.mark.parametrize("name", [f"{family}-tiny" for family in FAMILIES])


def reference(name, file="reference"):
    return np.load(FIXTURES / name / f"{file}.npz")


@functools.cache
def loaded(name):
    return jaxcp.load(FIXTURES / name)[0]


def natural(tokens):
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(positions, jnp.int32)


# The models, as transformers computes them


@jax.jit
def states(model, tokens, positions):
    """What goes into the first layer, what comes out of each, and the logits."""
    x = embed(model.embed, tokens, jnp.dtype(model.config.dtype))
    out, attend = [x], model.attend_over(positions)
    for layer in model.layers:
        x, _ = layer(x, positions, attend)
        out.append(x)
    out[-1] = model.final_norm(x)
    return out, model.logits(out[-1])


@ALL
def test_every_layer_is_that_of_transformers(name):
    expected = reference(name)
    found, logits = states(loaded(name), *natural(expected["input_ids"]))
    for layer, x in enumerate(found):
        np.testing.assert_allclose(x, expected[f"hidden_{layer:02d}"], **CLOSE, err_msg=f"{layer}")
    np.testing.assert_allclose(logits, expected["logits"], **CLOSE)
    assert f"hidden_{len(found):02d}" not in expected


@pytest.mark.parametrize(
    "name, axes, strategy",
    [
        pytest.param("qwen3-moe-tiny", {"seq": 4, "model": 2}, None, marks=pytest.mark.slow),
        pytest.param("gpt-oss-tiny", {"seq": 8}, None, marks=pytest.mark.slow),
        ("gpt-oss-tiny", {"seq": 3, "model": 2}, RingPassQ()),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_over_a_mesh_it_is_that_of_transformers(name, axes, strategy, mesh_of):
    mesh_of(**axes)
    expected = reference(name)
    model, _ = jaxcp.load(FIXTURES / name)
    found = jaxcp.logits(model, expected["input_ids"], strategy=strategy)
    np.testing.assert_allclose(found, expected["logits"], **CLOSE)


def test_chunks_over_a_cache_are_the_whole_sequence(mesh_of):
    """Sinks and windows too: the window of 8 ends inside a chunk, and inside the cache.

    Layers that all see everything, as those of Hy3 and Qwen3-MoE do: test_inference.py.
    """
    mesh_of(seq=2, model=2)
    expected = reference("gpt-oss-tiny")
    tokens, logits = expected["input_ids"], expected["logits"]
    model, _ = jaxcp.load(FIXTURES / "gpt-oss-tiny")
    cache, end = model.init_cache(batch_size=2, max_len=40), 0
    for chunk in (11, 6, 8):
        start, end = end, end + chunk
        part = tokens[:, start:end]
        found, cache = jaxcp.prefill(model, cache, part, strategy=AllGather())
        np.testing.assert_allclose(found, logits[:, end - 1], **CLOSE, err_msg=f"to {end}")
    for at in range(end, 32):
        found, cache = jaxcp.decode_step(model, cache, tokens[:, at])
        np.testing.assert_allclose(found, logits[:, at], **CLOSE, err_msg=f"token {at}")


@ALL
def test_no_layer_of_a_bfloat16_model_widens_its_states(name):
    """What must be float32 (router, norms, softmax) is so inside."""
    config = jaxcp.load_config(FIXTURES / name)
    model = jaxcp.abstract_model(dataclasses.replace(config, dtype="bfloat16"))
    found, logits = jax.eval_shape(states, model, *natural(np.zeros((1, 4), np.int32)))
    assert logits.dtype == jnp.float32 and {x.dtype for x in found} == {jnp.dtype("bfloat16")}


# Hy3's MTP layer


@pytest.fixture(scope="module")
def with_mtp(tmp_path_factory):
    both = tensors("hy3-tiny") | load_file(FIXTURES / "hy3-tiny/model_mtp.safetensors")
    return write(tmp_path_factory.mktemp("mtp") / "hy3", "hy3-tiny", both)


def test_drafts_over_a_mesh_are_those_of_transformers(with_mtp, mesh_of):
    """The token after next, and with the state of that draft the one after."""
    expected = reference("hy3-tiny", "reference_mtp")
    tokens, positions = natural(expected["input_ids"])
    after = np.stack([expected["next_ids"], expected["next_ids2"]], axis=-1).astype(np.int32)
    assert (after[:, :-2] == following(expected["input_ids"], 2)[:, :-2]).all()
    batch = {"tokens": np.asarray(tokens), "positions": np.asarray(positions), "after": after}
    mesh_of(seq=4, model=2)
    batch = {k: jax.device_put(v, P("data", "seq")) for k, v in Zigzag().permute(batch, 4).items()}
    model, _ = jaxcp.load(with_mtp)
    assert model.config.num_mtp_layers == 1
    run = jax.jit(lambda m, b: m.mtp_logits(b["tokens"], b["after"], b["positions"]))
    for found, name in zip(run(model, batch), ("mtp_logits", "mtp_logits2"), strict=True):
        found = Zigzag().inverse(found, 4, 32)
        np.testing.assert_allclose(found, expected[name], **CLOSE, err_msg=name)


@jax.jit
def drafted(model, cache, tokens, after, positions):
    """Trunk and draft of tokens that join the cache."""
    added = jnp.full(2, tokens.shape[1], jnp.int32)
    attend = OverCache(cache, positions, added, sharded=False)
    x = model.draft(model.forward(tokens, positions, attend)[0], after, positions, attend)
    return model.logits(x), attend.cache_after(cache.recent)


def test_a_draft_over_the_cache_is_that_of_the_whole_sequence(with_mtp):
    expected = reference("hy3-tiny", "reference_mtp")
    tokens, positions = natural(expected["input_ids"])
    after = jnp.asarray(expected["next_ids"], jnp.int32)
    model, _ = jaxcp.load(with_mtp)
    cache = model.init_cache(batch_size=2, max_len=32)
    for part in (slice(0, 16), slice(16, 32)):
        found, cache = drafted(model, cache, *(x[:, part] for x in (tokens, after, positions)))
        np.testing.assert_allclose(found, expected["mtp_logits"][:, part], **CLOSE)


def test_drafting_without_an_mtp_layer():
    assert loaded("hy3-tiny").config.num_mtp_layers == 0
    with pytest.raises(ValueError, match="needs a model with an MTP layer"):
        loaded("hy3-tiny").draft(None, None, None, None)


@pytest.mark.parametrize(
    "segments, expected",
    [
        (None, [[5, 6], [6, 7], [7, 0], [0, 0]]),
        ([1, 1, 2, 2], [[5, 0], [0, 0], [7, 0], [0, 0]]),
    ],
)
def test_tokens_that_follow(segments, expected):
    segments = None if segments is None else np.asarray([segments])
    found = following(np.asarray([[4, 5, 6, 7]]), 2, segment_ids=segments)
    assert found.dtype == np.int32 and found[0].tolist() == expected


# Any mixture of their features

YARN = Rope(yarn=YaRN(factor=4.0, original_max_positions=64))
MIXTURE = HybridMoEConfig(
    vocab_size=64, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=16, moe_dim=8, num_experts=6, num_experts_per_tok=2, layer_pattern="LN", window=40,
    attention=AttentionConfig(
        rope=YARN, sinks=True, use_bias=True, output_bias=False, value_scale=0.5,
        qk_norm_together=True,
        full=Heads(num_heads=4, num_kv_heads=4, head_dim=6, value_dim=4, rope=Rope(part=0.4)),
    ),
    experts=ExpertsConfig(
        routing=Routing(scores="sqrt_softplus", linear_bias=True, num_groups=3, top_groups=2),
        activation=SwiGLU(limit=1.0, alpha=1.5, shift=0.5), use_bias=True,
    ),
    norm=NormConfig(float32_scale=True), ngram=NGramConfig(width=3, dim=4),
)  # fmt: skip


@functools.cache
def mixture():
    return random_model(MIXTURE)


@pytest.mark.slow
def test_a_mixture_over_a_mesh_and_a_cache_is_itself(mesh_of):
    """A long turn (sharded), then a short one (replicated)."""
    tokens = np.random.default_rng(0).integers(0, 64, (2, 94))
    expected = jaxcp.logits(mixture(), tokens)
    mesh_of(seq=2, model=2)
    model = place(mixture())
    cache, end = model.init_cache(batch_size=2, max_len=100), 0
    for turn in (75, 19):
        start, end = end, end + turn
        found, cache = jaxcp.prefill(model, cache, tokens[:, start:end])
        np.testing.assert_allclose(found, expected[:, end - 1], atol=3e-5, rtol=0)


def test_a_mixture_is_saved_as_it_is(tmp_path):
    jaxcp.save(mixture(), tmp_path / "out")
    again, _ = jaxcp.load(tmp_path / "out")
    assert again.config == MIXTURE
    assert_same(again, mixture())
