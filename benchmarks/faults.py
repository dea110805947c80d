# SPDX-License-Identifier: Apache-2.0
"""A run of one process that is killed, stopped and damaged, and ends as if nothing had been.

After each fault it must go on from its newest whole checkpoint, and in the end every loss must be,
bit for bit, that of a run that nobody disturbed. The first that is not raises.
"""

import json
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import time
from collections.abc import Iterable

import numpy as np

from jaxcp.models.gpt.config import GPTConfig
from jaxcp.training import OptimizerConfig, TokenFiles, TrainConfig, checkpoint, read_metrics, train

EVERY = 6
"""Steps between checkpoints."""
PATIENCE = 300
"""Seconds until a child that does nothing is an error; a loaded machine is slow."""
ENDED = "ended.json"
DAMAGES = ("truncated", "flipped", "missing")
FAULTS = (
    "kill", "kill in a save", "SIGTERM", "SIGINT", *DAMAGES, "shard gone",
)  # fmt: skip


class Paced(TokenFiles):
    """Token files that take a few milliseconds a batch, as otherwise a run is over at once."""

    def batch(self, step, rows, length):
        time.sleep(0.004)
        return super().batch(step, rows, length)


class Told:
    """Notes in the folder of a run the step from which a process went on."""

    def __init__(self, folder):
        self.folder = folder

    def start(self, *, step, steps):
        (self.folder / "resumed.new").write_text(str(step))
        (self.folder / "resumed.new").replace(self.folder / "resumed")

    def log(self, record):
        pass

    def stop(self):
        pass


def config(folder: pathlib.Path, steps: int, **changes) -> TrainConfig:
    """Make a run of the smallest model, on the shards beside its folder."""
    fields = {
        "model": GPTConfig(
            vocab_size=64, max_positions=16, num_layers=1, num_heads=1, embed_dim=16
        ),
        "seq_len": 16, "batch_size": 2, "steps": steps, "log_every": 1, "loss_chunk": 32,
        "data": Paced(pattern=str(folder.parent / "shards" / "*.bin")), "out_dir": folder,
        "optimizer": OptimizerConfig(warmup_steps=2), "checkpoint_every": EVERY, "keep": 3,
    }  # fmt: skip
    return TrainConfig(**(fields | changes))


def child(folder: pathlib.Path, steps: int, changes: dict) -> None:
    """Train, and write down how it ended."""
    try:
        ended = trained(folder, steps, changes)
    except Exception as error:
        ended = {"error": str(error)}
    (folder / ENDED).write_text(json.dumps(ended))


def trained(folder: pathlib.Path, steps: int, changes: dict) -> dict:
    """Train, and say how it ended."""
    result = train(config(folder, steps, **changes), callbacks=(Told(folder),))
    return {"stopped_by": result.stopped_by, "steps": result.steps}


class Course:
    """A run that is started again and again; its processes are forked from one that has imported
    everything and started nothing.

    Args:
      folder: of the run and, beside it, of its shards; of a run before it only compiled programs
        stay.
    """

    def __init__(self, folder: pathlib.Path, steps: int, **changes):
        self.folder, self.steps, self.changes = folder, steps, changes
        self.saved = folder / "checkpoints"
        self.shards = folder.parent / "shards"
        if not self.shards.exists():
            self.shards.mkdir(parents=True)
            rng = np.random.default_rng(0)
            for number in range(3):
                rng.integers(0, 64, 900).astype("<u2").tofile(self.shards / f"{number}.bin")
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            if path.is_dir() and path.name != "xla_cache":
                shutil.rmtree(path)
            elif path.is_file():
                path.unlink()
        self.forks = multiprocessing.get_context("forkserver")
        self.forks.set_forkserver_preload([__name__])

    def start(self):
        """Start a process of the run."""
        for name in ("resumed", ENDED):
            (self.folder / name).unlink(missing_ok=True)
        arguments = (self.folder, self.steps, self.changes)
        process = self.forks.Process(target=child, args=arguments)
        process.start()
        return process

    def resumed(self, process) -> int:
        """Wait until a process trains; give the step from which it went on."""
        wait_for((self.folder / "resumed").exists, process)
        return int((self.folder / "resumed").read_text())

    def finish(self, process) -> dict:
        """Wait for the end of a process; give what it wrote about it."""
        process.join(PATIENCE)
        assert process.exitcode == 0, process.exitcode
        return json.loads((self.folder / ENDED).read_text())

    def losses(self) -> list[float]:
        """List the losses of all steps."""
        records = read_metrics(self.folder / "metrics.jsonl")
        assert [record["step"] for record in records] == [*range(1, self.steps + 1)]
        return [record["loss"] for record in records]


