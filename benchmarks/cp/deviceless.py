# SPDX-License-Identifier: Apache-2.0
"""Predicted times on TPU slices that are not there, every strategy beside tokamax's ring.

    python -m benchmarks.cp.deviceless --out benchmarks/results

Compiles for ten minutes of two cores; needs libtpu and tokamax (pip install jaxcp[bench], Python
3.12 or newer). With `--counts` it compiles nothing: what a cp_deviceless.json holds goes through
the model once more.
"""

import dataclasses
import datetime
import json
import pathlib
import subprocess
import sys
import tempfile

import tyro
from rich.progress import track

from benchmarks.cp import model
from benchmarks.cp.links import Torus
from benchmarks.cp.programs import HEAD_DIM, HEADS, KV_HEADS
from benchmarks.tables import RESULTS, table, versions, write
from jaxcp.compile.target import parse_target

K = 1024
CASES = (
    ("v5p:2x2x4", 32 * K),
    ("v5p:4x4x4", 64 * K),
    ("v5p:4x4x4", 128 * K),
    ("v5p:4x4x4", 256 * K),
    ("v6e:2x4", 128 * K),
    ("tpu7x:2x2x1", 128 * K),
)
CHIPS = ("v5p", "v6e", "tpu7x")
BEST_BAR, RING_BAR, FROM = 0.6, 1.05, 16 * K
SHOWN = {"forward": "forward", "both": "forward+backward"}


@dataclasses.dataclass
class Args:
    out: pathlib.Path | None = None
    """A folder for cp_deviceless.json and .md; None prints alone."""
    chips: tuple[str, ...] = CHIPS
    counts: pathlib.Path | None = None
    """A cp_deviceless.json whose counts are taken instead of compiling."""


def compiled(chips: tuple[str, ...]) -> list[dict]:
    """Run `compiled.py`, each chip in a process of its own."""
    rows = []
    for chip in track(chips, description="compiling"):
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder) / "rows.json"
            command = [sys.executable, "-m", "benchmarks.cp.compiled", chip, str(out)]
            done = subprocess.run(command, cwd=RESULTS.parents[1], capture_output=True, text=True)
            if done.returncode:
                error = f"the run failed: {done.stderr[-200:]}"
                rows.append({"chip": chip, "whose": "", "strategy": "", "error": error})
            rows += json.loads(out.read_text()) if out.exists() else []
    return rows


