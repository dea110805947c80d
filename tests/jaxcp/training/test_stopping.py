# SPDX-License-Identifier: Apache-2.0
"""What ends a run early: signals, and steps that are not finite."""

import dataclasses
import logging
import os
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from jaxcp.models.gpt.config import GPTConfig
from jaxcp.training import OptimizerConfig, TextSource, TrainConfig, read_metrics, train

GPT = GPTConfig(vocab_size=256, max_positions=16, num_layers=1, num_heads=1, embed_dim=16)


def run(out_dir, **changes):
    config = {
        "model": GPT, "seq_len": 16, "batch_size": 2, "steps": 8, "data": TextSource(),
        "out_dir": out_dir, "optimizer": OptimizerConfig(warmup_steps=2), "log_every": 1,
        "loss_chunk": 32,
    }  # fmt: skip
    return TrainConfig(**(config | changes))


def losses(result):
    return [record["loss"] for record in read_metrics(result.metrics_path)]


class At:
    """Does something when a step is logged."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def start(self, *, step, steps): ...

    def log(self, record):
        if record["step"] == self.step:
            self.act()

    def stop(self): ...


def struck(number, times=1):
    return At(2, lambda: [signal.raise_signal(number) for _ in range(times)])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return train(run(tmp_path_factory.mktemp("straight")))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_a_step_saved(straight, tmp_path, number):
    before = signal.signal(number, signal.default_int_handler)
    try:
        result = train(run(tmp_path), callbacks=(struck(number),))
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert (result.stopped_by, result.steps) == (number.name, 3)
    assert result.checkpoint_path.is_dir()
    again = train(run(tmp_path))
    assert (again.stopped_by, again.resumed_from) == ("steps", 3)
    assert losses(again) == losses(straight)


TWICE = """
import sys, conftest
from test_stopping import run, struck, train
train(run(sys.argv[1]), callbacks=(struck(int(sys.argv[2]), times=2),))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_the_process_at_once(tmp_path, number, code):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", TWICE, str(tmp_path), str(int(number))]
    assert subprocess.run(command, env=env, timeout=300).returncode == code
    steps = [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == [1, 2] and not any((tmp_path / "checkpoints").glob("[0-9]*"))


def test_who_ignores_a_signal_or_trains_in_a_thread_is_left_alone(tmp_path):
    handlers = []

    def note():
        handlers.append([signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)])

    note()
    thread = threading.Thread(
        target=train, args=(run(tmp_path / "a"),), kwargs={"callbacks": (At(1, note),)}
    )
    thread.start()
    thread.join()
    assert handlers[0] == handlers[1]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for `command &`
    try:
        result = train(run(tmp_path / "b"), callbacks=(struck(signal.SIGINT),))
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.stopped_by == "steps"


class Spoilt:
    """Text, of which some batches have weights that are not finite."""

    def __init__(self, *steps):
        self.steps, self.text = steps, TextSource()

    def __repr__(self):
        return "Spoilt"  # the run is one, whatever is spoilt

    def batch(self, step, rows, length):
        batch = self.text.batch(step, rows, length)
        value = np.inf if step + 1 in self.steps else 1.0
        return batch | {"weights": np.full((rows, length), value, np.float32)}

    def locate(self, step, rows, length, row, place):
        return f"book.bin, token {self.text.stream.starts(step, rows, length)[row] + place}"


def test_a_spoilt_batch_changes_nothing(straight, tmp_path, caplog):
    one = train(run(tmp_path, data=Spoilt(3), stop_after=2))
    before = [np.asarray(x) for x in jax.tree.leaves(one.model)]
    with caplog.at_level(logging.WARNING, logger="jaxcp"):
        three = train(run(tmp_path, data=Spoilt(3), stop_after=3))
    for a, b in zip(before, jax.tree.leaves(three.model), strict=True):
        np.testing.assert_array_equal(a, b)
    assert "step 3 has loss nan" in caplog.text and "It is skipped" in caplog.text
    assert "its rows begin at book.bin, token " in caplog.text
    done = train(run(tmp_path, data=Spoilt(3)))
    records = read_metrics(done.metrics_path)
    assert [record["skipped"] for record in records] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert np.isfinite(done.final_loss) and losses(done)[:2] == losses(straight)[:2]
    # the rate stays that of the step
    rates = [r["lr"] for r in read_metrics(straight.metrics_path)]
    assert [r["lr"] for r in records] == rates


def test_spoilt_batches_in_a_row_end_the_run_and_are_named(tmp_path):
    said = r"step 5 has loss nan .*begin at book.bin, token \d+; .* number 2 in a row\. The same "
    said += r"weights give the batch of the last good step a loss of 5\.\d+ .* the data is at fault"
    with pytest.raises(FloatingPointError, match=said):
        train(run(tmp_path, data=Spoilt(2, 4, 5, 6), max_skipped=2, log_every=8))


def test_a_rate_that_is_too_high_is_told_from_a_spoilt_batch(tmp_path):
    optimizer = OptimizerConfig(learning_rate=1e30, warmup_steps=0)
    with pytest.raises(FloatingPointError, match=r"step 4 .*the weights have diverged\. Lower the"):
        train(run(tmp_path, optimizer=optimizer, max_skipped=3))


def test_a_run_without_a_finite_step_is_an_error(tmp_path):
    config = run(tmp_path, data=Spoilt(*range(1, 9)))
    with pytest.raises(FloatingPointError, match="No step before was finite: look at the weights"):
        train(config)
    with pytest.raises(ValueError, match="max_skipped must be positive"):
        dataclasses.replace(config, max_skipped=0)
