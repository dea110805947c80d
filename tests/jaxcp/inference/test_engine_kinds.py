# SPDX-License-Identifier: Apache-2.0
"""Histories that grow, branch, come in chunks and lose their pages, over every kind of cache."""

import dataclasses
import functools
import math
import pathlib

import jax
import numpy as np
import pytest
from slow import slow_but

import jaxcp
from benchmarks.cache_formats import pool_logits
from jaxcp.inference.geometry import SHORT
from jaxcp.inference.sampling import Sampling
from jaxcp.layers.stack import Layers

FIXTURES = pathlib.Path(__file__).parents[2] / "fixtures"
KINDS = {
    "full": ("qwen3-moe-tiny", slice(None)),
    "windows": ("gpt-oss-tiny", slice(None)),
    "latents": ("deepseek-v3-tiny", slice(None)),
    "blocks": ("deepseek-v4-tiny", slice(1, 3)),  # all of them, and selected ones; with windows
    "full, int8": ("qwen3-moe-tiny", slice(None)),
    "full, float8_e4m3fn": ("qwen3-moe-tiny", slice(None)),
    "windows, int8": ("gpt-oss-tiny", slice(None)),
}
"""A checkpoint, and which of its layers; behind a comma how pages keep keys and values."""
WITH_STATE = ("windows", "blocks", "windows, int8")
"""Kinds whose known texts end at a snapshot, not anywhere."""
WIDTH = 256
"""Tokens of a request and of its pass alone; the pool has room for four."""
CASES = [
    ("full", {}),
    ("windows", {}),
    ("windows", {"seq": 3}),
    ("latents", {"seq": 8}),
    ("blocks", {}),
    ("blocks", {"seq": 3}),
    ("full, int8", {"seq": 3}),
    ("full, float8_e4m3fn", {}),
    ("windows, int8", {"seq": 2, "model": 2}),
]


def load(name):
    fixture, layers = KINDS[name]
    model, _ = jaxcp.load(FIXTURES / fixture)
    if layers != slice(None):
        model.layers = Layers(model.layers[layers])
    return model


@functools.cache
def model_alone(name):
    with one_device():
        return load(name)


def cache_dtype(name):
    return name.partition(", ")[2] or None


def logits_alone(name, text):
    """Logits `[T, V]` of one pass over all of a text, through pages where those keep 8 bits."""
    row = np.pad(text, (0, WIDTH - len(text)))
    with one_device():
        if cache_dtype(name) is None:
            return np.asarray(jaxcp.logits(model_alone(name), row[None]))[0]
        return pool_logits(model_alone(name), row, cache_dtype(name))


def one_device():
    return jax.set_mesh(jaxcp.make_mesh(devices=jax.devices()[:1]))


def is_greedy(name, ids, answer):
    """Tell whether each token is the best after those before it, of one pass over all of them."""
    text = [*ids, *answer]
    best = logits_alone(name, text).argmax(-1)
    return best[len(ids) - 1 : len(text) - 1].tolist() == answer


def texts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, n).tolist() for n in lengths]


def engine_of(name, axes, mesh_of, **options):
    """An engine of one geometry: all tests of a kind and a mesh run the same programs.

    These are few: a chunk that every shard computes, a sharded one, and two steps of decoding.
    """
    if axes:
        mesh_of(**axes)
    options = {"max_len": WIDTH, "max_rows": 4, "cache_dtype": cache_dtype(name)} | options
    engine = jaxcp.Engine(load(name), None, stop_tokens=(), max_wait=math.inf, **options)
    sizes = engine.runner.sizes
    engine.runner.sizes = (SHORT[-1], *[size for size in sizes if size > SHORT[-1]][:1])
    return engine


def answers(engine, given, count):
    """The answer to each text; afterwards nobody holds anything."""
    results = engine.generate(given, Sampling(max_new_tokens=count))
    engine.scheduler.check()
    pools = [*engine.scheduler.pages.pools, engine.scheduler.pages.states]
    assert all(pool.held == 0 for pool in pools)
    return results


def by_kind(*quick, shards=8):
    """Parametrize by every kind, on no mesh and on some of at most so many shards."""
    cases = [case for case in CASES if case[1].get("seq", 1) <= shards]
    return pytest.mark.parametrize(("name", "axes"), slow_but(cases, lambda case: case in quick))


