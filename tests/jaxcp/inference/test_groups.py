# SPDX-License-Identifier: Apache-2.0
"""Groups of devices along `data`, each with pages and rows of its own: answers are those of one."""

import functools
import math

import jax
import numpy as np
import pytest
from slow import slow_but
from tiny_checkpoints import FIXTURES

import jaxcp
from jaxcp import Sampling
from jaxcp.inference.geometry import SHORT
from jaxcp.inference.groups import Groups
from jaxcp.inference.limits import ChunkLimits, Limits
from jaxcp.inference.pages import Pages
from jaxcp.inference.request import Request
from jaxcp.inference.scheduler import Scheduler
from jaxcp.layers.stack import Layers

FULL, WINDOWS, BLOCKS = "qwen3-moe-tiny", "hy3-tiny", "deepseek-v4-tiny"
LENGTHS = (40, 150, 1, 33, 64, 90, 7)
OPTIONS = (
    Sampling(max_new_tokens=12),
    Sampling(max_new_tokens=12, temperature=0.8, seed=4, logprobs=1),
    Sampling(max_new_tokens=12, temperature=0.5, top_k=9, repetition_penalty=1.2),
)


def engine_of(name, **options):
    model, _ = jaxcp.load(FIXTURES / name)
    if name == BLOCKS:
        model.layers = Layers(model.layers[2:3])  # selected blocks, with a window
    options = {"max_len": 192, "max_rows": 8, "stop_tokens": (), "max_wait": math.inf} | options
    engine = jaxcp.Engine(model, None, **options)
    sizes = engine.runner.sizes  # each is a program to compile
    engine.runner.sizes = (SHORT[-1], next(size for size in sizes if size > SHORT[-1]))
    return engine


def prompts(model):
    rng = np.random.default_rng(1)
    return [rng.integers(0, model.config.vocab_size, n).tolist() for n in LENGTHS]


def answers(engine):
    """To every prompt by one of the options, all at once; then to each as a next turn."""
    requests = [engine.add(ids, OPTIONS[i % 3]) for i, ids in enumerate(prompts(engine.model))]
    while not all(request.done for request in requests):
        engine.step()
    turns = [[*request.tokens, 1, 2] for request in requests]
    later = engine.generate(turns, Sampling(max_new_tokens=4))
    logprobs = [x.logprob for r in requests for x in engine.result(r).logprobs or ()]
    return [r.answer for r in requests], [r.tokens for r in later], logprobs, later


@functools.cache
def alone(name):
    with jax.set_mesh(jaxcp.make_mesh(devices=jax.devices()[:1])):
        return answers(engine_of(name, max_rows=4))[:3]


@pytest.mark.parametrize(
    ("name", "axes", "options"),
    slow_but(
        [
            (FULL, {"data": 2}, {"drafts": 3}),
            (WINDOWS, {"data": 2, "seq": 4}, {"drafts": 3}),
            (BLOCKS, {"data": 2, "seq": 2}, {}),
            (FULL, {"data": 2, "seq": 2, "model": 2}, {}),
        ],
        lambda case: case[0] == FULL and case[1] == {"data": 2},
    ),
)
def test_groups_answer_as_one_device_does(name, axes, options, mesh_of):
    mesh_of(**axes)
    engine = engine_of(name, **options)
    first, second, logprobs, later = answers(engine)
    expected = alone(name)
    assert first == expected[0] and second == expected[1]
    np.testing.assert_allclose(logprobs, expected[2], atol=1e-4)
    reused, computed = (sum(getattr(r.stats, x) for r in later) for x in ("reused", "computed"))
    assert reused > computed, "turns go where their past is, unless there is a queue"
    groups = engine.groups.schedulers
    assert len(groups) == axes["data"] and len({r.group for r in engine.groups.running}) == 0
    for scheduler in groups:
        scheduler.check()
        assert scheduler.tree.pages(), "every group has had something to do"
    with pytest.raises(ValueError, match=r"several groups of devices: see Engine\.groups"):
        _ = engine.scheduler


def groups_of(count):
    limits = Limits(max_rows=2, max_len=64, chunks=ChunkLimits(sizes=(64,), seconds=lambda *_: 0.0))
    pages = [Pages(shards=1, pages_per_shard=32, page_size=4) for _ in range(count)]
    return Groups([Scheduler(one, limits) for one in pages])


def test_requests_go_where_least_is_to_do_or_their_prompt_is_known():
    groups = groups_of(3)
    requests = [Request([i] * 8, max_new_tokens=4) for i in range(5)]
    for request in requests:
        groups.add(request, 0.0)
    assert [request.group for request in requests] == [0, 1, 2, 0, 1]
    groups.schedulers[2].tree.insert([7] * 8, [groups.schedulers[2].pages.take(i) for i in (0, 1)])
    known = Request([*[7] * 8, 1], max_new_tokens=4)
    groups.add(known, 0.0)
    assert known.group == 2
    full = Request([*[7] * 8, 2], max_new_tokens=4)
    for request in (full, follower := Request([5], max_new_tokens=4, after=requests[3])):
        groups.add(request, 0.0)
    assert full.group == 2, "to wait there is less than to compute it"
    more = [Request([*[7] * 8, i], max_new_tokens=4) for i in range(12)]
    for request in more:
        groups.add(request, 0.0)
    assert {request.group for request in more} == {0, 1, 2}, "but not any number of times"
    assert follower.group == requests[3].group
    groups.cancel(known, 1.0)
    assert known.done and groups.running == []
