# SPDX-License-Identifier: Apache-2.0
"""Runs parts and writes down each row as it comes; see `benchmarks/gpu.sh`.

A row that is there is not run again: after a crash, start the part once more. Exit status: 0; 1
where a result is wrong (`--report`); 2 for wrong arguments; 3 after an error that leaves the GPU
unusable for this process.
"""

import argparse
import datetime
import json
import pathlib
import platform
import sys
import time

import jax

from benchmarks.gpu import check, report, speed

LATE = "not run: out of time"
PARTS = {part: check.rows for part in check.CASES}
PARTS |= {part: speed.rows for part in ("time-attention", "time-decode", "time-grouped")}


def run(part: str, out: pathlib.Path, smoke: bool, until: float) -> bool:
    """Every row of `part` that is not in `out` yet. False: the GPU has to be opened anew."""
    done = {
        row["name"] for row in report.read(out) if row["part"] == part and row.get("failed") != LATE
    }
    for name, function in PARTS[part](part, smoke):
        if name in done:
            continue
        begun = {"part": part, "name": name}
        if time.time() > until:
            report.add(out, begun | {"failed": LATE})
            continue
        report.add(out, begun | {"failed": "did not come back: a crash, or the time ran out"})
        start = time.perf_counter()
        try:
            row = function()
        except Exception as error:  # a case that fails is a line of the table
            row = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        row["seconds"] = round(time.perf_counter() - start, 2)
        report.add(out, begun | row)
        print(report.line(begun | row), flush=True)
        lost = "CUDA_ERROR_" in row.get("failed", "") and "OUT_OF_MEMORY" not in row["failed"]
        if lost:
            return False
    return True


def about(smoke: bool) -> dict:
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "device": device.device_kind,
        "note": "Interpreted on a CPU: the times below measure nothing." if smoke else "",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jax.lib.__version__,
            "platform": device.client.platform_version.replace("\n", " "),
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("out", type=pathlib.Path, help="folder for rows.jsonl, report.{json,md}")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--smoke", action="store_true", help="tiny and interpreted, on CPU")
    parser.add_argument("--until", type=float, default=float("inf"), help="Unix time to stop at")
    parser.add_argument("--report", action="store_true", help="only say what is wrong so far")
    args = parser.parse_args()
    if not args.report:
        if args.smoke:
            jax.config.update("jax_platforms", "cpu")
        elif jax.default_backend() != "gpu":
            parser.error(f"needs a GPU; jax found {jax.default_backend()}. On CPU use --smoke")
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "about.json").write_text(json.dumps(about(args.smoke), indent=1))
        for part in args.parts:
            if not run(part, args.out, args.smoke, args.until):
                report.write(args.out)
                return 3
    wrong = report.write(args.out)
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    return int(bool(wrong) and args.report)


if __name__ == "__main__":
    sys.exit(main())
