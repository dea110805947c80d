# SPDX-License-Identifier: Apache-2.0
"""Prefilled in chunks of any size and decoded, DeepSeek's models say what they say of it all."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import FIXTURES

import jaxcp
from jaxcp.inference import steps
from jaxcp.layers.stack import Layers

V3, V32, V4 = "deepseek-v3-tiny", "deepseek-v32-tiny", "deepseek-v4-tiny"


def reference(name):
    return np.load(FIXTURES / name / "reference.npz")


def told(model, cache, tokens, starts, turns):
    """Logits `[B, turns, V]` after each turn; row b begins with its token `starts[b]`.

    `turns`: tokens of a turn, the same in each row, or `lengths [B]`. One token: a decode step.
    """
    found, at = [], np.asarray(starts)
    for turn in turns:
        lengths = np.broadcast_to(turn, at.shape)
        rows = np.stack([x[i : i + lengths.max()] for x, i in zip(tokens, at, strict=True)])
        if lengths.max() > 1:
            logits, cache = jaxcp.prefill(model, cache, rows, lengths=lengths)
        else:
            logits, cache = jaxcp.decode_step(model, cache, rows[:, 0])
        found.append(np.asarray(logits))
        at = at + lengths
    assert (np.asarray(cache.lengths) == at).all()
    return np.stack(found, 1), cache


def after_three_layers(model, rows, positions):
    """Logits of transformers' states after a window, long blocks and selected blocks."""
    x = jnp.asarray(reference(V4)["hidden_03"][rows, positions])
    return model.logits(model.final_norm(model.streams_to_one(x)))


def first_three(name):
    model, _ = jaxcp.load(FIXTURES / name)
    model.layers = Layers(model.layers[:3])
    return model


@pytest.mark.slow
def test_v4_over_a_mesh(monkeypatch, mesh_of):
    """Blocks of 8 and of 4 end inside turns, at their ends and between them, row by row."""
    monkeypatch.setattr(steps, "EXTEND_SIZES", (2,))  # longer turns are sharded
    turns = (np.asarray([13, 9]), 13, 2, 1, 1, 2)
    last = np.cumsum([np.broadcast_to(turn, 2) for turn in turns], 0).T - 1
    expected = after_three_layers(first_three(V4), np.arange(2)[:, None], last)
    mesh_of(seq=4, model=2)
    model, tokens = first_three(V4), reference(V4)["input_ids"]
    found, cache = told(model, model.init_cache(2, 32), tokens, [0, 0], turns)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="33 tokens do not fit max_len=32"):
        jaxcp.prefill(model, cache, tokens[:, :1])


@pytest.mark.slow
def test_v3_over_a_mesh(monkeypatch, mesh_of):
    monkeypatch.setattr(steps, "EXTEND_SIZES", (1,))  # the others are sharded, over a filled cache
    turns, tokens = (9, 22, 1), reference(V3)["input_ids"]
    mesh_of(seq=2, model=2)
    model, _ = jaxcp.load(FIXTURES / V3)
    found, _ = told(model, model.init_cache(2, 40), tokens, [0, 0], turns)
    expected = reference(V3)["logits"][:, np.cumsum(turns) - 1]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("seq, ties", [(1, False), (2, True), (4, False), (4, True)])
def test_v32_in_chunks_and_decoded(seq, ties, monkeypatch, mesh_of):
    """A sharded turn, a longer one on it, a short one of two lengths, two tokens one by one.

    With `ties` all scores are 0: the first tokens are taken, wherever their slots are.
    """
    monkeypatch.setattr(steps, "EXTEND_SIZES", (1, 4))
    turns = 9, 13, np.asarray([3, 2]), 1, 1
    tokens, alone = reference(V32)["input_ids"], indexed(ties)
    expected = np.asarray(jaxcp.logits(alone, tokens)) if ties else reference(V32)["logits"]
    if seq > 1:
        mesh_of(seq=seq)
    model = indexed(ties)
    found, cache = told(model, model.init_cache(2, 40), tokens, [0, 0], turns)
    at = np.cumsum([np.broadcast_to(turn, 2) for turn in turns], 0).T - 1
    np.testing.assert_allclose(found, expected[np.arange(2)[:, None], at], atol=1e-4, rtol=0)
    slots = seq * (-(-40 // seq) + 64)
    assert cache.bytes_per_device() == 3 * 2 * slots * (24 + 8 + 16) * 4 // seq


def indexed(ties):
    model, _ = jaxcp.load(FIXTURES / V32)
    for layer in model.layers.stacks if ties else ():
        layer.attention.index.weights[...] *= 0
    return model


def test_a_cache_is_no_longer_than_the_model():
    for name in (V3, V32, V4):
        model, _ = jaxcp.load(FIXTURES / name)
        with pytest.raises(ValueError, match="4096 positions; got max_len=5000"):
            model.init_cache(1, 5000)
