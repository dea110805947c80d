# SPDX-License-Identifier: Apache-2.0
"""Samplers draw from the distribution they say, and only from what top-k and top-p leave."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcp.inference.sampling import Sampler

V, DRAWS = 8, 4000
draw = jax.jit(lambda logits, key, sampler: sampler(logits, key), static_argnums=2)
LOGITS = np.random.default_rng(0).normal(size=V).astype(np.float32) * 2


def distribution(logits, temperature, top_k, top_p, min_p=0.0):
    """The definition: sort, keep k, the fewest whose probability reaches p, and the likely ones."""
    order = np.argsort(-logits, kind="stable")
    p = np.exp((logits - logits.max()).astype(np.float64) / temperature)[order]
    p[V if top_k is None else top_k :] = 0
    p /= p.sum()
    p[np.cumsum(p) - p >= top_p] = 0
    p[p < min_p * p.max()] = 0
    return (p / p.sum())[np.argsort(order)]


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(temperature=1.0),
        Sampler(temperature=0.5, top_k=3),
        Sampler(temperature=1.5, top_p=0.7),
        Sampler(temperature=1.0, top_k=5, top_p=0.8),
        Sampler(temperature=2.0, min_p=0.2),
        Sampler(temperature=1.5, top_k=6, top_p=0.95, min_p=0.1),
    ],
    ids=str,
)
def test_frequencies(sampler):
    tokens = draw(np.tile(LOGITS, (DRAWS, 1)), jax.random.key(0), sampler)
    assert tokens.dtype == np.int32
    found = np.bincount(tokens, minlength=V) / DRAWS
    cuts = sampler.top_k, sampler.top_p, sampler.min_p
    expected = distribution(LOGITS, sampler.temperature, *cuts)
    assert (found[expected == 0] == 0).all()
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / DRAWS**0.5)


@settings(max_examples=20)
@given(seed=st.integers(0, 999), top_p=st.sampled_from([0.05, 0.5, 0.9]))
def test_only_from_the_nucleus(seed, top_p):
    logits = np.random.default_rng(seed).normal(size=(4, V)).astype(np.float32) * 3
    tokens = draw(logits, jax.random.key(seed), Sampler(temperature=1.0, top_p=top_p))
    for row, token in zip(logits, tokens, strict=True):
        assert distribution(row, 1.0, V, top_p)[token] > 0


def test_greedy_and_what_equals_it():
    logits = np.random.default_rng(1).normal(size=(5, V)).astype(np.float32)
    best = logits.argmax(-1)
    for sampler in (
        Sampler(),
        Sampler(temperature=9.0, top_k=1),
        Sampler(temperature=1, top_p=1e-6),
        Sampler(temperature=9.0, min_p=1.0),
    ):
        np.testing.assert_array_equal(draw(logits, jax.random.key(0), sampler), best)


def test_a_seed_is_a_result():
    logits = np.tile(LOGITS, (64, 1))
    hot = Sampler(temperature=2.0)
    first, again = (draw(logits, jax.random.key(3), hot) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (first != draw(logits, jax.random.key(4), hot)).any()


def test_top_k_beyond_the_vocabulary():
    logits = np.tile(LOGITS, (64, 1))
    key = jax.random.key(0)
    every = draw(logits, key, Sampler(temperature=1.0))
    np.testing.assert_array_equal(draw(logits, key, Sampler(temperature=1.0, top_k=99)), every)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"temperature": -1}, "temperature must be >= 0"),
        ({"top_k": 0}, "top_k must be at least 1 or None; got 0"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\]; got 0"),
        ({"top_p": 1.5}, "got 1.5"),
    ],
)
def test_bad_options(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**fields)
