# SPDX-License-Identifier: Apache-2.0
"""Wall clock and errors on four emulated CPU devices, ours beside the package `ringattention`.

    python -m benchmarks.cp.cpu --out benchmarks/results

Minutes, on a machine with nothing else to do. Four devices share two cores, one thread a device.
Rounds go over all contenders, so that a busy moment hits all alike. What cannot be imported or run
is a row that says why; `pip install jaxcp[bench]` brings the package.
"""

import dataclasses
import datetime
import functools
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable

import jax
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.progress import track

from benchmarks.cp import problem
from benchmarks.cp.contenders import GROUPS, Contender
from benchmarks.tables import table, versions, write

CORES = 2
# Most that out and gradients may be off: beyond it is another function.
WRONG = {"float32": (1e-4, 1e-3), "bfloat16": (0.05, 0.1)}
COLUMNS = ("forward, ms", "forward+backward, ms", "error of out", "error of gradients")


@dataclasses.dataclass
class Args:
    out: pathlib.Path | None = None
    """A folder for cp_cpu.md; None prints alone."""
    tokens: int = 2048
    rounds: int = 7


def race(tokens: int, rounds: int, groups: Iterable[str] = tuple(GROUPS)) -> list[dict]:
    """A row a contender: COLUMNS, times as medians, or the error that it ended with."""
    rows: list[dict] = []
    running: list[tuple[list[float], Callable]] = []
    for group in groups:
        try:
            contenders = list(GROUPS[group](tokens))
        except (ImportError, AttributeError) as error:  # not installed, or of another jax
            rows.append({"name": group, "error": f"{type(error).__name__}: {error}"})
            continue
        for one in contenders:
            row = {"name": one.name, "dtype": one.dtype, "note": one.note}
            rows.append(row)
            try:
                passes = compiled(one, tokens)
                row |= errors(one, tokens, passes[-1])
            except Exception as error:  # one that fails is a line of the table
                row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
                continue
            row |= {column: [] for column in COLUMNS[:2]}
            running += zip((row[column] for column in COLUMNS[:2]), passes, strict=True)
    for _ in track(range(rounds + 1), description="rounds"):
        for times, function in running:
            start = time.perf_counter()
            jax.block_until_ready(function())
            times.append(1e3 * (time.perf_counter() - start))
    for row in rows:
        for column in COLUMNS[:2]:
            if column in row:
                row[column] = statistics.median(row[column][1:])  # the first one warms up
    return rows


def compiled(one: Contender, tokens: int) -> tuple[Callable, Callable]:
    """Compile the forward pass, and forward and backward; each runs on inputs that lie there."""

    def both(q, k, v, dout):
        out, pull = jax.vjp(one.layer, q, k, v)
        return out, *pull(dout)

    mesh = Mesh(jax.devices()[: problem.RANKS], ("seq",))
    spec = NamedSharding(mesh, P(None, "seq"))
    with jax.set_mesh(mesh):
        arrays = problem.inputs(tokens, one.dtype).values()
        q, k, v, dout = (jax.device_put(x[:, one.order].astype(one.dtype), spec) for x in arrays)
        forward = jax.jit(one.layer).lower(q, k, v).compile()
        backward = jax.jit(both).lower(q, k, v, dout).compile()
    return lambda: forward(q, k, v), lambda: backward(q, k, v, dout)


@functools.cache
def exact(tokens: int, dtype: str) -> tuple[np.ndarray, ...]:
    return tuple(problem.exact(problem.inputs(tokens, dtype)).values())


def errors(one: Contender, tokens: int, both: Callable) -> dict[str, float]:
    """The greatest differences from float64 of the same inputs."""
    natural = np.argsort(one.order)
    expected = exact(tokens, one.dtype)
    off = [
        float(np.abs(np.asarray(x, np.float64)[:, natural] - y).max())
        for x, y in zip(both(), expected, strict=True)
    ]
    return dict(zip(COLUMNS[2:], (off[0], max(off[1:])), strict=True))


def wrong(row: dict) -> list[str]:
    """The columns of a row whose error is above the limit."""
    limits = zip(COLUMNS[2:], WRONG[row["dtype"]], strict=True)
    return [column for column, limit in limits if not row[column] <= limit]


def winners(rows: list[dict]) -> dict[str, float]:
    """The least of each column, of rows that are right."""
    right = [row for row in rows if not wrong(row)]
    return {column: min(row[column] for row in right) for column in COLUMNS} if right else {}


def markdown(tokens: int, rounds: int, rows: list[dict]) -> str:
    ran = [row for row in rows if "error" not in row]
    lines = []
    for dtype in WRONG:
        of_dtype = [row for row in ran if row["dtype"] == dtype]
        best = winners(of_dtype)
        for row in of_dtype:
            texts = [f"{row[x]:.1f}" if x in COLUMNS[:2] else f"{row[x]:.1e}" for x in COLUMNS]
            first = [not wrong(row) and row[x] == best[x] for x in COLUMNS]
            cells = [f"**{x}**" if bold else x for x, bold in zip(texts, first, strict=True)]
            notes = [row["note"], *(f"wrong {x}" for x in wrong(row))]
            lines.append([row["name"], *cells, "; ".join(notes)])
    lines += [[row["name"], "", "", "", "", row["error"]] for row in rows if "error" in row]
    return "\n".join(
        [
            "# Context parallelism on CPU, beside a package that runs there",
            "",
            f"`python -m benchmarks.cp.cpu`, {datetime.date.today()}. "
            f"{versions('jax', 'jaxlib', 'ringattention')}.",
            "",
            f"{problem.RANKS} devices on {CORES} cores, B1 S{tokens} H{problem.HEADS} "
            f"D{problem.HEAD_DIM}, causal. Medians of {rounds} rounds that go over all contenders. "
            "Errors are the greatest against float64 of the same inputs. The first of each column "
            "is bold, of those with right results, float32 and bfloat16 apart.",
            "",
            table(("", *COLUMNS, "note"), lines),
        ]
    )


def main(args: Args) -> None:
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"  # one thread a device
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", problem.RANKS)
    rows = race(args.tokens, args.rounds)
    write(args.out, "cp_cpu.md", markdown(args.tokens, args.rounds, rows))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
