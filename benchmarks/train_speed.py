# SPDX-License-Identifier: Apache-2.0
"""Steps of training side by side, in turns: ours and PyTorch's, one device's and eight devices'.

Each side is a process that waits until it is asked for steps, so that nothing of the other runs
meanwhile; a ratio is that of two neighbours in time.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

LEARNING_RATE, BETAS, DECAY, CLIP = 1e-3, (0.9, 0.99), 0.1, 1.0
PATIENCE = 300
"""Seconds after which a process that does not answer is an error."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A GPT on tinyshakespeare's characters, and how often it is asked for steps."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 256
    rows: int = 12
    threads: int = 0
    """Cores of a process; 0 takes all."""
    rounds: int = 7
    steps: int = 4
    """Steps of a round."""

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * self.context


@dataclasses.dataclass(frozen=True)
class Turn:
    """Seconds of a process for the steps of a round."""

    seconds: float
    cpu_seconds: float
    loss: float
    """Loss of the last step: those of both sides are the same."""


@dataclasses.dataclass(frozen=True)
class Race:
    """The turns of both sides; `ratio` is how many times as long the second one takes."""

    ours: list[Turn]
    theirs: list[Turn]

    def ratio(self, unit: str = "seconds") -> tuple[float, float, float]:
        """The median over rounds, the least and the greatest."""
        pairs = zip(self.ours, self.theirs, strict=True)
        ratios = [getattr(b, unit) / getattr(a, unit) for a, b in pairs]
        return statistics.median(ratios), min(ratios), max(ratios)

    def medians(self, unit: str = "seconds") -> tuple[float, float]:
        """Costs of a round of each side."""
        ours, theirs = (
            statistics.median(getattr(t, unit) for t in side) for side in (self.ours, self.theirs)
        )
        return ours, theirs


def model_of(setting: Setting) -> Any:
    from jaxcp.models.gpt.config import GPTConfig

    return GPTConfig(
        vocab_size=65, max_positions=setting.context, num_layers=setting.layers,
        num_heads=setting.heads, embed_dim=setting.width, activation="gelu",
    )  # fmt: skip


def run_of(setting: Setting, out_dir: pathlib.Path, **changes: Any) -> Any:
    """A run with a flat rate, from the weights in `out_dir/weights`."""
    from jaxcp.training import OptimizerConfig, StartConfig, TextSource, TrainConfig

    fields: dict[str, Any] = {
        "model": model_of(setting), "seq_len": setting.context, "batch_size": setting.rows,
        "steps": 100_000, "out_dir": out_dir / "run", "keep_programs": False,
        "data": TextSource(path="tinyshakespeare", alphabet="characters"),
        "start": StartConfig(weights=str(out_dir / "weights")),
        "optimizer": OptimizerConfig(
            learning_rate=LEARNING_RATE, beta1=BETAS[0], beta2=BETAS[1], weight_decay=DECAY,
            clip_norm=CLIP, warmup_steps=0, decay_fraction=0.0,
        ),
    }  # fmt: skip
    return TrainConfig(**fields | changes)


def batches(setting: Setting) -> list[dict[str, np.ndarray]]:
    """The batches that both sides take again and again."""
    from jaxcp.data.batch import checked
    from jaxcp.data.sources import TextSource

    source = TextSource(path="tinyshakespeare", alphabet="characters")
    made = (source.batch(step, setting.rows, setting.context) for step in range(setting.steps))
    return [checked(batch, vocab_size=65) for batch in made]


def our_steps(setting: Setting, folder: pathlib.Path, seq: int = 1) -> Callable[[], float]:
    """Make `run()`, which makes the steps of a round and gives the last one's loss."""
    import jax

    from jaxcp.data.placing import put
    from jaxcp.layout import Zigzag
    from jaxcp.mesh import MeshConfig
    from jaxcp.training.step import init_state, make_step

    config = run_of(setting, folder, mesh=MeshConfig(seq=seq))
    mesh = config.mesh.make(jax.devices()[:seq])
    step = make_step(
        config.model, config.strategy, config.optimizer, config.cycles, config.loss_chunk, True
    )
    with jax.set_mesh(mesh):
        state = init_state(config)
        placed = [put(batch, mesh=mesh, layout=Zigzag()) for batch in batches(setting)]

    def run() -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            for batch in placed:
                state, record = step(state, batch)
            return float(record["loss"])

    return run


