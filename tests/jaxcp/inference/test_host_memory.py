# SPDX-License-Identifier: Apache-2.0
"""An engine whose idle conversations go to the host answers as one that keeps them."""

import logging

import costs
import numpy as np
import pytest
from slow import slow_but
from test_engine_kinds import engine_of, texts

from jaxcp.inference import programs
from jaxcp.inference.request import Status
from jaxcp.inference.sampling import Sampling

CASES = [
    ("full", {}),
    ("blocks", {}),
    ("windows", {"seq": 3}),
    ("latents", {"seq": 8}),
    ("full, int8", {"data": 2, "seq": 2}),
]
OPTIONS = Sampling(max_new_tokens=4, logprobs=1)


def engine_with_host(name, axes, mesh_of, **options):
    """An engine that takes it that copies cost nothing: models are so small that they do."""
    options = {"max_rows": axes.get("data", 1), "host_memory": 1 << 24} | options
    engine = engine_of(name, axes, mesh_of, **options)
    engine.runner.host.seconds_a_call = 0.0
    return engine


def evict(engine, *, lost=False):
    """Give up all that is idle, as many others would have the tree do."""
    for scheduler in engine.groups.schedulers:
        scheduler.tree.clear(lost=lost)
        assert scheduler.tree.pages() == [] and scheduler.tree.snapshots() == []
        if lost:
            scheduler.tree.lose(scheduler.tree.host.blocks())
        scheduler.check()


@pytest.mark.parametrize(("name", "axes"), slow_but(CASES, lambda case: case == CASES[0]))
def test_a_next_turn_is_answered_alike_from_the_host(name, axes, mesh_of):
    """The same tokens and, to the last bit, log-probabilities, as from pages that stayed."""
    engine = engine_with_host(name, axes, mesh_of)
    ids, more = texts((60, 5), seed=7)
    (first,) = engine.generate([ids], OPTIONS)
    turn = [*ids, *first.tokens, *more]
    evict(engine)
    (offloaded,) = engine.generate([turn], OPTIONS)
    assert offloaded.stats.reused == offloaded.stats.restored == 63, "but for its last token"
    evict(engine, lost=True)
    assert engine.generate([ids], OPTIONS)[0].tokens == first.tokens
    (resident,) = engine.generate([turn], OPTIONS)
    assert resident.stats.reused == 63 and resident.stats.restored == 0
    assert offloaded.tokens == resident.tokens and offloaded.logprobs == resident.logprobs


def test_a_step_that_fails_leaves_what_is_on_the_host(mesh_of, monkeypatch):
    engine = engine_with_host("full", {}, mesh_of)
    (ids,) = texts((60,), seed=8)
    (first,) = engine.generate([ids], OPTIONS)
    evict(engine)
    engine.generate([[1, 2, 3]], OPTIONS)  # whose step copies what was given up
    evict(engine, lost=False)
    request = engine.add([3, 2, 1], OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(programs, "program", lambda function: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert request.status is Status.FAILED
    (again,) = engine.generate([[*ids, *first.tokens]], OPTIONS)
    assert again.stats.restored == 63
    (unknown,) = engine.generate([[1, 2, 3, 4]], OPTIONS)
    assert unknown.stats.restored == 0, "the step that failed was to copy it"


@pytest.mark.slow
def test_after_warming_up_no_copy_compiles(mesh_of, caplog):
    """Conversations in turns over a pool that has room for one of them; the log says that it
    pays."""
    engine = engine_with_host("windows", {}, mesh_of, max_len=64, pool_tokens=64)
    engine.warm_up()
    engine.runner.host.seconds_a_call = 0.0  # warming up has measured it
    warm, histories, restored = len(costs.compiled), texts((20, 30, 40)), 0
    rng = np.random.default_rng(0)
    for _ in range(12):
        history = histories[rng.integers(3)]
        with caplog.at_level(logging.INFO, "jaxcp"):
            (result,) = engine.generate([history], Sampling(max_new_tokens=2))
        history += [*result.tokens, 7]
        restored += result.stats.restored
        engine.scheduler.check()
    assert len(costs.compiled) == warm and restored > 100
    said = [record.getMessage() for record in caplog.records]
    assert [text.endswith("fetching them pays") for text in said] == [True]


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "1 GB"])
def test_host_memory_is_in_bytes(wrong, mesh_of):
    with pytest.raises(ValueError, match="host_memory must be"):
        engine_with_host("full", {}, mesh_of, host_memory=wrong)


def test_host_memory_holds_a_page_at_least(mesh_of):
    with pytest.raises(ValueError, match="must hold a page and a state at least, 24,576 bytes"):
        engine_with_host("full", {}, mesh_of, host_memory=100)
