# SPDX-License-Identifier: Apache-2.0
"""Prefilled in chunks of any size and decoded, DeepSeek's models say what they say of it all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_checkpoints import FIXTURES

import jaxcp
from jaxcp.inference import compressed_steps, steps

V3, V32, V4 = "deepseek-v3-tiny", "deepseek-v32-tiny", "deepseek-v4-tiny"


def reference(name):
    return np.load(FIXTURES / name / "reference.npz")


def told(model, cache, tokens, stops):
    """Logits after each of the turns that end at `stops`; a turn of one token is a decode step."""
    found, start = [], 0
    for stop in stops:
        turn = tokens[:, start:stop]
        if turn.shape[1] > 1:
            logits, cache = jaxcp.prefill(model, cache, turn)
        else:
            logits, cache = jaxcp.decode_step(model, cache, turn[:, 0])
        found.append(np.asarray(logits))
        start = stop
    assert cache.lengths.tolist() == [stops[-1]] * len(tokens)
    return np.stack(found, 1)


@pytest.fixture
def quick(monkeypatch):
    """Compiled to run once: without LLVM's optimisations."""

    @functools.cache
    def jitted(donate):
        options = {"xla_backend_optimization_level": 0}
        return jax.jit(compressed_steps._step, static_argnums=(5, 6), compiler_options=options)

    monkeypatch.setattr(compressed_steps, "_jitted", jitted)


def after_three_layers(model, rows, positions):
    """Logits of transformers' states after a window, long blocks and selected blocks."""
    x = jnp.asarray(reference(V4)["hidden_03"][rows, positions])
    return model.logits(model.final_norm(model.streams_to_one(x)))


def first_three(name):
    model, _ = jaxcp.load(FIXTURES / name)
    model.layers = nnx.List(list(model.layers)[:3])
    return model


@pytest.mark.slow
def test_v4_over_a_mesh(quick, monkeypatch, mesh_of):
    """Blocks of 8 and of 4 end inside turns, at their ends and between them."""
    monkeypatch.setattr(compressed_steps, "EXTEND_SIZES", (1,))  # the others are sharded
    stops = (13, 26, 27, 28, 29, 30, 31, 32)
    rows, last = np.arange(2)[:, None], np.asarray(stops) - 1
    expected = after_three_layers(first_three(V4), rows, last)
    mesh_of(seq=4, model=2)
    model = first_three(V4)
    found = told(model, model.init_cache(2, 32), reference(V4)["input_ids"], stops)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_v4_rows_of_different_lengths_and_a_full_cache(quick):
    tokens, model = reference(V4)["input_ids"], first_three(V4)
    lengths, cache = np.asarray([7, 3]), model.init_cache(2, 24)
    _, cache = jaxcp.prefill(model, cache, tokens[:, :7], lengths=lengths)
    later = np.stack([tokens[row, n : n + 17] for row, n in enumerate(lengths)])
    logits, cache = jaxcp.prefill(model, cache, later)
    assert cache.lengths.tolist() == [24, 20]
    expected = after_three_layers(model, np.arange(2)[:, None], np.asarray([[23], [19]]))
    np.testing.assert_allclose(logits[:, None], expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="25 tokens do not fit max_len=24"):
        jaxcp.prefill(model, cache, tokens[:, :1])


@pytest.mark.slow
def test_v3_over_a_mesh(monkeypatch, mesh_of):
    monkeypatch.setattr(steps, "EXTEND_SIZES", (1,))  # the others are sharded, over a filled cache
    stops = (9, 31, 32)
    mesh_of(seq=2, model=2)
    model, _ = jaxcp.load(FIXTURES / V3)
    found = told(model, model.init_cache(2, 40), reference(V3)["input_ids"], stops)
    expected = reference(V3)["logits"][:, np.asarray(stops) - 1]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_what_has_no_cache():
    model, _ = jaxcp.load(FIXTURES / V32)
    with pytest.raises(NotImplementedError, match=r"V3\.2 has no cache yet: use jaxcp\.logits"):
        model.init_cache(1, 8)
    for name in (V3, V4):
        model, _ = jaxcp.load(FIXTURES / name)
        with pytest.raises(ValueError, match="4096 positions; got max_len=5000"):
            model.init_cache(1, 5000)
