# SPDX-License-Identifier: Apache-2.0
"""Every option of sampling: at its ends, where logits tie, and on every mesh."""

import math

import chex
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxcp.inference.sampling import Sampler, sample

DRAWS, V = 3000, 64
draw = jax.jit(sample)


def support(logits, **options):
    """The ids that are ever drawn, each of which has a probability of 1 % or more."""
    logits = np.pad(np.float32(logits), (0, V - len(logits)), constant_values=-np.inf)
    rows = np.tile(logits, (DRAWS, 1))
    options = {"temperature": 1.0} | options
    return np.unique(draw(rows, jax.random.key(0), Sampler(**options).options())).tolist()


def test_of_tokens_that_tie_the_first():
    """As many as TopPLogitsWarper of transformers leaves, and exactly `top_k`."""
    even, peak = [0.0] * 8, [3.0] + [0.0] * 50
    for logits, options, kept in (
        (even, {"top_p": 0.5}, 4),
        (peak, {"top_p": 0.5}, 16),
        (peak, {"top_p": 0.35}, 6),
        (peak, {"top_p": 0.28}, 1),
        (even, {"top_k": 3}, 3),
        (even, {"top_k": 4, "top_p": 0.5}, 2),  # of what top_k leaves
    ):
        assert support(logits, **options) == list(range(kept)), options
    # the largest is not the first, and zeros of both signs tie
    assert support([0.0, 5.0, -0.0, 0.0, 5.0, 0.0], top_k=4) == [0, 1, 2, 4]


def test_extreme_options():
    row = [1.0, 5.0, 3.0]
    for temperature in (1e-12, 1e-38, 1e-39, 1e-45, 1e-300):
        assert support(row, temperature=temperature) == [1], temperature
        assert support([5.0, 5.0, 3.0], temperature=temperature) == [0, 1], temperature
    for temperature in (1e38, 1e300):  # even, but for what the model rules out
        assert support([*row, -np.inf], temperature=temperature) == [0, 1, 2], temperature
    for top_p in (1e-6, 1e-46, 1e-300):
        assert support(row, top_p=top_p) == [1], top_p
    for min_p in (1, 1 - 1e-12):
        assert support([5.0, 5.0, 3.0], min_p=min_p) == [0, 1], min_p
    assert support(row, min_p=math.exp(-2.1)) == [1, 2]
    for options in ({"top_k": 2**40}, {"top_k": np.int64(64)}, {"top_p": 1}, {"top_p": 1 - 1e-12},
                    {"min_p": 0}, {"min_p": 1e-300}):  # fmt: skip
        assert support(row, **options) == [0, 1, 2], options
    assert Sampler(temperature=-0.0).options() is None


def test_options_are_data():
    """Two programs for whatever options: the greedy one and the other."""
    draw = jax.jit(chex.assert_max_traces(sample, n=2))
    logits = np.zeros((2, V), np.float32)
    for options in ({}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 9}, {"temperature": 1,
                    "top_p": 0.3}, {"top_k": 3}, {"temperature": 1, "min_p": 0.1}):  # fmt: skip
        tokens = draw(logits, jax.random.key(0), Sampler(**options).options())
        chex.assert_shape(tokens, (2,))
        chex.assert_type(tokens, np.int32)


@pytest.mark.parametrize("axes", [{}, {"seq": 2}, {"data": 2, "model": 2}], ids=str)
@pytest.mark.parametrize("vocab", ["model", None])
def test_the_same_tokens_on_every_mesh(axes, vocab, mesh_of):
    rows = axes.get("data", 1)
    logits = np.random.default_rng(0).normal(size=(rows, V)).astype(np.float32)
    every = [
        Sampler(**options).options()
        for options in ({}, {"temperature": 2.0}, {"temperature": 2.0, "top_k": 5},
                        {"temperature": 2.0, "top_p": 0.9}, {"temperature": 2.0, "min_p": 0.1})
    ]  # fmt: skip
    key = jax.random.key(1)
    expected = [np.asarray(draw(logits, key, options)) for options in every]
    assert len({tuple(x) for x in expected}) > 1
    mesh_of(**axes)
    placed = jax.device_put(logits, P("data", vocab))
    for options, tokens in zip(every, expected, strict=True):
        np.testing.assert_array_equal(draw(placed, key, options), tokens)


@pytest.mark.parametrize(
    "field, values",
    [
        ("temperature", [math.nan, math.inf, -math.inf, -1e-9, "1", None, True, [1.0]]),
        ("top_k", [0, -1, 2.0, math.nan, "5", True, [1]]),
        ("top_p", [0, -0.1, 1.0001, math.nan, math.inf, "0.5", None, True]),
    ],
)
def test_what_is_no_option(field, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"{field} must be .*; got "):
            Sampler(**{field: value})