def their_steps(setting: Setting, folder: pathlib.Path) -> Callable[[], float]:
    """Make those of PyTorch; see `our_steps`."""
    import torch

    from benchmarks import torch_gpt

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = torch_gpt.GPT(
        torch_gpt.Shape(
            vocab_size=65, block_size=setting.context, n_layer=setting.layers,
            n_head=setting.heads, n_embd=setting.width,
        )
    )  # fmt: skip
    torch_gpt.read(model, folder / "weights")
    optimizer = torch_gpt.adamw(
        model, rate=LEARNING_RATE, betas=BETAS, decay=DECAY, fused=True
    )  # of its three ways the fastest on a CPU
    placed = [
        [torch.from_numpy(batch[name].astype(np.int64)) for name in ("tokens", "targets")]
        for batch in batches(setting)
    ]

    def run() -> float:
        for batch in placed:
            loss = torch_gpt.advance(model, optimizer, *batch, clip=CLIP)
        return loss.item()

    return run


def serve(pipe: Any, make: str, setting: Setting, folder: pathlib.Path, devices: int) -> None:
    """Answer each name of a side with the `Turn` of a round, until None comes."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[: setting.threads or len(cores)])
    if make != "torch":
        import jax

        jax.config.update("jax_num_cpu_devices", devices)
        sides = {1: our_steps(setting, folder)}
        if devices > 1:
            sides[devices] = our_steps(setting, folder, seq=devices)
    else:
        sides = {1: their_steps(setting, folder)}
    while (side := pipe.recv()) is not None:
        began, cpu = time.perf_counter(), time.process_time()
        loss = sides[side]()
        pipe.send(Turn(time.perf_counter() - began, time.process_time() - cpu, loss))


@contextlib.contextmanager
def asked(
    make: str, setting: Setting, folder: pathlib.Path, devices: int = 1
) -> Iterator[Callable[[int], Turn]]:
    """Start a process; give `ask(side)`, which lets it make the steps of a round."""
    forks = multiprocessing.get_context("spawn")
    ours, its = forks.Pipe()
    process = forks.Process(target=serve, args=(its, make, setting, folder, devices))
    process.start()
    its.close()

    def ask(side: int) -> Turn:
        ours.send(side)
        if not ours.poll(PATIENCE):
            raise TimeoutError(f"{make} did not answer in {PATIENCE} s")
        return ours.recv()  # EOFError where it has ended

    try:
        yield ask
        ours.send(None)
    finally:
        process.join(10)
        process.kill()


def save_weights(setting: Setting, folder: pathlib.Path) -> None:
    """Write the weights from which both sides start."""
    from flax import nnx

    import jaxcp

    jaxcp.save(jaxcp.GPT(model_of(setting), rngs=nnx.Rngs(0)), folder / "weights")


def in_turns(first: Callable[[], Turn], second: Callable[[], Turn], rounds: int) -> Race:
    """Let both make rounds in turn; the first one, which compiles, does not count.

    Raises:
      ValueError: they do not train alike.
    """
    race = Race([], [])
    for number in range(rounds + 1):
        turns = first(), second()
        if abs(turns[0].loss - turns[1].loss) > 2e-3:
            raise ValueError(f"both sides must have the same losses; got {turns}")
        if number:
            race.ours.append(turns[0])
            race.theirs.append(turns[1])
    return race


def beside_torch(setting: Setting) -> Race:
    """Ours and PyTorch's, each in its process, on the same cores."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        save_weights(setting, folder)
        with asked("jaxcp", setting, folder) as ours, asked("torch", setting, folder) as theirs:
            return in_turns(lambda: ours(1), lambda: theirs(1), setting.rounds)


def over_devices(setting: Setting, devices: int = 8) -> Race:
    """One device, and eight emulated ones that share its sequence, in one process."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        save_weights(setting, folder)
        with asked("jaxcp", setting, folder, devices) as ask:
            return in_turns(lambda: ask(1), lambda: ask(devices), setting.rounds)
