# SPDX-License-Identifier: Apache-2.0
"""A run of several processes in which one is killed, stopped, cut off, or finds its disk full.

The others must end by themselves, soon and with a sentence, and once all are started again the run
must end with the losses of one that nobody disturbed: bit for bit, and no step lost that was saved.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.faults import (
    DAMAGES,
    ENDED,
    PATIENCE,
    Course,
    damage,
    first_that,
    len_of,
    trained,
    wait_for,
)
from benchmarks.links import Link
from jaxcp import processes
from jaxcp.cli.several import Processes, one_of
from jaxcp.mesh import MeshConfig
from jaxcp.training import checkpoint, read_metrics

HEARTBEAT = 10
"""Seconds of silence after which a process is taken for lost."""
AT_ONCE = 15.0
"""Seconds in which the others end where connections are closed."""
FAULTS = (
    "kill", "kill in a save", "coordinator", "SIGTERM", "hang", "truncated", "flipped", "missing",
    "disk full",
)  # fmt: skip
LINK = "link cut"
SENTENCE = re.compile(r"^jaxcp: .*Start all of them again", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Seat:
    """The place of a process among the others, and its namespace of the network, if any."""

    port: int
    processes: int
    number: int
    link: Link | None

    @property
    def coordinator(self) -> str:
        host = "localhost" if self.link is None else self.link.address(0)
        return f"{host}:{self.port}"


def child(folder: pathlib.Path, steps: int, changes: dict, seat: Seat) -> None:
    """Train as one of several processes, as `jaxcp train` does."""
    said = os.open(folder / f"said-{seat.number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if seat.link is not None:
        seat.link.enter(seat.number)
    options = Processes(
        coordinator=seat.coordinator, processes=seat.processes, process_id=seat.number,
        heartbeat=HEARTBEAT,
    )  # fmt: skip
    with one_of(options, seat.processes):
        ended = trained(folder, steps, changes)
        if processes.is_first():
            (folder / ENDED).write_text(json.dumps(ended))


class Team(Course):
    """A run whose processes have a device each, rows over all of them."""

    def __init__(
        self, folder: pathlib.Path, steps: int, processes: int, link: Link | None = None, **changes
    ):
        size = {"mesh": MeshConfig(data=processes), "batch_size": 4}
        super().__init__(folder, steps, **size | changes)
        self.processes, self.link = processes, link
        self.forks.set_forkserver_preload([__name__])

    def start_all(self) -> list[Any]:
        """Start every process, as a supervisor does."""
        for name in ("resumed", ENDED):
            (self.folder / name).unlink(missing_ok=True)
        port = free_port()
        started = []
        for number in range(self.processes):
            seat = Seat(port, self.processes, number, self.link)
            arguments = (self.folder, self.steps, self.changes, seat)
            started.append(self.forks.Process(target=child, args=arguments))
            started[-1].start()
        return started

    def resumed_all(self, started: list[Any]) -> int:
        """Wait until the run goes on; give its step."""
        return self.resumed(started[0])

    def codes(self, started: list[Any], within: float = PATIENCE) -> list[int]:
        """Wait until all have ended; give their exit codes.

        Raises:
          AssertionError: one has not ended, naming what it said.
        """
        deadline = time.monotonic() + within
        for number, process in enumerate(started):
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                told = self.said(number)
                for other in started:
                    other.kill()
                raise AssertionError(f"process {number} did not end within {within} s: {told}")
        return [process.exitcode for process in started]

    def said(self, number: int) -> str:
        """Read what a process wrote."""
        return (self.folder / f"said-{number}").read_text(errors="replace")

    def finish_all(self, started: list[Any]) -> dict:
        """Wait for the end of a run that nothing happens to; give what it wrote about it."""
        codes = self.codes(started)
        assert codes == [0] * self.processes, (codes, [self.said(i) for i in range(len(codes))])
        return self.finish(started[0])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def undisturbed(folder: pathlib.Path, steps: int, processes: int) -> list[float]:
    """Train without a fault, and give the losses."""
    team = Team(folder, steps, processes, checkpoint_every=steps)
    assert team.finish_all(team.start_all()) == {"stopped_by": "steps", "steps": steps}
    return team.losses()


def disturbed(
    folder: pathlib.Path, steps: int, processes: int, faults: list[str], seed: int,
    link: Link | None = None,
) -> list[float]:  # fmt: skip
    """Train through faults, after each of which all are started again; give the losses."""
    team, rng = Team(folder, steps, processes, link), random.Random(seed)
    newest = 0
    for fault in faults:
        with small_disk(team.saved) if fault == "disk full" else contextlib.nullcontext():
            started = team.start_all()
            try:
                assert team.resumed_all(started) == newest, (fault, newest)
                newest = strike(team, started, fault, rng)
            finally:
                for process in started:
                    process.kill()
                    process.join()
        assert newest < steps, "the run was over before its faults; give it more steps"
    started = team.start_all()
    assert team.resumed_all(started) == newest
    assert team.finish_all(started) == {"stopped_by": "steps", "steps": steps}
    assert not any(team.saved.glob(f"*{checkpoint.TEMPORARY}*"))
    return team.losses()


def strike(team: Team, started: list[Any], fault: str, rng: random.Random) -> int:
    """Let something happen once the run has saved; give the step from which it must go on."""
    before = max(len_of(team.saved), first_that(fault))
    wait_for(lambda: len_of(team.saved) > before, started[0])
    time.sleep(rng.uniform(0, 0.2))
    victim = 0 if fault == "coordinator" else rng.randrange(1, team.processes)
    if fault == "SIGTERM":
        return told_to_stop(team, started, rng.randrange(team.processes))
    if fault == "disk full":
        return without_room(team, started)
    if fault == "kill in a save":
        wait_for(lambda: any(team.saved.glob(f"*{checkpoint.TEMPORARY}*")), started[0])
    if fault == LINK:
        assert team.link is not None
        team.link.cut()
        all_end(team, started, None, HEARTBEAT + AT_ONCE)
        team.link.mend()
    elif fault == "hang":
        os.kill(started[victim].pid, signal.SIGSTOP)
        all_end(team, started, victim, HEARTBEAT + AT_ONCE)
    elif fault in DAMAGES:
        for process in started:
            process.kill()
        team.codes(started)
        saved = checkpoint.steps(team.saved)
        damage(team.saved / str(saved[-1]), fault, rng)
        return saved[-2]
    else:
        started[victim].kill()
        all_end(team, started, victim, AT_ONCE)
    return checkpoint.steps(team.saved)[-1]


def all_end(team: Team, started: list[Any], victim: int | None, within: float) -> None:
    """Check that all but the victim end in time, with 75 and one sentence.

    Where process 0 is lost or cut off, JAX may be faster and abort one of the others.
    """
    others = [process for number, process in enumerate(started) if number != victim]
    numbers = [number for number in range(team.processes) if number != victim]
    codes = dict(zip(numbers, team.codes(others, within), strict=True))
    for number, code in codes.items():
        aborted = victim in (0, None) and code == -signal.SIGABRT
        said = team.said(number)
        assert code == 75 or aborted, (number, code, said)
        assert aborted or len(SENTENCE.findall(said)) == 1, (number, said)
    if victim is not None:
        started[victim].kill()
        started[victim].join()


def told_to_stop(team: Team, started: list[Any], victim: int) -> int:
    """Send SIGTERM to one: all save, and end with 0."""
    done = read_metrics(team.folder / "metrics.jsonl")[-1]["step"]
    os.kill(started[victim].pid, signal.SIGTERM)
    ended = team.finish_all(started)
    assert ended["stopped_by"] == "SIGTERM" and ended["steps"] >= done, (ended, done)
    assert checkpoint.steps(team.saved)[-1] == ended["steps"]
    return ended["steps"]


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, size: str = "4m") -> Iterator[None]:
    """Put a small file system in the place of a folder, with what the folder holds.

    Raises:
      PermissionError: this process may not mount.
    """
    kept = folder.with_name("kept")
    folder.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "jaxcp-soak", str(folder)]
    shutil.copytree(folder, kept)
    mount = subprocess.run(words, capture_output=True, text=True)
    if mount.returncode:
        shutil.rmtree(kept)
        raise PermissionError(mount.stderr.strip())
    try:
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        yield
    finally:
        shutil.rmtree(kept)
        shutil.copytree(folder, kept)
        subprocess.run(["umount", str(folder)], check=True)
        shutil.rmtree(folder)  # what lay under it
        kept.rename(folder)


def without_room(team: Team, started: list[Any]) -> int:
    """Fill the disk while a state is saved: one line says so, and nothing half stays once it is
    empty again."""
    filler = team.saved / "filler"
    wait_for(lambda: any(team.saved.glob(f"*{checkpoint.TEMPORARY}*")), started[0])
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    codes = team.codes(started, AT_ONCE + HEARTBEAT)
    assert set(codes) <= {0, 1, 75} and any(codes), codes
    filler.unlink()
    return checkpoint.steps(team.saved)[-1]
