# SPDX-License-Identifier: Apache-2.0
"""Requests over one pool: each has the answer that it has alone, and no page is lost."""

import functools
import math
import pathlib

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
            logits = np.asarray(jaxcp.logits(model, row))[:, len(ids) - 1]
            ids.append(int(drawn(sampler, logits, np.uint32(options.seed), len(ids) - 1)[0]))
    return ids[-count:]


@functools.partial(jax.jit, static_argnums=0)
def drawn(sampler, logits, seed, position):
    return sampler(logits, jax.random.fold_in(jax.random.key(seed), position))


def engine_of(name, model=None, **options):
    """An engine of one geometry, so that all of a model run the same programs."""
    model = jaxcp.load(FIXTURES / name)[0] if model is None else model
    options = {"max_len": WIDTH, "max_rows": 4, "stop_tokens": (), "max_wait": math.inf} | options
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
        assert result.finish_reason == "length"
        assert result.stats.computed + result.stats.reused == len(ids) + 4
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


def test_stop_tokens_end_an_answer_and_are_no_part_of_it(full):
    (ids,) = prompts(full.model, (12,), seed=5)
    answer = alone(FULL, ids, 6)
    stop = answer[3]
    (result,) = full.generate([ids], Sampling(max_new_tokens=6, stop_tokens=(stop,)))
    assert result.tokens == answer[: answer.index(stop)] and result.finish_reason == "stop"


@pytest.mark.parametrize("name", slow_but([FULL, WINDOWS], lambda name: name == FULL))
def test_a_stop_token_advances_no_state_though_the_next_step_is_under_way(name):
    """Beside a row that goes on; the next turn finds all of the answer, and a right state."""
    engine = engine_of(name)
    ids, other = prompts(engine.model, (40, 50), seed=3)
    answer = alone(name, ids, 8, Sampling(temperature=2.0))
    position = next(i for i in range(2, 8) if answer[i] not in answer[:i])
    options = Sampling(
        max_new_tokens=20, temperature=2.0, stop_tokens=(answer[position], 10**2, 10**2 + 1)
    )
    first, second = engine.add(ids, options), engine.add(other, Sampling(max_new_tokens=24))
    ended = []
    while not (first.done and second.done):
        ended += engine.step()
    assert ended == [first, second] and first.finish_reason == "stop"
    assert first.answer == answer[:position] and second.answer == alone(name, other, 24)
    turn = [*ids, *first.answer, 3, 4]
    (result,) = engine.generate([turn], Sampling(max_new_tokens=4))
    assert result.stats.reused == len(ids) + position
    assert result.tokens == alone(name, turn, 4)
    everything_is_given_back(engine)


def test_a_step_is_sent_before_the_one_before_is_read(full, monkeypatch):
    events = []
    run = full.runner.run

    def recorded(plan):
        events.append("send")
        tokens = run(plan)
        read = tokens.read
        tokens.read = lambda: events.append("read") or read()
        return tokens

    (ids,) = prompts(full.model, (20,))
    with monkeypatch.context() as patch:
        patch.setattr(full.runner, "run", recorded)
        full.generate([ids], Sampling(max_new_tokens=4))
    assert events == ["send", *["send", "read"] * 3, "read"]


def test_many_stop_tokens_are_refused(full):
    with pytest.raises(ValueError, match="at most 8 stop tokens; got 9"):
        full.add([1], Sampling(stop_tokens=range(9)))


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
    for _ in range(100):
        given = [histories[i] for i in rng.integers(0, 3, 5)[: rng.integers(4, 6)]]
        given = [[*ids, *rng.integers(0, 99, rng.integers(1, 60)).tolist()] for ids in given]
        options = Sampling(max_new_tokens=3, temperature=float(rng.random()), seed=1)
        engine.generate(given, options)
    assert len(costs.compiled) == warm
    assert len(engine.runner.sizes) + len(engine.geometry.row_sizes) + 2 <= 12


def test_a_row_that_decodes_waits_for_short_chunks_alone(monkeypatch):
    """Though a prompt alone comes as it fits."""
    engine = engine_of(FULL, max_wait=1e-9)
    run, counts = engine.runner.run, []
    monkeypatch.setattr(
        engine.runner,
        "run",
        lambda plans: counts.append([r.count for r in plans[0].rows]) or run(plans),
    )
    first, second = prompts(engine.model, (100, 50), seed=2)
    requests = [engine.add(first, Sampling(max_new_tokens=20))]
    engine.step(), engine.step()
    requests.append(engine.add(second, Sampling(max_new_tokens=4)))
    while not all(request.done for request in requests):
        engine.step()
    assert counts[0] == [100] and [c[1] for c in counts if len(c) == 2][:7] == [8] * 6 + [2]
    assert requests[0].answer == alone(FULL, first, 20)
    assert requests[1].answer == alone(FULL, second, 4)


@pytest.mark.parametrize("wait", [0, -1.0, "1", True, float("nan")])
def test_what_is_no_time_to_wait(wait):
    with pytest.raises(ValueError, match="max_wait must be positive seconds; got"):
        engine_of(FULL, max_wait=wait)


