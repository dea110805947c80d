# SPDX-License-Identifier: Apache-2.0
"""Wall clock on emulated CPU devices, ours beside the peers that run there.

Every package is a group of processes of its own that waits for its turn: rounds go over all
contenders, so that a busy moment hits all alike. Four ranks share the same two cores, one thread a
rank. What cannot be installed, imported or run is a row that says why.
"""

import contextlib
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.cp import problem

ROOT = pathlib.Path(__file__).resolve().parents[2]
CORES = 2
JAX_GROUPS = ("ours", "ringattention")
TORCH_GROUPS = ("ring_flash_attn", "ring_attention_pytorch", "yunchang")
GROUPS = (*JAX_GROUPS, *TORCH_GROUPS)
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",  # one thread a device, as torch has
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
    "CUDA_VISIBLE_DEVICES": "",
}


class Group:
    """The processes of a package; the first one answers."""

    def __init__(self, name: str, tokens: int, folder: pathlib.Path):
        self.name = name
        ranks: list[tuple[str, ...]] = [()]
        module = "jax_contenders"
        if name in TORCH_GROUPS:
            port = free_port()
            module = "torch_contenders"
            ranks = [(str(rank), str(port)) for rank in range(problem.RANKS)]
        self.log = (folder / f"{name}.log").open("w+")
        command = [sys.executable, "-m", f"benchmarks.cp.{module}", name, str(tokens)]
        self.processes = [
            subprocess.Popen(
                [*command, *rank],
                cwd=ROOT,
                env=os.environ | ENVIRONMENT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if i == 0 else subprocess.DEVNULL,
                stderr=self.log,
                text=True,
            )
            for i, rank in enumerate(ranks)
        ]
        cores = sorted(os.sched_getaffinity(0))[:CORES]
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(process.pid, cores)

    def answer(self) -> dict:
        """The next line of the first process.

        Raises:
          RuntimeError: it ended instead; the message is its last words.
        """
        stdout = self.processes[0].stdout
        assert stdout is not None
        line = stdout.readline()
        if line:
            return json.loads(line)
        self.log.flush()
        self.log.seek(0)
        said = [x.strip() for x in self.log.read().splitlines() if x.strip()]
        errors = [x for x in said if "Error" in x]
        raise RuntimeError((errors or said or ["it ended without a word"])[-1][:200])

    def ask(self, *words: str) -> dict:
        for process in self.processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write("\t".join(words) + "\n")
                process.stdin.flush()
        answer = self.answer()
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self.log.close()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def race(
    tokens: int, rounds: int, groups: tuple[str, ...] = GROUPS, progress: Callable = lambda _: None
) -> list[dict]:
    """A row a contender: milliseconds (medians), errors against float64, bits that differ."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = pathlib.Path(name)
        rows, running = [], []
        for group in groups:  # one after the other: compiling side by side takes memory
            progress(f"{group}: start")
            one = Group(group, tokens, folder)
            stack.callback(one.close)
            try:
                for row in one.answer()["contenders"]:
                    rows.append({"group": group} | row)
                    running.append((one, rows[-1]))
            except RuntimeError as error:
                rows.append({"group": group, "name": group, "error": str(error)})
        progress("float64")
        exact = {
            dtype: problem.exact(problem.inputs(tokens, dtype)) for dtype in ("float32", "bfloat16")
        }
        for one, row in running:
            progress(f"{row['name']}: check")
            with failing(row):
                row |= checked(one, row["name"], exact[row["dtype"]], folder / "result.npz")
        for name, values in timed(running, rounds, progress).items():
            for row in rows:
                if row["name"] == name:
                    row["ms"] = values
    return rows


@contextlib.contextmanager
def failing(row: dict) -> Iterator[None]:
    """Put an error of a contender into its row."""
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        row["error"] = str(error)


def checked(one: Group, name: str, exact: dict, path: pathlib.Path) -> dict:
    share = one.ask("result", name, str(path))["differing"]
    with np.load(path) as result:
        errors = {x: float(np.abs(result[x] - exact[x]).max()) for x in result}
    return {"errors": errors, "differing": share}


def timed(running, rounds: int, progress: Callable) -> dict[str, dict[str, float]]:
    """Medians, `{name: {pass: ms}}`; contenders take turns. The first round warms up."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds + 1):
        progress(f"round {turn} of {rounds}")
        for one, row in running:
            for which in () if "error" in row else row["passes"]:
                with failing(row):
                    taken = one.ask(which, row["name"])["seconds"]
                    seconds.setdefault((row["name"], which), []).append(taken)
    medians: dict[str, dict[str, float]] = {}
    for (name, which), times in seconds.items():
        if len(times) > 1:
            medians.setdefault(name, {})[which] = 1e3 * statistics.median(times[1:])
    return medians