@by_kind(CASES[0])
def test_a_history_that_grows_and_branches_is_computed_once(name, axes, mesh_of):
    """Next turns, short and sharded, and edits: as if each were new, five in four rows."""
    engine = engine_of(name, axes, mesh_of)
    ids, more = texts((50, 150))
    (first,) = answers(engine, [ids], 7)
    said = [*ids, *first.tokens]
    turns = [[*said, *more[:40]], [*said, *more], said, [*ids[:40], 7], [*ids, 8]]
    results = answers(engine, turns, 3)
    for turn, result in zip(turns, results, strict=True):
        assert is_greedy(name, turn, result.tokens)
    # the last token of an answer is not computed
    reused = [result.stats.reused for result in results]
    assert reused == [56, 56, 56, 0 if name in WITH_STATE else 40, 50]


@by_kind(CASES[0], ("blocks", {}), shards=3)
def test_what_comes_after_a_stop_token_follows_the_tokens_before_it(name, axes, mesh_of):
    """The step that was sent before the stop token was read has changed nothing."""
    engine = engine_of(name, axes, mesh_of)
    (ids,) = texts((50,), seed=5)
    (whole,) = answers(engine, [ids], 7)
    stop = next(token for token in whole.tokens[3:] if token not in whole.tokens[:3])
    engine.scheduler.tree.clear()
    (result,) = engine.generate([ids], Sampling(max_new_tokens=7, stop_tokens=(stop,)))
    assert result.finish_reason == "stop"
    said = [*ids, *result.tokens]
    assert said == [*ids, *whole.tokens[: whole.tokens.index(stop)]]
    (after,) = answers(engine, [[*said, 9]], 5)
    assert after.stats.reused == len(said) and is_greedy(name, [*said, 9], after.tokens)


@by_kind(CASES[0], shards=3)
def test_a_prompt_in_chunks_is_answered_as_a_whole(name, axes, mesh_of):
    """Chunks that begin and end inside pages, the first two sharded, while another row decodes."""
    engine = engine_of(name, axes, mesh_of)
    limits, sizes = engine.scheduler.limits, (8, 100)
    chunks = dataclasses.replace(limits.chunks, sizes=sizes)
    engine.scheduler.limits = dataclasses.replace(limits, chunks=chunks)
    given = texts((5, 250), seed=1)
    for ids, result in zip(given, answers(engine, given, 6), strict=True):
        assert is_greedy(name, ids, result.tokens)


@by_kind(CASES[0])
def test_short_prompts_share_programs(name, axes, mesh_of):
    """Prompts of one and of several chunks, whose rows are few, all, or more than there are, beside
    a long prompt, and in a second turn: the answers are those of each alone."""
    engine = engine_of(name, axes, mesh_of)
    limits = engine.scheduler.limits
    free = dataclasses.replace(limits.chunks.together, context=200, seconds=lambda contexts: 0.0)
    dear = {"seconds": lambda count, context: 1.0, "max_wait": 1e9}
    chunks = dataclasses.replace(limits.chunks, together=free, **dear)
    engine.scheduler.limits = dataclasses.replace(limits, chunks=chunks)
    schedule, beside = engine.scheduler.schedule, []

    def seen(*args):
        plan = schedule(*args)
        beside.append(sum(row.together for row in plan.rows))
        return plan

    engine.scheduler.schedule = seen
    given = texts((5, 33, 60, 150, 220, 9), seed=6)
    first = answers(engine, given, 4)
    more = [[*ids, *result.tokens, *ids[:20]] for ids, result in zip(given, first, strict=True)]
    second = [*answers(engine, more[:3], 4), *answers(engine, more[3:], 4)]
    for ids, result in zip([*given, *more], [*first, *second], strict=True):
        assert is_greedy(name, ids, result.tokens)
    assert {*beside} == {0, 2, 3, 4}


@by_kind(CASES[0], shards=3)
def test_who_loses_its_pages_answers_the_same(name, axes, mesh_of):
    """More are let in than fit: the youngest computes anew. Of eight shards, each would have a page
    of every row, and nobody would come too far."""
    engine = engine_of(name, axes, mesh_of)
    engine.scheduler.limits = dataclasses.replace(engine.scheduler.limits, overcommit=3.0)
    pages = engine.scheduler.pages
    few = math.ceil(8 / pages.shards)
    spare = [
        pages.take(shard) for shard, pool in enumerate(pages.pools) for _ in range(pool.free - few)
    ]
    given = texts((90, 90, 60), seed=4)
    results = engine.generate(given, Sampling(max_new_tokens=40))
    for ids, result in zip(given, results, strict=True):
        assert is_greedy(name, ids, result.tokens)
    assert sum(result.stats.preempted for result in results) >= 1
    for page in spare:
        pages.release(page)
    engine.scheduler.check()