def test_what_cannot_be_is_refused(full):
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
    stranger = engine_of(FULL).request([1])
    with pytest.raises(ValueError, match="another engine's"):
        list(full.stream(stranger))
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
    for method in (full.result, lambda x: list(full.stream(x))):
        with pytest.raises(ValueError, match="what `add` gave; got int"):
            method(5)
    with pytest.raises(ValueError, match="list of prompts"):
        full.generate(5)
    with pytest.raises(ValueError, match=r"model must be a language model.*got tuple"):
        jaxcp.Engine((full.model, None), None, max_len=8)
    with pytest.raises(ValueError, match="cache_dtype must be one of"):
        engine_of(FULL, cache_dtype=["int8"])
    with pytest.raises(ValueError, match="regex must be text"):
        Sampling(regex=["a"])
    with pytest.raises(ValueError, match="max_new_tokens"):
        Sampling(max_new_tokens=0)
    with pytest.raises(ValueError, match="seed"):
        Sampling(seed=-1)
    with jax.set_mesh(jaxcp.make_mesh(seq=2, devices=jax.devices()[:2])):
        model, _ = jaxcp.load(FIXTURES / FULL)
    with pytest.raises(ValueError, match=r"mesh of 2 devices.*jax\.set_mesh"):
        jaxcp.Engine(model, None, max_len=8)


def test_a_prompt_that_never_fits_leaves_the_others_unqueued(full):
    with pytest.raises(ValueError, match=r"max_len=384.*ask for fewer"):
        full.generate([[1, 2], [1] * 500], Sampling(max_new_tokens=4))
    assert not full.scheduler.waiting and not full.scheduler.running
    everything_is_given_back(full)


def spoiled(token):
    """The model with an embedding of NaN for one token."""
    model, _ = jaxcp.load(FIXTURES / FULL)
    model.embed[...] = model.embed[...].at[token].set(np.nan)
    return model


def taken(engine, left):
    """Pages that nobody else gets: of the pool so many are left, which requests share in turn."""
    pages = engine.scheduler.pages
    return [pages.take(0) for _ in range(pages.pools[0].free - left)]


def given_back(engine, spare):
    for page in spare:
        engine.scheduler.pages.release(page)


def test_a_request_without_finite_logits_fails_alone():
    """And what it wrote into the pool reaches nobody who has its pages afterwards."""
    engine = engine_of(FULL, spoiled(7))
    spare = taken(engine, left=3)
    ids = [[i for i in row if i != 7] for row in prompts(engine.model, (40, 30))]
    good, bad = (
        engine.add(ids[0], Sampling(max_new_tokens=4)),
        engine.add([*ids[1], 7, 3], Sampling(max_new_tokens=4)),
    )
    while not (good.done and bad.done):
        engine.step()
    assert good.answer == alone(FULL, ids[0], 4)
    assert bad.status is Status.FAILED and engine.result(bad).finish_reason == "failed"
    assert bad.answer == [] and "not finite" in str(bad.error)
    for row in ids:
        (result,) = engine.generate([row], Sampling(max_new_tokens=4, temperature=0.9))
        assert result.tokens == alone(FULL, row, 4, Sampling(temperature=0.9))
    with pytest.raises(FloatingPointError, match="not finite"):
        engine.generate([ids[0], [7]], Sampling(max_new_tokens=4, temperature=0.9))
    given_back(engine, spare)
    everything_is_given_back(engine)


def test_a_request_that_leaves_before_its_nan_is_read_spoils_nobody():
    """Whose pages hold it: a step is under way when it is cancelled, or a chunk of its prompt."""
    engine = engine_of(FULL, spoiled(7), max_wait=1e-9)
    spare = taken(engine, left=5)
    ids = [[i for i in row if i != 7] for row in prompts(engine.model, (40, 30))]
    for row in ids:
        bad = engine.add([7] * 60, Sampling(max_new_tokens=4))
        engine.step()
        engine.cancel(bad)
        (result,) = engine.generate([row], Sampling(max_new_tokens=4))
        assert result.tokens == alone(FULL, row, 4)
    beside = engine.add(ids[0], Sampling(max_new_tokens=12))
    engine.step(), engine.step()
    bad = engine.add([7] * 30, Sampling(max_new_tokens=4))
    while not bad.done:
        engine.step()
    assert "after 8 tokens are not finite" in str(bad.error) and bad.answer == []
    while not beside.done:
        engine.step()
    assert beside.answer == alone(FULL, ids[0], 12)
    given_back(engine, spare)
    everything_is_given_back(engine)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_session_without_finite_logits_says_so(temperature):
    session = engine_of(FULL, spoiled(7)).session()
    with pytest.raises(FloatingPointError, match="after 3 tokens are not finite"):
        list(session.send([1, 7, 2], max_new_tokens=2, temperature=temperature))
    assert session.tokens == [] and list(session.send([1, 2], max_new_tokens=2))


@pytest.mark.slow
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
        session = jaxcp.Engine(model, None, max_len=96, max_rows=2).session()
        assert result.tokens == list(session.send(ids, max_new_tokens=5))
