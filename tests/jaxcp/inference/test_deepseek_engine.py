# SPDX-License-Identifier: Apache-2.0
"""Conversations with DeepSeek's models, and the programs that an engine runs for them."""

import dataclasses

import jax
import numpy as np
import pytest
from published import R1
from tiny_checkpoints import FIXTURES

import jaxcp
from jaxcp import models
from jaxcp.compile import compile_for, decode_program, parse_target, prefill_program
from jaxcp.inference import steps
from jaxcp.layers.stack import Layers

V3, V32, V4 = "deepseek-v3-tiny", "deepseek-v32-tiny", "deepseek-v4-tiny"


@pytest.fixture
def short(monkeypatch):
    """Turns of more than 8 tokens are sharded."""
    for module in (steps,):
        monkeypatch.setattr(module, "EXTEND_SIZES", (1, 8))


def three_layers(name):
    """Of V4 one layer of each kind."""
    model, _ = jaxcp.load(FIXTURES / name)
    model.layers = Layers(model.layers[:3])
    return model


def conversation(model):
    """Token ids of three turns and their answers, and which of them were answered.

    A fork finds what its parent has computed since, to the token or to the last snapshot.
    """
    rng, engine = np.random.default_rng(0), jaxcp.Engine(model, None, max_len=64, stop_tokens=())
    session, said, answered = engine.session(), [], []
    for length, count in ((20, 3), (19, 2), (2, 3)):
        prompt = rng.integers(0, 256, length).tolist()
        if length == 2:  # the parent has said something else meanwhile
            session, parent = session.fork(), session
            list(parent.send([9, 9], max_new_tokens=3))
        answer = list(session.send(prompt, max_new_tokens=count))
        answered += [False] * len(prompt) + [True] * count
        said += prompt + answer
    snapshots = engine.geometry.states > 0
    assert session.stats.reused == 20 + 3 + 19 + (1 if snapshots else 2)
    assert session.stats.prefilled == (3 if snapshots else 2)
    assert session.stats.tokens == len(said) - 1
    assert session.stats.cache_bytes_per_device > 0
    return np.asarray(said), np.asarray(answered)


@pytest.mark.slow
@pytest.mark.parametrize("name, seq", [(V3, 1), (V3, 4), (V32, 2), (V4, 1), (V4, 2)])
def test_an_engine_answers_as_full_forwards_do(name, seq, short, mesh_of):
    """Greedy: each token is the best after those before it, of one pass over all of them."""
    alone = three_layers(name)
    if seq > 1:
        mesh_of(seq=seq)
    model = three_layers(name)
    said, answered = conversation(model)
    with jax.set_mesh(jaxcp.make_mesh(devices=jax.devices()[:1])):
        logits = jaxcp.logits(alone, said[None])
    best = np.asarray(logits)[0].argmax(-1)
    assert (best[:-1] == said[1:])[answered[1:]].all()
    assert len({*said[answered]}) > 3  # and it is not the same token for ever


def one_layer(kind):
    config = jaxcp.load_config(FIXTURES / V4)
    layers = {"num_layers": 1, "layer_kinds": kind, "num_mtp_layers": 0}
    return jaxcp.abstract_model(dataclasses.replace(config, **layers))


@pytest.mark.slow
def test_programs_of_a_compressed_cache():
    """Decoding sends nothing; a turn gathers its new entries, not the cache."""
    mesh = jaxcp.make_mesh(seq=4, devices=jax.devices()[:4])
    fn, arrays = decode_program(one_layer("H"), mesh, max_len=128)
    assert not compile_for(fn, arrays, mesh).collectives
    with pytest.raises(ValueError, match="needs over 64 tokens where some are held"):
        prefill_program(one_layer("H"), mesh, tokens=8, held=64)
    sent = {}
    for held in (0, 1024):
        program = prefill_program(one_layer("H"), mesh, tokens=96, held=held, max_len=2048)
        report = compile_for(*program, mesh)
        sent[held] = {c.kind: c.bytes for c in report.collectives}
    assert sent[0] == sent[1024] and sent[0]["all-gather"] > 96 // 8 * 32 * 4


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v6e:2x2", "rtx-pro-6000:4"])
def test_decoding_over_latents_as_wide_as_published_ones_compiles(target):
    """576 channels, where decode kernels take 256; DeepSeek-V3 less most of its layers."""
    config = models.config_from_dict(R1 | {"num_hidden_layers": 4, "num_nextn_predict_layers": 0})
    mesh = parse_target(target).mesh(seq=4)
    fn, arrays = decode_program(
        jaxcp.abstract_model(config), mesh, max_len=1024, rules=jaxcp.Rules(experts="seq")
    )
    assert compile_for(fn, arrays, mesh).temp_bytes > 0
