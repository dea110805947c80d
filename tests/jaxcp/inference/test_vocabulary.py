# SPDX-License-Identifier: Apache-2.0
"""A vocabulary in parts: no device has the whole head, and every answer stays the same."""

import pathlib

import jax
import numpy as np
import pytest
from slow import slow_but

import jaxcp
from jaxcp.inference.sampling import Sampling

FIXTURES = pathlib.Path(__file__).parents[2] / "fixtures"
CASES = [
    ("qwen3-moe-tiny", "seq", {"seq": 4}),
    ("qwen3-moe-tiny", "model", {"seq": 2, "model": 2}),
    ("qwen3-moe-tiny", "data", {"data": 2, "seq": 2}),
    ("gpt2-tiny", "seq", {"seq": 2}),
    ("deepseek-v3-tiny", "seq", {"seq": 2}),
]  # fmt: skip


def answers(name, rules, axes):
    """Answers to a plain prompt, a longer one, and one drawn under penalties; the logits of a text;
    and the shape of the head, or of the table that is one, on a device."""
    with jax.set_mesh(jaxcp.make_mesh(**axes)):
        model, _ = jaxcp.load(FIXTURES / name, rules=rules)
        engine = jaxcp.Engine(model, None, max_len=64, max_rows=4, stop_tokens=())
        drawn = Sampling(
            max_new_tokens=4, temperature=1.0, seed=3, logprobs=2, repetition_penalty=1.3
        )
        results = [
            *engine.generate([[5, 6, 7], list(range(1, 50))], Sampling(max_new_tokens=4)),
            *engine.generate([[5, 6, 7]], drawn),
        ]
        logits = jaxcp.logits(model, np.tile(np.arange(40), (2, 1)))
        head = getattr(model, "lm_head", model.embed)
        return results, np.asarray(logits), head.get_value().sharding.shard_shape(head.shape)


@pytest.mark.parametrize(("name", "axis", "axes"), slow_but(CASES, lambda case: case == CASES[0]))
def test_it_answers_as_when_every_device_has_all(name, axis, axes):
    whole, logits, shape = answers(name, jaxcp.Rules(), axes)
    parts, of_parts, part = answers(name, jaxcp.Rules(vocab=axis), axes)
    assert np.prod(part) * axes[axis] == np.prod(shape)
    np.testing.assert_allclose(of_parts, logits, atol=1e-5)
    for one, other in zip(whole, parts, strict=True):
        assert one.tokens == other.tokens
        for mine, theirs in zip(one.logprobs or (), other.logprobs or (), strict=True):
            assert abs(mine.logprob - theirs.logprob) < 1e-4
