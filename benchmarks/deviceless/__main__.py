# SPDX-License-Identifier: Apache-2.0
"""All bars, as a table: `python -m benchmarks.deviceless`. Exits with 1 below a bar.

Needs libtpu, the CUDA plugin, ptxas and nvdisasm, and tokamax to compare with (pip install
jaxcp[bench], Python 3.12 or newer); ten minutes of two cores.
"""

import concurrent.futures
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import tyro

from benchmarks.deviceless import bars
from benchmarks.tables import RESULTS, table, versions, write

WHEELS = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "tokamax")
WHEELS += ("nvidia-cuda-nvcc", "nvidia-cuda-nvdisasm")  # ptxas and nvdisasm


@dataclasses.dataclass
class Args:
    out: pathlib.Path | None = None
    """A folder for deviceless.md; None prints alone."""
    chips: tuple[str, ...] = (*bars.TPUS, bars.GPU)
    picture: pathlib.Path | None = None
    """A PNG, into which is drawn what a tile costs."""


def measure(chip: str, folder: str) -> list[dict]:
    """Rows of one chip, from a process of its own: libtpu and XLA take their flags once."""
    out, start = pathlib.Path(folder, f"{chip}.json"), time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.deviceless.chip", chip, str(out)]
    done = subprocess.run(command, cwd=RESULTS.parents[1], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        return [{"chip": chip, "op": "", "error": f"the run failed: {done.stderr[-200:]}"}]
    print(f"{chip}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return json.loads(out.read_text())


def markdown(rows: list[bars.Row], chips: tuple[str, ...]) -> str:
    lines = []
    for row in rows:
        value = "none" if row.value is None else f"{row.value:.4g} {row.unit}"
        verdict = "reached" if row.reached else "**not reached**"
        lines.append([row.what, value, f"{row.bar:g}", verdict, row.against, row.detail])
    parts = [
        "# Kernels compiled for chips that are not there",
        "`make bench-deviceless`. Counts of machine code, not measurements: bundles of a TPU tile "
        "are cycles where DMA is hidden; instructions of a GPU loop are a necessary condition.",
        versions(*WHEELS),
        f"Chips of this run: {', '.join(chips)}.",
        f"{sum(row.reached for row in rows)} of {len(rows)} bars are reached.",
        table(("what", "value", "bar", "", "against", "detail"), lines),
    ]
    return "\n\n".join(parts)


def main(args: Args) -> int:
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ThreadPoolExecutor(2) as two,
    ):
        parts = list(two.map(lambda chip: measure(chip, folder), args.chips))
    counts = [row for part in parts for row in part]
    rows = bars.rows(counts, args.chips)
    write(args.out, "deviceless.md", markdown(rows, args.chips))
    if args.picture:
        from benchmarks.deviceless.picture import draw

        draw(counts, rows, args.picture)
    return int(not all(row.reached for row in rows))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
