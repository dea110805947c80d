# SPDX-License-Identifier: Apache-2.0
"""Faults on end: runs are killed, stopped, cut off and damaged, and end as if nothing had been.

    python -m benchmarks.soak --minutes 15

Runs of one, two and four processes take turns, whatever number has its faults (`faults.py`,
`faults_together.py`). After each fault a run must go on from its newest whole checkpoint, and in
the end every loss must be, bit for bit, that of a run that nobody disturbed. The first that is not
raises. What this machine does not let us do is named, with the reason.
"""

import argparse
import collections
import os
import pathlib
import random
import signal
import tempfile
import time
from collections.abc import Iterator

from benchmarks import faults, faults_together
from benchmarks.links import linked

STEPS = 400
LINKED_STEPS = 120


def alone(folder: pathlib.Path, rng: random.Random) -> Iterator[list[str]]:
    """Rounds of a run of one process; each gives the faults that it had."""
    expected = faults.undisturbed(folder / "run", STEPS)
    while True:
        chosen = [*faults.FAULTS, "kill", "kill in a save"]
        rng.shuffle(chosen)
        assert faults.disturbed(folder / "run", STEPS, chosen, rng.random()) == expected
        yield [f"1 process: {fault}" for fault in chosen]


def together(folder: pathlib.Path, rng: random.Random, processes: int) -> Iterator[list[str]]:
    """Rounds of a run of several processes."""
    possible = [*faults_together.FAULTS, "kill", "kill in a save"]
    try:
        with faults_together.small_disk(folder / "probe"):
            pass
    except PermissionError as error:
        possible.remove("disk full")
        print(f"{processes} processes, disk full: not run, this machine does not allow it: {error}")
    expected = faults_together.undisturbed(folder / "run", STEPS, processes)
    while True:
        chosen = [*possible]
        rng.shuffle(chosen)
        found = faults_together.disturbed(folder / "run", STEPS, processes, chosen, rng.random())
        assert found == expected
        yield [f"{processes} processes: {fault}" for fault in chosen]


def over_a_link(folder: pathlib.Path, rng: random.Random) -> Iterator[list[str]]:
    """Rounds of two processes on two hosts, whose link is cut."""
    with linked() as link:
        expected = faults_together.undisturbed(folder / "run", LINKED_STEPS, 2)
        while True:
            chosen = [faults_together.LINK, "kill"]
            found = faults_together.disturbed(
                folder / "run", LINKED_STEPS, 2, chosen, rng.random(), link
            )
            assert found == expected
            yield [f"2 hosts: {fault}" for fault in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    # a shell that starts this in the background lets it be ignored, and so by all that is started
    signal.signal(signal.SIGINT, signal.default_int_handler)
    deadline = time.monotonic() + 60 * arguments.minutes
    rng = random.Random(arguments.seed)
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        rounds = collections.deque(
            [
                ("1 process", alone(folder / "1", rng)),
                ("2 processes", together(folder / "2", rng, 2)),
                ("2 hosts", over_a_link(folder / "link", rng)),
                ("4 processes", together(folder / "4", rng, 4)),
            ]
        )
        while time.monotonic() < deadline:
            kind, faults_of_it = rounds.popleft()
            try:
                had = next(faults_of_it)
            except PermissionError as error:
                print(f"{kind}: not run, as this machine does not allow it: {error}", flush=True)
                continue
            rounds.append((kind, faults_of_it))
            counts.update(had)
            print(f"{kind}: {len(had)} faults, all losses bit for bit", flush=True)
        for _, faults_of_it in rounds:
            faults_of_it.close()
    print("\n".join(f"{count} x {fault}" for fault, count in sorted(counts.items())))


if __name__ == "__main__":
    main()
