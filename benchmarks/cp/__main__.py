# SPDX-License-Identifier: Apache-2.0
"""Context parallelism beside others: `python -m benchmarks.cp [deviceless] [cpu] [emulation]`.

Each part writes cp_PART.json and cp_PART.md into benchmarks/results/ (or --out). `deviceless` needs
libtpu and tokamax (pip install jaxcp[bench], Python 3.12 or newer) and takes ten minutes of two
cores; `cpu` needs what benchmarks/cp/requirements.txt names. `cpu` and `emulation` measure time:
on a machine with nothing else to do, four minutes. `make bench-cp` makes both environments.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata

from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGES = {
    "deviceless": ("jax", "jaxlib", "libtpu", "tokamax"),
    "cpu": (
        "jax", "jaxlib", "ringattention", "torch", "ring-attention-pytorch", "ring-flash-attn",
        "yunchang",
    ),
    "emulation": ("jax", "jaxlib"),
}  # fmt: skip
TITLES = {
    "deviceless": "Context parallelism on TPUs that are not there",
    "cpu": "Context parallelism on CPU, beside the packages that run there",
    "emulation": "Context parallelism emulated on CPU",
}


def versions(part: str) -> str:
    named = [f"python {platform.python_version()}"]
    for name in PACKAGES[part]:
        try:
            named.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            named.append(f"{name} not installed")
    return ", ".join(named)


def deviceless(args, progress: Callable) -> tuple[dict, Callable]:
    from benchmarks.cp import deviceless

    compiled = []
    for path in args.counts or ():
        counts = json.loads(path.read_text())
        compiled += counts if isinstance(counts, list) else counts["found"]
    if not compiled or args.complete:
        compiled = deviceless.compiled(args.chips or deviceless.CHIPS, compiled, progress)
    rows = deviceless.predict(compiled, progress)
    report = {"rows": rows, "bars": deviceless.bars(rows), "found": compiled}
    return report, deviceless.markdown


def cpu(args, progress: Callable) -> tuple[dict, Callable]:
    from benchmarks.cp import cpu, race

    groups = tuple(args.groups or race.GROUPS)
    races = [
        {"tokens": tokens, "rounds": args.rounds}
        | {"rows": race.race(tokens, args.rounds, groups, progress)}
        for tokens in args.tokens
    ]
    return {"races": races}, lambda report: [
        line for one in report["races"] for line in cpu.race_table(**one)
    ]


def emulation(args, progress: Callable) -> tuple[dict, Callable]:
    from benchmarks.cp import cpu
    from benchmarks.cp.emulation import DEVICES

    tables = []
    for tokens in args.tokens:
        progress(f"{DEVICES} devices against 1, {tokens} tokens")
        command = [sys.executable, "-m", "benchmarks.cp.emulation", str(tokens), str(args.rounds)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}: {done.stderr[-3000:]}")
        rows = json.loads(done.stdout.splitlines()[-1])
        tables.append({"tokens": tokens, "rounds": args.rounds, "devices": DEVICES, "rows": rows})
    return {"found": tables}, lambda report: [
        line for one in report["found"] for line in cpu.emulation_table(**one)
    ]


PARTS = {"deviceless": deviceless, "cpu": cpu, "emulation": emulation}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cp",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="default: all")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--chips", nargs="*", help="deviceless: only these of v5p, v6e, tpu7x")
    parser.add_argument(
        "--counts",
        type=pathlib.Path,
        nargs="*",
        help="deviceless: compile nothing; take what a cp_deviceless.json holds, or files of "
        "`python -m benchmarks.cp.compiled CHIP FILE`, one chip each",
    )
    parser.add_argument(
        "--complete", action="store_true", help="deviceless: compile what --counts lacks"
    )
    parser.add_argument("--tokens", type=int, nargs="*", default=[2048], help="cpu, emulation")
    parser.add_argument("--rounds", type=int, default=7, help="cpu, emulation: (default: 7)")
    parser.add_argument(
        "--groups", nargs="*", help="cpu: only these packages (ours, yunchang, ...)"
    )
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    command = " ".join(["python -m benchmarks.cp", *sys.argv[1:]])
    args.out.mkdir(parents=True, exist_ok=True)
    columns = SpinnerColumn(), "{task.description}", TimeElapsedColumn()
    with Progress(*columns, transient=True) as bar:
        for part in args.parts or PARTS:
            task = bar.add_task(part)

            def progress(text: str, task=task, part=part) -> None:
                bar.update(task, description=f"{part}: {text}")

            report, table = PARTS[part](args, progress)
            about = {
                "command": command,
                "date": f"{datetime.date.today():%d %B %Y}",
                "versions": versions(part),
            }
            write(args.out, part, about | report, table)
            bar.remove_task(task)
    return 0


def write(out: pathlib.Path, part: str, report: dict, table: Callable) -> None:
    (out / f"cp_{part}.json").write_text(json.dumps(report, indent=1) + "\n")
    about = f"`{report['command']}`, {report['date']}. {report['versions']}."
    text = "\n".join([f"# {TITLES[part]}", "", about, "", *table(report)]) + "\n"
    (out / f"cp_{part}.md").write_text(text.replace("\n\n\n", "\n\n"))
    print(text)


if __name__ == "__main__":
    sys.exit(main())
