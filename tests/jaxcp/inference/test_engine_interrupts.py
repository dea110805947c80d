# SPDX-License-Identifier: Apache-2.0
"""Interrupts at any moment, and several threads: no page is lost, and answers are right."""

import functools
import signal
import threading

import pytest
from test_engine import FULL, alone, engine_of, everything_is_given_back, prompts

from jaxcp import Sampling


@pytest.fixture(scope="module")
def full():
    return engine_of(FULL)


@pytest.fixture
def interruptible():
    """A shell's background job inherits a SIGINT that is ignored."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "name",
    ["scheduler.add", "scheduler.schedule", "runner.run", "scheduler.advance", "scheduler.cancel"],
)
def test_an_interrupt_leaves_nothing_half_done(name, when, full, monkeypatch, interruptible):
    """SIGINT as a call begins or as it ends, and a second one while the first is cleaned up."""
    given = prompts(full.model, (30, 40, 20), seed=8)
    owner = functools.reduce(getattr, name.split(".")[:-1], full)
    method, reset = name.split(".")[-1], full.runner.reset
    call, calls = getattr(owner, method), []

    def interrupted(*arguments):
        calls.append(method)
        if when == "before" and len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        result = call(*arguments)
        if when == "after" and len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return result

    def reset_interrupted():
        signal.raise_signal(signal.SIGINT)
        reset()

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, interrupted)
        patch.setattr(full.runner, "reset", reset_interrupted)
        with pytest.raises(KeyboardInterrupt):
            full.generate(given, Sampling(max_new_tokens=4))
    assert len(calls) >= 2
    everything_is_given_back(full)
    results = full.generate(given, Sampling(max_new_tokens=4))
    assert [result.tokens for result in results] == [alone(FULL, ids, 4) for ids in given]


def test_another_thread_is_not_interrupted(full):
    answers = []
    (ids,) = prompts(full.model, (30,), seed=8)
    thread = threading.Thread(
        target=lambda: answers.extend(full.generate([ids], Sampling(max_new_tokens=2)))
    )
    thread.start()
    thread.join()
    assert answers[0].tokens == alone(FULL, ids, 2)


def test_threads_share_an_engine(full):
    """Each has its own answers, by `generate`, `stream` and `cancel`, whoever makes the steps."""
    given = prompts(full.model, (30, 20, 40, 10), seed=9)
    found, errors = {}, []

    def work(number):
        try:
            for _ in range(3):
                if number % 2:
                    found[number] = full.generate([given[number]], Sampling(max_new_tokens=5))[
                        0
                    ].tokens
                else:
                    full.cancel(full.add([1, 2, 3], Sampling(max_new_tokens=9)))
                    request = full.request(given[number], Sampling(max_new_tokens=5))
                    found[number] = list(full.stream(request))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert found == {number: alone(FULL, ids, 5) for number, ids in enumerate(given)}
    while full.step() or full.scheduler.in_flight:
        pass
    everything_is_given_back(full)