def predict(counts: list[dict], cases=CASES) -> list[dict]:
    """A row a slice, length, pass and contender, from what was compiled."""
    rows = []
    for name, length in cases:
        target = parse_target(name)
        of_chip = [row for row in counts if row["chip"] == target.kind]
        if not of_chip:
            continue
        torus = Torus.of(target)
        case = model.Case(torus, length // target.size, of_chip)
        online = model.Case(torus, length // target.size, of_chip, bounded=False)
        other = {label: times for _, label, times in model.times(online)}
        for whose, label, times in model.times(case):
            row = {"slice": name, "length": length, "tokens": case.tokens}
            row |= {"whose": whose, "label": label}
            if isinstance(times, str):
                rows.append(row | {"error": times})
                continue
            for which, total in passes(times).items():
                found_online = passes(other[label])[which].total
                numbers = dataclasses.asdict(total) | {"limit": total.limit}
                rows.append(row | {"pass": which, "online": found_online} | numbers)
    return rows


def passes(times: dict) -> dict:
    return {"forward": times["forward"], "both": times["forward"] + times["backward"]}


def bars(rows: list[dict]) -> list[dict]:
    """Our best against tokamax's ring, and our ring against our all-gather, case by case."""
    compared = []
    for name, length in CASES:
        for which in SHOWN:
            of_case = [
                r for r in rows
                if (r["slice"], r["length"], r.get("pass")) == (name, length, which)
            ]  # fmt: skip
            ours = {r["label"]: r["total"] for r in of_case if r["whose"] == "ours"}
            if not ours:
                continue
            what = f"{name}, {length // K}K, {SHOWN[which]}"
            best = min(ours, key=lambda label: ours[label])
            theirs = [r["total"] for r in of_case if r["whose"] == "tokamax"]
            said = f"{best} / tokamax's ring"
            compared.append(bar(what, said, ours[best] / theirs[0] if theirs else None, BEST_BAR))
            if length // parse_target(name).size >= FROM:
                around, gathered = (
                    min((x for x in ours if x.startswith(kind)), key=lambda x: ours[x])
                    for kind in ("Ring", "AllGather")
                )
                ratio = ours[around] / ours[gathered]
                compared.append(bar(what, f"{around} / {gathered}", ratio, RING_BAR))
    return compared


def bar(what: str, said: str, ratio: float | None, limit: float) -> dict:
    reached = ratio is not None and ratio <= limit
    return {"what": what, "ratio_of": said, "ratio": ratio, "bar": limit, "reached": reached}


def markdown(report: dict) -> str:
    bars = [
        [
            x["what"],
            x["ratio_of"],
            "none" if x["ratio"] is None else f"{x['ratio']:.2f}",
            f"{x['bar']:g}",
            "reached" if x["reached"] else "**not reached**",
        ]
        for x in report["bars"]
    ]
    good = sum(x["reached"] for x in report["bars"])
    parts = [
        f"{HEADS} query heads, {KV_HEADS} KV heads, D={HEAD_DIM}, bfloat16, batch 1, causal (Llama "
        "3 8B). The model, its assumptions and what overlaps: `benchmarks/cp/model.py`. Bundles "
        "are trusted to about 10 %. Limit is what most of the time goes to: MXU (the matrix units' "
        "peak), bundles (other units), skipping (steps of the grid with nothing to do), "
        "glue (XLA between kernels), wire (what is not hidden). Running maximum: the time where no "
        "bound on the scores spares ours the maximum; tokamax always looks for it.",
        f"{good} of {len(bars)} bars are reached.",
        table(("what", "of", "ratio", "bar", ""), bars),
    ]
    for name, length in CASES:
        of_case = [r for r in report["rows"] if (r["slice"], r["length"]) == (name, length)]
        if of_case:
            title = f"{name}, {length // K}K tokens, {of_case[0]['tokens']:,} a device"
            parts += [f"### {title}", case_table(of_case)]
    return "\n\n".join([*parts, "### What was compiled", compiled_table(report["found"])])


def case_table(rows: list[dict]) -> str:
    head = ["", "pass", "ms", "of tokamax", "running maximum, ms"]
    head += ["blocks, ms", "skipped, ms", "glue, ms", "wire, ms", "limit"]
    lines = []
    for which, said in SHOWN.items():
        these = sorted((r for r in rows if r.get("pass") == which), key=lambda r: r["total"])
        theirs = [r["total"] for r in these if r["whose"] == "tokamax"]
        for r in these:
            parts = (f"{1e3 * r[x]:.2f}" for x in ("online", "works", "skips", "glue", "wire"))
            label = r["label"] if r["whose"] == "ours" else "tokamax ring"
            ratio = f"{r['total'] / theirs[0]:.2f}" if theirs else ""
            lines.append([label, said, f"{1e3 * r['total']:.2f}", ratio, *parts, r["limit"]])
    lines += [[f"{r['whose']} {r['label']}", r["error"]] for r in rows if "error" in r]
    return table(head, lines)


def compiled_table(counts: list[dict]) -> str:
    head = ["chip", "program, tokens a device x devices", "hot bundles, forward", "backward"]
    head += ["glue of a pass or turn, MB", "XLA expects, thousand cycles"]
    head += ["sent a device, forward+backward"]
    lines = []
    for row in counts:
        about = f"{row['whose']} {row['strategy']}"
        if "error" in row:
            lines.append([row["chip"], about, row["error"]])
            continue
        glue = {
            f"{what} {part}": value
            for what, parts in row["glue"].items()
            for part, value in parts.items()
            if value["ops"]
        }
        glues = (
            ", ".join(f"{name} {value[key] / unit:,.0f}" for name, value in glue.items())
            for key, unit in (("hbm_bytes", 1e6), ("cycles", 1e3))
        )
        sent = (f"{c['count']} {c['kind']} {c['bytes'] / 1e6:,.1f} MB" for c in row["collectives"])
        about += f", {row['tokens']:,} x {row['devices']}"
        hot = bundles(row["kernels"], "forward", "fwd"), bundles(row["kernels"], "backward", "dkv")
        lines.append([row["chip"], about, *hot, *glues, ", ".join(sent)])
    return table(head, lines)


def bundles(kernels: dict, *names: str) -> str:
    """List the bundles of every hot region, in the order of the code."""
    hot = [k["hot"] for name, k in kernels.items() if any(x in name for x in names)]
    return ", ".join(f"{h['bundles']:,}" for k in hot for h in sorted(k, key=lambda h: h["first"]))


def main(args: Args) -> None:
    if args.counts is None:
        counts, made = compiled(args.chips), datetime.date.today().isoformat()
        made += f", {versions('jax', 'jaxlib', 'libtpu', 'tokamax')}"
    else:
        kept = json.loads(args.counts.read_text())
        counts, made = kept["found"], kept["compiled"]
    rows = predict(counts)
    report = {"compiled": made, "bars": bars(rows), "rows": rows, "found": counts}
    about = f"`python -m benchmarks.cp.deviceless`, compiled {made}."
    title = "# Context parallelism on TPUs that are not there"
    write(args.out, "cp_deviceless.md", "\n\n".join([title, about, markdown(report)]))
    if args.out is not None:
        (args.out / "cp_deviceless.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
