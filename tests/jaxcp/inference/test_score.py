# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of a prompt's tokens, and answers for coroutines."""

import asyncio
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from slow import slow_but

import jaxcp
from jaxcp.inference.sampling import Sampling

FIXTURES = pathlib.Path(__file__).parents[2] / "fixtures"
FULL, WINDOWS = "qwen3-moe-tiny", "gpt-oss-tiny"
CASES = [
    (FULL, {}, None),
    (WINDOWS, {"seq": 3}, None),
    (FULL, {"data": 2, "seq": 2}, jaxcp.Ulysses()),
    (FULL, {"seq": 2, "model": 2}, jaxcp.AllGather()),
    ("deepseek-v32-tiny", {"seq": 2}, None),
    ("qwen3-next-tiny", {"seq": 2}, None),
    ("kimi-linear-tiny", {"data": 2, "seq": 3}, None),
]


def engine_of(name, **options):
    return jaxcp.Engine(
        jaxcp.load(FIXTURES / name)[0], None, max_len=128, stop_tokens=(), **options
    )


@pytest.fixture(scope="module")
def full():
    return engine_of(FULL)


def by_logits(engine, ids):
    """Log-probabilities `[T - 1, V]`, in float64."""
    rows = [ids] * (2 if engine.on_mesh and engine.geometry.groups == 2 else 1)
    logits = np.asarray(jaxcp.logits(engine.model, np.asarray(rows, np.int32))[0], np.float64)
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[:-1]


@pytest.mark.parametrize(
    ("name", "axes", "strategy"), slow_but(CASES, lambda case: case[1] in ({}, {"seq": 3}))
)
def test_a_prompt_has_the_log_probabilities_of_its_logits(name, axes, strategy, mesh_of):
    if axes:
        mesh_of(**axes)
    engine = engine_of(name, strategy=strategy)
    # products of recurrent layers multiply the rounding of what comes in
    bound = 1e-4 if name in ("qwen3-next-tiny", "kimi-linear-tiny") else 2e-5
    for length in (2, 70):
        ids = np.random.default_rng(length).integers(0, 128, length).tolist()
        expected, found = by_logits(engine, ids), engine.score(ids, best=3)
        assert [one.token for one in found] == ids[1:]
        chosen = [row[token] for row, token in zip(expected, ids[1:], strict=True)]
        np.testing.assert_allclose([one.logprob for one in found], chosen, atol=bound)
        best = np.sort(expected, axis=-1)[:, :-4:-1]
        np.testing.assert_allclose([[x for _, x in one.best] for one in found], best, atol=bound)
        for row, one in zip(expected, found, strict=True):
            assert all(abs(row[token] - value) < bound for token, value in one.best)


def test_one_token_has_none_and_what_cannot_be_is_refused(full):
    assert full.score([5]) == []
    assert full.score([5, 6])[0].best == ()
    for ids, best, said in [
        ([], 0, "empty"), ([5] * 129, 0, "1..128"), ([5, 10**6], 0, "token ids"), ([5], 21, "best"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            full.score(ids, best=best)


def test_what_is_not_finite_raises():
    engine = engine_of(FULL)
    engine.model.lm_head[...] = jnp.full_like(engine.model.lm_head[...], jnp.nan)
    with pytest.raises(FloatingPointError, match="NaN"):
        engine.score([1, 2, 3])


def test_coroutines_share_steps(full, monkeypatch):
    """Three answers at once have the tokens of each alone, and take hardly more steps than one."""
    prompts, sampling = [[1, 2, 3], [9] * 20, [7]], Sampling(max_new_tokens=12)
    expected = [full.generate([ids], sampling)[0].tokens for ids in prompts]
    step, steps = full.loop.step, []
    monkeypatch.setattr(full.loop, "step", lambda: steps.append(1) or step())

    async def answer(ids):
        return [token async for token in full.astream(full.request(ids, sampling))]

    async def all_of_them():
        return await asyncio.gather(*map(answer, prompts))

    assert asyncio.run(all_of_them()) == expected
    assert len(steps) < 2 * 12


def test_a_coroutine_that_leaves_cancels_its_request_alone(full):
    sampling = Sampling(max_new_tokens=100)
    requests = [full.request([1, 2, i], sampling) for i in range(3)]

    async def some(request, count):
        stream = full.astream(request)
        tokens = [await anext(stream) for _ in range(count)]
        await stream.aclose()
        return tokens

    async def all_of_them():
        task = asyncio.create_task(some(requests[2], 100))
        found = await asyncio.gather(some(requests[0], 3), some(requests[1], 100))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return found

    three, whole = asyncio.run(all_of_them())
    assert three == requests[0].answer[:3] and len(requests[0].answer) < 100
    assert whole == full.generate([[1, 2, 1]], sampling)[0].tokens
    assert all(request.done for request in requests)
    full.scheduler.check()
    assert all(pool.held == 0 for pool in full.scheduler.pages.pools)


def test_an_error_reaches_the_coroutine(full, monkeypatch):
    def broken(*args):
        raise RuntimeError("out of luck")

    async def answer():
        return [
            token async for token in full.astream(full.request([4, 4], Sampling(max_new_tokens=2)))
        ]

    monkeypatch.setattr(full.runner, "run", broken)
    with pytest.raises(RuntimeError, match="out of luck"):
        asyncio.run(answer())
    monkeypatch.undo()
    full.scheduler.check()
    with pytest.raises(ValueError, match="another engine's"):
        full.astream(engine_of(FULL).request([1], Sampling(max_new_tokens=2)))
