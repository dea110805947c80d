# SPDX-License-Identifier: Apache-2.0
"""The costs of a run beside its steps: the loop around them, measured inside a run.

Whenever the run logs, as many bare steps are made with the same program and a state of their own;
so both are timed in turns, and what else the machine does meets both.
"""

import dataclasses
import multiprocessing
import pathlib
import statistics
import tempfile
import time
from typing import Any

from benchmarks.train_speed import Setting, run_of, save_weights

EVERY = 10
"""Steps between two records, as `TrainConfig.log_every` has it."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """Seconds of `EVERY` steps in the loop of a run, and of as many bare ones."""

    loop: float
    bare: float


def overhead(pairs: list[Pair]) -> tuple[float, float, float]:
    """The median part of a run's time that its steps do not take, the least and the greatest."""
    parts = [1 - pair.bare / pair.loop for pair in pairs]
    return statistics.median(parts), min(parts), max(parts)


class Bare:
    """A callback that makes bare steps after each record, and times both."""

    def __init__(self, config: Any):
        self.config, self.pairs = config, []

    def start(self, *, step: int, steps: int) -> None:
        import jax

        from jaxcp.training.batches import Batches
        from jaxcp.training.step import init_state, make_step

        config, mesh = self.config, jax.sharding.get_mesh()
        self.program = make_step(
            config.model, config.strategy, config.optimizer, config.cycles, config.loss_chunk,
            True, config.losses, config.zero, config.rules,
        )  # fmt: skip
        self.state = init_state(config)
        self.batch, _, in_order = Batches(config, mesh).batch(0)
        assert in_order
        self.began = time.perf_counter()

    def log(self, record: dict[str, Any]) -> None:
        import jax

        now = time.perf_counter()
        for _ in range(EVERY):
            self.state, out = self.program(self.state, self.batch)
        jax.block_until_ready((self.state, out))
        after = time.perf_counter()
        self.pairs.append(Pair(now - self.began, after - now))
        self.began = time.perf_counter()

    def stop(self) -> None:
        pass


def measured(setting: Setting, pipe: Any = None) -> list[Pair]:
    """Train, and give the pairs but for the first, which compiles."""
    from jaxcp.training import train

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        save_weights(setting, folder)
        steps = EVERY * (setting.rounds + 1)
        config = run_of(setting, folder, steps=steps, log_every=EVERY, checkpoint_every=steps)
        bare = Bare(config)
        train(config, callbacks=(bare,))
    if pipe is not None:
        pipe.send(bare.pairs[1:])
    return bare.pairs[1:]


def in_process(setting: Setting) -> list[Pair]:
    """`measured` in a process of its own, with one device."""
    forks = multiprocessing.get_context("spawn")
    ours, its = forks.Pipe()
    process = forks.Process(target=measured, args=(setting, its))
    process.start()
    its.close()
    try:
        return ours.recv()
    finally:
        process.join(10)
        process.kill()
