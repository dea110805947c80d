# SPDX-License-Identifier: Apache-2.0
"""Prefill, decode and the sharded cache compute what the whole sequence would."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_checkpoints import FIXTURES

import jaxcp
from jaxcp import AllGather, HybridMoE, HybridMoEConfig, Striped
from jaxcp.attention.cache import empty_cache
from jaxcp.attention.full import Full
from jaxcp.models.base import LanguageModel
from jaxcp.models.hybrid_moe.config import NGramConfig
from jaxcp.weights.placement import place
from pallas_kernels import PAD_POSITION

CONFIG = HybridMoEConfig(
    vocab_size=64, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8,
    mlp_dim=16, moe_dim=8, num_experts=4, num_experts_per_tok=2, layer_pattern="LN", window=40,
    ngram=NGramConfig(width=3, dim=4),
)  # fmt: skip
CLOSE = {"atol": 2e-5, "rtol": 0}


@functools.cache
def small(dtype="float32"):
    fields = {**CONFIG.__dict__, "dtype": dtype}
    return HybridMoE(HybridMoEConfig(**fields), rngs=nnx.Rngs(0))


def ids(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, shape).astype(np.int32)


TURNS = (75, 13, 66)
LENGTH = 180


@functools.cache
def whole():
    """Tokens `[2, LENGTH]`, and the logits of every one, computed at once on one device."""
    assert jax.sharding.get_abstract_mesh().empty
    return ids(2, LENGTH), np.asarray(jaxcp.logits(small(), ids(2, LENGTH)))


# The same as the whole sequence at once


@pytest.mark.parametrize("axes", [{}, {"seq": 8}], ids=["one device", "seq=8"])
def test_greedy_tokens_are_those_of_transformers(axes, mesh_of):
    if axes:
        mesh_of(**axes)
    model, _ = jaxcp.load(FIXTURES / "hy3-tiny")
    engine = jaxcp.Engine(model, None, max_len=64)
    expected = np.load(FIXTURES / "hy3-tiny/reference.npz")["greedy_16"]
    for row in expected:
        answer = engine.session().send(row[:8].tolist(), max_new_tokens=16)
        assert list(answer) == row[8:].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes, strategy",
    [({}, None), ({"data": 2, "seq": 2}, None), ({"seq": 3}, AllGather(layout=Striped()))],
)
def test_turns_are_the_whole_sequence(axes, strategy, mesh_of):
    """Turns of odd lengths, long ones (sharded) and short ones (replicated), then single tokens."""
    tokens, expected = whole()
    if axes:
        mesh_of(**axes)
    model = place(small()) if axes else small()
    cache = model.init_cache(batch_size=2, max_len=190)
    end = 0
    for turn in TURNS:
        start, end = end, end + turn
        logits, cache = jaxcp.prefill(model, cache, tokens[:, start:end], strategy=strategy)
        np.testing.assert_allclose(logits, expected[:, end - 1], **CLOSE, err_msg=f"to {end}")
    for at in range(end, end + 2):
        logits, cache = jaxcp.decode_step(model, cache, tokens[:, at])
        np.testing.assert_allclose(logits, expected[:, at], **CLOSE, err_msg=f"token {at}")
    assert np.asarray(cache.lengths).tolist() == [end + 2] * 2


@pytest.mark.slow
def test_rows_of_uneven_lengths(mesh_of):
    """`lengths=`: each row is as if it were alone."""
    tokens, expected = whole()
    mesh_of(seq=4)
    model = place(small())
    cache = model.init_cache(batch_size=2, max_len=190)
    ends = np.zeros(2, int)
    for lengths in ([70, 33], [5, 8]):
        rows = [tokens[b, ends[b] : ends[b] + n] for b, n in enumerate(lengths)]
        block = np.stack([np.pad(r, (0, max(lengths) - len(r))) for r in rows])
        logits, cache = jaxcp.prefill(model, cache, block, lengths=lengths)
        ends += lengths
        np.testing.assert_allclose(logits, expected[np.arange(2), ends - 1], **CLOSE)
    for _ in range(2):
        logits, cache = jaxcp.decode_step(model, cache, tokens[np.arange(2), ends])
        np.testing.assert_allclose(logits, expected[np.arange(2), ends], **CLOSE)
        ends += 1
    assert np.asarray(cache.lengths).tolist() == ends.tolist()


def test_bfloat16(mesh_of):
    tokens, expected = whole()
    model = small("bfloat16")
    mesh_of(seq=4)
    model = place(model)
    cache = model.init_cache(batch_size=2, max_len=190)
    assert kept(cache).dtype == jnp.bfloat16
    _, cache = jaxcp.prefill(model, cache, tokens[:, :70])
    logits, cache = jaxcp.decode_step(model, cache, tokens[:, 70])
    assert logits.dtype == jnp.float32 and kept(cache).dtype == jnp.bfloat16
    np.testing.assert_allclose(logits, expected[:, 70], atol=0.03 * np.abs(expected).max(), rtol=0)


def test_logits_in_natural_order(mesh_of):
    tokens, expected = whole()
    mesh_of(data=2, seq=4)
    found = jaxcp.logits(place(small()), tokens, strategy=AllGather())
    np.testing.assert_allclose(found, expected, **CLOSE)


def kept(cache):
    """An array that the layers of a model keep."""
    return jax.tree.leaves(cache.layers)[0]


# The cache


class Slots:
    """Keeps slots, and nothing in them."""

    def empty(self, room, *, layers):
        return Full.empty(room, layers=layers, num_kv_heads=1, head_dim=1)


class Nothing(LanguageModel):
    """A model without layers: what is left is where tokens go."""

    def __init__(self):
        self.config = CONFIG
        self.table = nnx.Param(jnp.eye(CONFIG.vocab_size))

    def attentions(self):
        return {"0": (Slots(), 1)}

    def forward(self, tokens, positions, attend):
        return jax.nn.one_hot(tokens[..., 0], CONFIG.vocab_size), None  # windows, newest first

    def head_kernel(self):
        return self.table.get_value()


def fills(cache):
    """Of each shard, after checking that it holds every position once, in its first slots."""
    positions = np.asarray(cache.positions)[0].reshape(cache.shards, -1)
    fill, length = np.asarray(cache.fill), int(cache.lengths[0])
    real = positions != PAD_POSITION
    assert (real == (np.arange(cache.slots) < fill[:, None])).all()
    assert sorted(positions[real]) == list(range(length))
    return fill


@pytest.mark.parametrize("shards", [1, 3, 8])
def test_growth_stays_balanced(shards, mesh_of):
    """Whatever the turns: no shard holds more than one slot more than another."""
    mesh_of(seq=shards)
    model, rng = Nothing(), np.random.default_rng(shards)
    cache = model.init_cache(batch_size=1, max_len=2000)
    assert cache.slots == -(-2000 // shards) + 64
    while (left := 2000 - int(cache.lengths[0])) > 0:
        turn = min(left, int(rng.choice([1, 1, 3, 7, 30, 64, 65, 100, 129, 333])))
        logits, cache = jaxcp.prefill(model, cache, tokens := ids(1, turn, seed=left))
        assert int(logits.argmax()) == tokens[0, -1]
        fill = fills(cache)
        assert fill.max() - fill.min() <= 1
    with pytest.raises(ValueError, match="the cache is full: 2000 of max_len=2000"):
        jaxcp.decode_step(model, cache, [1])


def test_decoding_deals_tokens_out(mesh_of):
    mesh_of(seq=8)
    model = Nothing()
    _, cache = jaxcp.prefill(model, model.init_cache(1, 100), ids(1, 5))
    for _ in range(20):
        _, cache = jaxcp.decode_step(model, cache, [1])
        fill = fills(cache)
    assert fill.max() - fill.min() <= 1


def test_bytes_per_device(mesh_of):
    mesh_of(seq=4, model=2)
    full = functools.partial(Full.empty, layers=3, num_kv_heads=2, head_dim=8)
    cache = empty_cache({"0:3": full}, batch_size=1, max_len=100, dtype=jnp.bfloat16)
    assert cache.bytes_per_device() == 3 * 2 * cache.slots * 1 * 8 * 2  # layers, K and V, ..., H


# Bad input


@pytest.fixture
def ready():
    model = Nothing()
    return model, model.init_cache(batch_size=2, max_len=20)


@pytest.mark.parametrize(
    "tokens, options, message",
    [
        (np.zeros((2, 0), int), {}, r"tokens must be \[2, T\] with at least one token; got \(2, 0"),
        (np.zeros((1, 4), int), {}, r"tokens must be \[2, T\]"),
        (np.zeros(4, int), {}, r"tokens must be \[2, T\]"),
        (np.zeros((2, 21), int), {}, r"21 tokens do not fit max_len=20 \(21 new ones\); shorten"),
        (np.full((2, 3), 64), {}, r"token ids must lie in 0\.\.63; got 64\.\.64"),
        (np.full((2, 3), -1), {}, r"token ids must lie in 0\.\.63; got -1"),
        (np.zeros((2, 4), int), {"lengths": [4, 5]}, r"lengths must be \[2\] in 1\.\.4; got \[4 5"),
        (np.zeros((2, 4), int), {"lengths": [0, 4]}, r"lengths must be \[2\] in 1\.\.4"),
        (np.zeros((2, 4), int), {"lengths": [4]}, r"lengths must be \[2\]"),
        (np.zeros((2, 4)), {}, "token ids must be integers; got float64"),
    ],
)
def test_what_prefill_refuses(tokens, options, message, ready):
    model, cache = ready
    with pytest.raises(ValueError, match=message):
        jaxcp.prefill(model, cache, tokens, **options)
    logits, _ = jaxcp.prefill(model, cache, ids(2, 4))  # the cache was not given away
    assert logits.argmax(-1).tolist() == ids(2, 4)[:, -1].tolist()


def test_what_decode_step_refuses(ready):
    model, cache = ready
    for token, message in (
        ([1], r"next_token must be \[2\], one a row; got \(1,\)"),
        ([[1], [1]], r"next_token must be \[2\]"),
        ([1, 64], r"token ids must lie in 0\.\.63; got 1\.\.64"),
        ([0.5, 1.0], "token ids must be integers; got float64"),
    ):
        with pytest.raises(ValueError, match=message):
            jaxcp.decode_step(model, cache, token)


def test_uneven_rows_take_no_slots_of_each_other():
    """Rows that grow in turns: each has room for `max_len`, and is full at the end."""
    model = Nothing()
    cache = model.init_cache(batch_size=2, max_len=100)
    _, cache = jaxcp.prefill(model, cache, ids(2, 90), lengths=[90, 1])
    _, cache = jaxcp.prefill(model, cache, ids(2, 70), lengths=[1, 70])
    while int(cache.lengths.max()) < 100:
        _, cache = jaxcp.decode_step(model, cache, [1, 2])
    assert cache.lengths.tolist() == [100, 80] and int(cache.fill[0]) == 100
    for grow, message in (
        (lambda: jaxcp.decode_step(model, cache, [1, 2]), "the cache is full: 100 of max_len=100"),
        (lambda: jaxcp.prefill(model, cache, ids(2, 2)), "102 tokens do not fit max_len=100"),
    ):
        with pytest.raises(ValueError, match=message):
            grow()


def test_what_logits_refuses():
    with pytest.raises(ValueError, match=r"tokens must be \[B, T\] with at least one token"):
        jaxcp.logits(Nothing(), np.zeros((1, 0), int))
    with pytest.raises(ValueError, match="token ids must lie in"):
        jaxcp.logits(Nothing(), [[64]])


def test_more_positions_than_the_model_has():
    model, _ = jaxcp.load(FIXTURES / "gpt2-tiny")
    limit = model.config.max_positions
    with pytest.raises(ValueError, match=f"the model has {limit} positions; got {limit + 1} tok"):
        jaxcp.logits(model, np.zeros((1, limit + 1), int))
    with pytest.raises(ValueError, match=f"the model has {limit} positions; got max_len"):
        model.init_cache(1, limit + 1)
    with pytest.raises(ValueError, match=rf"max_len must be in 1\.\.{limit} .*; got {limit + 1}"):
        jaxcp.Engine(model, None, max_len=limit + 1)
    with pytest.raises(ValueError, match="batch_size >= 1 and max_len >= 1; got 0 and 5"):
        model.init_cache(0, 5)
