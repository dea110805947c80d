# SPDX-License-Identifier: Apache-2.0
"""A cache for `max_len` tokens a row takes `max_len` in every row, in whatever portions."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_checkpoints import FIXTURES

import jaxcp
from jaxcp import GPTConfig, HybridMoEConfig
from jaxcp.compile import compile_for, decode_program, parse_target
from jaxcp.inference import steps
from jaxcp.layers.stack import Layers
from jaxcp.models.hybrid_moe.config import NGramConfig
from jaxcp.weights.placement import place

ROWS = np.arange(3)
QUICK = {"xla_backend_optimization_level": 0}
TURNS = ([1, 9, 4], [10, 1, 3], [2, 3, 1], [9, 9, 12], [1, 1, 3])
"""Portions of the three rows, none of which has more than 12 tokens of a portion; 23 in each."""


def gpt():
    size = {"vocab_size": 256, "max_positions": 64, "num_layers": 1}
    return jaxcp.GPT(GPTConfig(**size, num_heads=2, embed_dim=16), rngs=nnx.Rngs(0))


def windowed():
    """A window shorter than a turn, and embeddings of three tokens."""
    return jaxcp.HybridMoE(
        HybridMoEConfig(
            vocab_size=256, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8,
            mlp_dim=16, moe_dim=8, num_experts=4, num_experts_per_tok=2, layer_pattern="L",
            window=5, ngram=NGramConfig(width=3, dim=4),
        ),
        rngs=nnx.Rngs(0),
    )  # fmt: skip


def fixture(name, layers):
    model, _ = jaxcp.load(FIXTURES / name)
    model.layers = Layers([model.layers[i] for i in layers])
    return model


KINDS = {
    "full": gpt,
    "latent": lambda: fixture("deepseek-v3-tiny", [0]),
    "selected": lambda: fixture("deepseek-v32-tiny", [0]),
    "window": windowed,
}


@pytest.fixture
def short(monkeypatch):
    """Turns of more than 4 tokens are sharded; compiled to run once."""
    options = {"compiler_options": QUICK}

    @functools.cache
    def jitted(fn, donate):
        return jax.jit(fn, static_argnums=steps.STATIC.get(fn, ()), **options)

    monkeypatch.setattr(steps, "jitted", jitted)
    monkeypatch.setattr(steps, "EXTEND_SIZES", (1, 4))


def fill_up(model, tokens, turns, max_len):
    """Yield `(ends [B], logits)` of turns and then of steps of decoding, until all are full."""
    cache, ends = model.init_cache(len(tokens), max_len), np.zeros(len(tokens), int)
    for lengths in turns:
        at = np.minimum(ends[:, None] + np.arange(max(lengths)), max_len - 1)
        logits, cache = jaxcp.prefill(model, cache, tokens[ROWS[:, None], at], lengths=lengths)
        ends = ends + lengths
        yield ends, logits
    while (ends < max_len).all():
        logits, cache = jaxcp.decode_step(model, cache, tokens[ROWS, ends])
        ends = ends + 1
        yield ends, logits
    assert np.asarray(cache.lengths).tolist() == [max_len] * len(tokens)
    with pytest.raises(ValueError, match="the cache is full"):
        jaxcp.decode_step(model, cache, tokens[:, 0])


def check(kind, seq, mesh_of, max_len=24):
    model, tokens = KINDS[kind](), np.random.default_rng(1).integers(0, 256, (3, max_len))
    expected = np.asarray(jaxcp.logits(model, tokens))
    if seq > 1:
        mesh_of(seq=seq)
        model = place(model)
    for ends, logits in fill_up(model, tokens, TURNS, max_len):
        wanted = expected[ROWS, ends - 1]
        np.testing.assert_allclose(logits, wanted, atol=1e-4, rtol=0, err_msg=f"to {ends}")


@pytest.mark.parametrize("kind, seq", [("full", 1), ("full", 4), ("window", 2)])
def test_rows_fill_up(kind, seq, short, mesh_of):
    check(kind, seq, mesh_of)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, seq", [("latent", 1), ("latent", 2), ("selected", 1), ("selected", 2), ("window", 1)]
)
def test_rows_of_other_kinds_fill_up(kind, seq, short, mesh_of):
    check(kind, seq, mesh_of)


@pytest.mark.slow
@pytest.mark.parametrize("seq", [1, 2])
def test_rows_of_a_compressed_cache_fill_up(seq, short, monkeypatch, mesh_of):
    blocks = [1, 2]  # one with blocks of every token, one that selects them
    monkeypatch.setitem(KINDS, "compressed", lambda: fixture("deepseek-v4-tiny", blocks))
    check("compressed", seq, mesh_of)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_step_of_decoding_copies_no_cache(rows):
    """Rows that write at places of their own do it in place."""
    config = GPTConfig(vocab_size=64, max_positions=4096, num_layers=4, num_heads=2, embed_dim=256)
    mesh = parse_target("v6e:2x2").mesh(seq=4)
    model = jaxcp.abstract_model(config)
    program = decode_program(model, mesh, max_len=4096, batch_size=rows)
    keys = rows * (1024 + 64) * 256 * 4  # of a layer on a shard
    assert compile_for(*program, mesh).temp_bytes < 1.5 * keys
