# SPDX-License-Identifier: Apache-2.0
"""Routers choose and weigh as their papers say, computed one token at a time in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcp.layers.routing import SCORES, Routing


def one_token(logits, bias, k, routing):
    """Chosen experts, best first, and their weights, by sorting."""
    score = {
        "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
        "softmax": lambda x: np.exp(x) / np.exp(x).sum(),
        "sqrt_softplus": lambda x: np.log1p(np.exp(x)) ** 0.5,
    }[routing.scores](logits)
    wanted, experts = score + bias, list(range(len(logits)))
    size = len(experts) // routing.num_groups
    groups = [experts[i : i + size] for i in range(0, len(experts), size)]
    if routing.num_groups > 1:
        best = [sorted(wanted[g])[-1] + sorted(wanted[g])[-2] for g in groups]
        kept = sorted(range(len(groups)), key=lambda g: -best[g])[: routing.top_groups]
        experts = [e for g in kept for e in groups[g]]
    chosen = sorted(experts, key=lambda e: -wanted[e])[:k]
    weights = score[chosen] / (score[chosen].sum() if routing.normalise else 1)
    return chosen, weights * routing.scale


@pytest.mark.parametrize(
    "routing",
    [
        Routing(scale=2.826),
        Routing(scores="softmax", normalise=False),
        Routing(scores="softmax"),
        Routing(scores="sqrt_softplus", scale=1.5),
        Routing(num_groups=4, top_groups=2, scale=2.5),
    ],
    ids=["hy3", "qwen3 without norm", "qwen3", "deepseek-v4", "deepseek-v3"],
)
def test_one_token_at_a_time(routing):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, 12)).astype(np.float32)
    bias = rng.normal(scale=0.3, size=12).astype(np.float32)
    scores = SCORES[routing.scores](jnp.asarray(logits))
    chosen = routing.select(scores, 3, jnp.asarray(bias))
    weights = routing.weigh(scores, chosen)
    for token in range(50):
        experts, expected = one_token(logits[token].astype(float), bias, 3, routing)
        assert chosen[token].tolist() == experts
        np.testing.assert_allclose(weights[token], expected, rtol=1e-5)


def test_softmax_over_the_chosen_is_softmax_normalised():
    """gpt-oss: top-k of the logits, then softmax over those."""
    logits = np.random.default_rng(1).normal(scale=20, size=(50, 12)).astype(np.float32)
    routing = Routing(scores="softmax", selection_bias=False)
    scores = SCORES["softmax"](jnp.asarray(logits))
    chosen = routing.select(scores, 4)
    top = -np.sort(-logits.astype(float), axis=1)[:, :4]
    expected = np.exp(top - top[:, :1]) / np.exp(top - top[:, :1]).sum(1, keepdims=True)
    np.testing.assert_allclose(routing.weigh(scores, chosen), expected, rtol=1e-5, atol=1e-30)


def test_a_closed_group_is_not_chosen_where_open_scores_are_negative():
    """A selection bias below zero: masking with zero would open what is closed."""
    scores = jnp.asarray([[0.9, 0.8, 0.2, 0.1]])
    routing = Routing(num_groups=2)
    assert routing.select(scores, 2, jnp.asarray([-5.0, -5, -9, -9])).tolist() == [[0, 1]]


def test_equal_scores_go_to_the_lower_index():
    assert Routing().select(jnp.ones((1, 5)), 3).tolist() == [[0, 1, 2]]


def test_routing_that_makes_no_sense():
    with pytest.raises(ValueError, match=r"scores must be one of .*; got 'relu'"):
        Routing(scores="relu")
    with pytest.raises(ValueError, match=r"1 <= top_groups <= num_groups; got 3 of 2"):
        Routing(num_groups=2, top_groups=3)
    with pytest.raises(ValueError, match="got 1 of 4 groups, 12 experts, k=4"):
        Routing(num_groups=4).select(jnp.ones((1, 12)), 4)
