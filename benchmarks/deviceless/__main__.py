# SPDX-License-Identifier: Apache-2.0
"""All bars, as a table: `python -m benchmarks.deviceless`. Exits with 1 below a bar.

Writes deviceless.json and deviceless.md into benchmarks/results/ (or --out).
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata

from benchmarks.deviceless import bars
from jaxcp.compile import gpu_code

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHIPS = ("v6e", "tpu7x", "v5p", "v5e", "rtx-pro-6000")
WHEELS = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "tokamax")


def measure(chip: str, folder: str) -> list[dict]:
    """Rows of one chip, from a process of its own: libtpu and XLA take their flags once."""
    out = f"{folder}/{chip}.json"
    start = time.perf_counter()
    kind = ["gpu", out] if chip == "rtx-pro-6000" else ["tpu", chip, out]
    for module, *arguments in (kind, ["compile_time", chip, out]):
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.deviceless.{module}", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            print(done.stderr[-3000:], file=sys.stderr)
            return [{"chip": chip, "op": "", "error": f"the run failed: {done.stderr[-200:]}"}]
    print(f"{chip}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return json.loads(pathlib.Path(out).read_text())


def zigzag() -> list[dict]:
    """The plan of blocks needs no chip: block sizes are those of D=128."""
    import jax.numpy as jnp

    from benchmarks.deviceless.zigzag import count
    from pallas_kernels.flash_attention import tuning

    rows = []
    for op, chip in (("triton_forward", "SM120"), ("mosaic_forward", "TPU")):
        block = tuning.blocks(op, 128, jnp.bfloat16, interpret=False)
        sizes = {"block_q": block.q, "block_kv": block.kv}
        rows.append({"chip": chip, "op": "zigzag"} | sizes | count(block.q, block.kv))
    return rows


def versions() -> dict[str, str]:
    named = {"python": platform.python_version()}
    for name in WHEELS:
        try:
            named[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            named[name] = "not there"
    for tool in gpu_code.TOOLS:
        try:
            named[tool] = gpu_code.tool_version(tool)
        except FileNotFoundError:
            named[tool] = "not there"
    return named


def markdown(report: dict) -> str:
    names = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    good = sum(row["reached"] for row in report["rows"])
    lines = [
        "# Kernels compiled for chips that are not there",
        "",
        "`make bench-deviceless`. Counts of machine code, not measurements: bundles of a TPU tile "
        "are cycles where DMA is hidden; instructions of a GPU loop are a necessary condition.",
        "",
        names,
        "",
        f"Chips of this run: {', '.join(report['chips'])}.",
        "",
        f"{good} of {len(report['rows'])} bars are reached.",
        "",
        "| what | value | bar | | against | detail |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        value = "none" if row["value"] is None else f"{row['value']:.4g} {row['unit']}"
        cells = (
            row["what"],
            value,
            f"{row['bar']:g}",
            "reached" if row["reached"] else "**not reached**",
            row["against"],
            row["detail"].replace("|", "/").replace("\n", " "),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--chips", nargs="*", default=CHIPS, choices=CHIPS)
    parser.add_argument("--picture", type=pathlib.Path, help="draw what a tile costs into this PNG")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ThreadPoolExecutor(2) as two,
    ):
        parts = list(two.map(lambda chip: measure(chip, folder), args.chips))
    counts = [row for part in parts for row in part] + zigzag()
    rows = [
        dataclasses.asdict(row) | {"reached": row.reached}
        for row in bars.rows(counts, tuple(args.chips))
    ]
    report = {"versions": versions(), "chips": list(args.chips), "rows": rows, "found": counts}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "deviceless.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "deviceless.md").write_text(markdown(report))
    print(markdown(report))
    if args.picture:
        from benchmarks.deviceless.picture import draw

        draw(report, args.picture)
    if report["versions"]["tokamax"] == "not there":
        print("tokamax is not there: it needs Python 3.12 or newer", file=sys.stderr)
    return int(not all(row["reached"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