def undisturbed(folder: pathlib.Path, steps: int) -> list[float]:
    """Train without a fault, and give the losses."""
    course = Course(folder, steps, checkpoint_every=steps)
    assert course.finish(course.start()) == {"stopped_by": "steps", "steps": steps}
    return course.losses()


def disturbed(folder: pathlib.Path, steps: int, faults: Iterable[str], seed: int) -> list[float]:
    """Train through faults, each of which must cost no step that was saved; give the losses."""
    course, rng = Course(folder, steps), random.Random(seed)
    newest = 0
    for fault in faults:
        process = course.start()
        assert course.resumed(process) == newest, (fault, newest)
        newest = strike(course, process, fault, rng)
        assert newest < steps, "the run was over before its faults; give it more steps"
    process = course.start()
    assert course.resumed(process) == newest
    assert course.finish(process) == {"stopped_by": "steps", "steps": steps}
    return course.losses()


def strike(course: Course, process, fault: str, rng: random.Random) -> int:
    """End a process by a fault once it has saved; give the step from which the next must go on."""
    before = max(len_of(course.saved), first_that(fault))
    wait_for(lambda: len_of(course.saved) > before, process)
    time.sleep(rng.uniform(0, 0.1))
    if fault.startswith("SIG"):
        done = read_metrics(course.folder / "metrics.jsonl")[-1]["step"]
        os.kill(process.pid, getattr(signal, fault))
        ended = course.finish(process)
        assert ended["stopped_by"] == fault and ended["steps"] >= done, (ended, done)
        assert checkpoint.steps(course.saved)[-1] == ended["steps"]
        return ended["steps"]
    if fault == "kill in a save":
        wait_for(lambda: any(course.saved.glob(f"*{checkpoint.TEMPORARY}*")), process)
    process.kill()
    process.join()
    saved = checkpoint.steps(course.saved)
    if fault == "shard gone":
        missing_shard(course)
    elif fault in DAMAGES:
        damage(course.saved / str(saved[-1]), fault, rng)
        return saved[-2]
    return saved[-1]


def missing_shard(course: Course) -> None:
    """Take a shard away: the run refuses to go on, naming it, until it is back."""
    shard = course.shards / "1.bin"
    aside = shard.replace(course.folder / "aside")
    ended = course.finish(course.start())
    assert f"{shard} is gone" in ended["error"], ended
    aside.replace(shard)


def damage(folder: pathlib.Path, fault: str, rng: random.Random) -> None:
    """Truncate or remove a file of a checkpoint, or flip one bit in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    path = rng.choice(files)
    raw = bytearray(path.read_bytes())
    if fault == "missing":
        # without its list it is no checkpoint, which is another thing
        rng.choice([file for file in files if file.name != "files.json"]).unlink()
    elif fault == "truncated":
        path.write_bytes(raw[: len(raw) // 2])
    else:
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)


def first_that(fault: str) -> int:
    """The step of the save after which a fault may come: a damaged one needs another beside it."""
    return EVERY if fault in DAMAGES else -1


def len_of(saved: pathlib.Path) -> int:
    """The newest step that was saved; -1 before there is one."""
    return max(checkpoint.steps(saved), default=-1)


def wait_for(what, process) -> None:
    """Wait until something is so, while a process lives."""
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert process.is_alive(), f"the process ended by itself, code {process.exitcode}"
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.001)
