# SPDX-License-Identifier: Apache-2.0
"""`remat=True` changes what a gradient recomputes, and nothing of a model over a cache."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from slow import slow_but
from tiny_checkpoints import FIXTURES

import jaxcp
from jaxcp import GPTConfig
from jaxcp.compile import decode_program, prefill_program

FAMILIES = (
    *("gpt2", "gpt-oss", "qwen3-moe", "hy3", "deepseek-v3", "deepseek-v32", "deepseek-v4"),
    "qwen2",
)


def traced(program):
    fn, args = program
    return str(fn.trace(*args).jaxpr)


@pytest.mark.parametrize("name", slow_but(FAMILIES, lambda name: name == "hy3"))
def test_the_programs_over_a_cache_are_the_same(name):
    """A turn and a step of decoding of every family, traced."""
    mesh, config = (
        jaxcp.make_mesh(devices=jax.devices()[:1]),
        jaxcp.load_config(FIXTURES / f"{name}-tiny"),
    )
    found = []
    for remat in (False, True):
        model = jaxcp.abstract_model(dataclasses.replace(config, remat=remat))
        with jax.set_mesh(mesh):
            found.append(
                [
                    traced(prefill_program(model, mesh, tokens=16)),
                    traced(decode_program(model, mesh, max_len=40)),
                ]
            )
    assert found[0] == found[1]


def test_every_turn_is_right():
    config = GPTConfig(
        vocab_size=64, max_positions=99, num_layers=2, num_heads=2, embed_dim=8, remat=True
    )
    model = jaxcp.GPT(config, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 64, (1, 24))
    expected = np.asarray(jaxcp.logits(model, tokens))
    cache = model.init_cache(1, 30)
    for start, end in ((0, 16), (16, 23)):
        logits, cache = jaxcp.prefill(model, cache, tokens[:, start:end])
        np.testing.assert_allclose(logits, expected[:, end - 1], atol=2e-5, rtol=0)
    logits, cache = jaxcp.decode_step(model, cache, tokens[:, 23])
    np.testing.assert_allclose(logits, expected[:, 23], atol=2e-5, rtol=0)
    positions = np.arange(24, dtype=np.int32)[None]
    whole = jax.make_jaxpr(lambda m: m(tokens, positions))(model)
    assert "remat" in str(whole)  # where there are gradients it stays
