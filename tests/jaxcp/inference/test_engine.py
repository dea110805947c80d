# SPDX-License-Identifier: Apache-2.0
"""Requests over one pool: each has the answer that it has alone, and no page is lost."""

import contextlib
import functools
import pathlib
import signal

import costs
import jax
import numpy as np
import pytest
from flax import nnx
from slow import slow_but

import jaxcp
from jaxcp.inference.request import Status
from jaxcp.inference.sampling import Sampler, Sampling
from jaxcp.models.hybrid_moe.config import NGramConfig

FIXTURES = pathlib.Path(__file__).parents[2] / "fixtures"
FULL, WINDOWS, LATENTS, SELECTED = (
    f"{name}-tiny" for name in ("qwen3-moe", "gpt-oss", "deepseek-v3", "deepseek-v32")
)
LONG, WIDTH = 300, 384
"""A prompt that is sharded, and pads for `alone`, which so compiles one program."""


@functools.cache
def model_alone(name):
    with jax.set_mesh(jaxcp.make_mesh(devices=jax.devices()[:1])):
        return jaxcp.load(FIXTURES / name)[0]


def prompts(model, lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, model.config.vocab_size, n).tolist() for n in lengths]


def alone(name, ids, count, options=None):
    """The answer by one pass over the whole sequence for each token, and the rule of `Sampling`."""
    model, ids = model_alone(name), list(ids)
    options = Sampling() if options is None else options
    sampler = Sampler(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    for _ in range(count):
        row = np.pad(ids, (0, WIDTH - len(ids)))[None]
        with jax.set_mesh(jaxcp.make_mesh(devices=jax.devices()[:1])):
            logits = jaxcp.logits(model, row)[:, len(ids) - 1]
            key = jax.random.fold_in(jax.random.key(options.seed), len(ids) - 1)
            ids.append(int(sampler(logits, key)[0]))
    return ids[-count:]


def engine_of(name, **options):
    model, _ = jaxcp.load(FIXTURES / name)
    options = {"max_len": WIDTH, "max_rows": 4, "stop_tokens": ()} | options
    return jaxcp.Engine(model, None, **options)


def everything_is_given_back(engine):
    engine.scheduler.check()
    pools = [*engine.scheduler.pages.pools, engine.scheduler.pages.states]
    assert all(pool.held == 0 for pool in pools)


@pytest.mark.parametrize(
    ("name", "axes"),
    slow_but(
        [
            (FULL, {}),
            (WINDOWS, {"seq": 3}),
            (LATENTS, {"seq": 2, "model": 2}),
            (SELECTED, {}),
            (FULL, {"seq": 8}),
            (WINDOWS, {}),
        ],
        lambda case: case == (WINDOWS, {"seq": 3}),
    ),
)
def test_a_batch_answers_as_each_prompt_does_alone(name, axes, mesh_of):
    """Six prompts at once in four rows, among them one token and one that is sharded."""
    if axes:
        mesh_of(**axes)
    engine = engine_of(name)
    given = prompts(engine.model, (5, 70, 1, LONG, 33, 150))
    results = engine.generate(given, Sampling(max_new_tokens=5))
    for ids, result in zip(given, results, strict=True):
        assert result.tokens == alone(name, ids, 5)
        assert result.finish_reason == "length" and result.stats.computed == len(ids) + 4
    everything_is_given_back(engine)


@pytest.fixture(scope="module")
def full():
    return engine_of(FULL)


def test_a_token_is_drawn_by_its_seed_and_position(full):
    """Whatever else is in the batch, and whatever that is sampled by."""
    options = [
        Sampling(max_new_tokens=6, temperature=0.8, seed=3),
        Sampling(max_new_tokens=6, temperature=1.5, top_k=5, seed=2**32 - 1),
        Sampling(max_new_tokens=6),
        Sampling(max_new_tokens=6, temperature=1.0, top_p=0.7),
    ]
    given = prompts(full.model, (9, 9, 40, 3), seed=1)
    requests = [full.add(*pair) for pair in zip(given, options, strict=True)]
    while not all(request.done for request in requests):
        full.step()
    for ids, option, request in zip(given, options, requests, strict=True):
        assert request.answer == alone(FULL, ids, 6, option)
    (again,) = full.generate(given[:1], options[0])
    assert again.tokens == requests[0].answer
    everything_is_given_back(full)


def test_a_next_turn_and_a_fork_compute_what_is_new(full):
    (ids,) = prompts(full.model, (50,), seed=2)
    (first,) = full.generate([ids], Sampling(max_new_tokens=7))
    turns = [[*ids, *first.tokens, 1, 2, 3], [*ids, *first.tokens, 4], [*ids[:20], 7]]
    results = full.generate(turns, Sampling(max_new_tokens=3))
    for turn, result in zip(turns, results, strict=True):
        assert result.tokens == alone(FULL, turn, 3)
    # the last token of an answer is not computed; of an edited history the common part is kept
    assert [result.stats.reused for result in results] == [50 + 7 - 1, 50 + 7 - 1, 20]
    everything_is_given_back(full)


def test_windows_are_found_again_at_the_end_of_a_turn():
    engine = engine_of(WINDOWS)
    (ids,) = prompts(engine.model, (60,))
    (first,) = engine.generate([ids], Sampling(max_new_tokens=4))
    turn = [*ids, *first.tokens, 5, 6]
    (second,) = engine.generate([turn], Sampling(max_new_tokens=4))
    assert second.tokens == alone(WINDOWS, turn, 4)
    assert second.stats.reused == 60 + 4 - 1
    everything_is_given_back(engine)


def test_who_loses_its_pages_answers_the_same():
    """Two of three fit at a time, and more are let in: the youngest computes anew."""
    engine = engine_of(FULL, max_len=160, pool_tokens=256)
    engine.scheduler.limits = jaxcp.inference.scheduler.Limits(
        max_rows=4, max_len=160, chunks=engine.scheduler.limits.chunks, overcommit=3.0
    )
    given = prompts(engine.model, (90, 90, 60), seed=4)
    results = engine.generate(given, Sampling(max_new_tokens=40))
    for ids, result in zip(given, results, strict=True):
        assert result.tokens == alone(FULL, ids, 40)
    assert sum(result.stats.preempted for result in results) >= 1
    everything_is_given_back(engine)


def test_stop_tokens_end_an_answer_and_are_no_part_of_it(full):
    (ids,) = prompts(full.model, (12,), seed=5)
    answer = alone(FULL, ids, 6)
    stop = answer[3]
    (result,) = full.generate([ids], Sampling(max_new_tokens=6, stop_tokens=(stop,)))
    assert result.tokens == answer[: answer.index(stop)] and result.finish_reason == "stop"


def test_a_cancelled_request_and_a_step_that_raises_give_everything_back(full, monkeypatch):
    first, second, third = prompts(full.model, (70, 30, 20), seed=6)
    running, waiting = full.add(first), full.add(second)
    full.step()
    full.cancel(running)
    full.cancel(running)
    assert running.status is Status.CANCELLED
    with monkeypatch.context() as patch:
        patch.setattr(full.runner, "run", lambda plan: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            full.step()
    assert waiting.status is Status.FAILED and isinstance(waiting.error, ZeroDivisionError)
    (result,) = full.generate([third], Sampling(max_new_tokens=3))
    assert result.tokens == alone(FULL, third, 3)
    everything_is_given_back(full)


@pytest.mark.slow
def test_after_warming_up_nothing_is_compiled():
    engine = engine_of(WINDOWS, max_len=2000)
    engine.warm_up()
    rng = np.random.default_rng(0)
    histories = prompts(engine.model, (3, 100, 700))
    warm = len(costs.compiled)
    for _ in range(12):
        given = [histories[i] for i in rng.integers(0, 3, rng.integers(1, 6))]
        given = [[*ids, *rng.integers(0, 99, rng.integers(1, 60)).tolist()] for ids in given]
        options = Sampling(max_new_tokens=3, temperature=float(rng.random()), seed=1)
        engine.generate(given, options)
    assert len(costs.compiled) == warm
    assert len(engine.runner.sizes) + 2 <= 12


def test_what_cannot_be_is_refused(full, mesh_of):
    with pytest.raises(ValueError, match=r"max_len=384.*ask for fewer"):
        full.add([1] * 300, Sampling(max_new_tokens=200))
    with pytest.raises(ValueError, match="the prompt is empty"):
        full.add([])
    with pytest.raises(ValueError, match="no tokenizer"):
        full.add("text")
    with pytest.raises(ValueError, match="token ids must lie in"):
        full.add([10**6])
    with pytest.raises(ValueError, match=r"must be a jaxcp\.Sampling; got dict"):
        full.add([1], {"max_new_tokens": 3})
    with pytest.raises(ValueError, match="list of prompts"):
        full.generate("text")
    with pytest.raises(ValueError, match="one sequence of ids"):
        full.add(5)
    for ids in (b"abc", {5: 1}, [1.0], [[1], [2]]):
        with pytest.raises(ValueError, match=r"token ids must be|one sequence of ids"):
            full.add(ids)
    with pytest.raises(ValueError, match="not added here"):
        full.cancel(engine_of(FULL).add([1]))
    with pytest.raises(ValueError, match="what `add` gave"):
        full.cancel(None)
    with pytest.raises(ValueError, match="max_new_tokens"):
        Sampling(max_new_tokens=0)
    with pytest.raises(ValueError, match="seed"):
        Sampling(seed=-1)
    with pytest.raises(NotImplementedError, match=r"compressed blocks.*engine\.session"):
        engine_of("deepseek-v4-tiny").add([1])
    with jax.set_mesh(jaxcp.make_mesh(seq=2, devices=jax.devices()[:2])):
        model, _ = jaxcp.load(FIXTURES / FULL)
    with pytest.raises(ValueError, match=r"mesh of 2 devices.*jax\.set_mesh"):
        jaxcp.Engine(model, None, max_len=8)
    mesh_of(data=2, seq=2)
    with pytest.raises(NotImplementedError, match="data=2"):
        engine_of(FULL).add([1])


def test_a_prompt_that_never_fits_leaves_the_others_unqueued(full):
    with pytest.raises(ValueError, match=r"max_len=384.*ask for fewer"):
        full.generate([[1, 2], [1] * 500], Sampling(max_new_tokens=4))
    assert not full.scheduler.waiting and not full.scheduler.running
    everything_is_given_back(full)


def test_an_interrupt_at_any_moment_leaves_nothing_half_done(full):
    """SIGINT from a timer, many times: inside a step, the scheduler, and what cleans up."""
    given = prompts(full.model, (30, 40, 20), seed=8)
    expected = [alone(FULL, ids, 4) for ids in given]
    rng, interrupted = np.random.default_rng(0), 0
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        for _ in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, 0.1), 0.003)
                full.generate(given, Sampling(max_new_tokens=4))
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                while signal.getitimer(signal.ITIMER_REAL)[0]:
                    with contextlib.suppress(KeyboardInterrupt):
                        signal.setitimer(signal.ITIMER_REAL, 0)
            everything_is_given_back(full)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 5
    results = full.generate(given, Sampling(max_new_tokens=4))
    assert [result.tokens for result in results] == expected


def test_embeddings_that_see_tokens_before():
    config = jaxcp.HybridMoEConfig(
        vocab_size=64, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=8,
        mlp_dim=16, moe_dim=8, num_experts=4, num_experts_per_tok=2, layer_pattern="LN", window=9,
        ngram=NGramConfig(width=3, dim=4),
    )  # fmt: skip
    model = jaxcp.HybridMoE(config, rngs=nnx.Rngs(0))
    engine = jaxcp.Engine(model, None, max_len=96, max_rows=2)
    given = prompts(model, (40, 1, 2))
    for ids, result in zip(given, engine.generate(given, Sampling(max_new_tokens=5)), strict=True):
        session = jaxcp.Engine(model, None, max_len=96).session()
        assert result.tokens == list(session.send(ids, max_new_tokens=5))
