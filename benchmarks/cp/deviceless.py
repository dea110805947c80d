# SPDX-License-Identifier: Apache-2.0
"""Predicted times on slices that are not there: what is compiled, the model's rows, their table."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable

from benchmarks.cp import model
from benchmarks.cp.links import Torus
from benchmarks.cp.programs import HEAD_DIM, HEADS, KV_HEADS
from jaxcp.compile.target import parse_target

ROOT = pathlib.Path(__file__).resolve().parents[2]
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


def compiled(
    chips: tuple[str, ...], known: list[dict], progress: Callable = lambda _: None
) -> list[dict]:
    """Run `compiled.py`, each chip in a process of its own; `known` rows are kept."""
    rows = []
    for chip in chips:
        progress(f"{chip}: compile")
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder) / "rows.json"
            out.write_text(json.dumps([row for row in known if row["chip"] == chip]))
            command = [sys.executable, "-m", "benchmarks.cp.compiled", chip, str(out)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                error = f"the run failed: {done.stderr[-200:]}"
                rows.append({"chip": chip, "whose": "", "strategy": "", "error": error})
            rows += json.loads(out.read_text())
    return rows


def predict(counts: list[dict], progress: Callable = lambda _: None, cases=CASES) -> list[dict]:
    """A row a slice, length, pass and contender, from what was compiled."""
    rows = []
    for name, length in cases:
        target = parse_target(name)
        of_chip = [row for row in counts if row["chip"] == target.kind]
        if not of_chip:
            continue
        progress(f"{name}, {length // K}K")
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


def markdown(report: dict) -> list[str]:
    rows = report["rows"]
    good = sum(x["reached"] for x in report["bars"])
    lines = [
        f"{HEADS} query heads, {KV_HEADS} KV heads, D={HEAD_DIM}, bfloat16, batch 1, causal (Llama "
        "3 8B). The model, its assumptions and what overlaps: `benchmarks/cp/model.py`. Bundles "
        "are trusted to about 10 %. Limit is what most of the time goes to: MXU (the matrix units' "
        "peak), bundles (other units), skipping (steps of the grid with nothing to do), "
        "glue (XLA between kernels), wire (what is not hidden). Running maximum: the time where no "
        "bound on the scores spares ours the maximum; tokamax always looks for it.",
        "",
        f"{good} of {len(report['bars'])} bars are reached.",
        "",
        "| what | of | ratio | bar | |",
        "|---|---|---|---|---|",
    ]
    for x in report["bars"]:
        ratio = "none" if x["ratio"] is None else f"{x['ratio']:.2f}"
        verdict = "reached" if x["reached"] else "**not reached**"
        lines.append(f"| {x['what']} | {x['ratio_of']} | {ratio} | {x['bar']:g} | {verdict} |")
    for name, length in CASES:
        of_case = [r for r in rows if (r["slice"], r["length"]) == (name, length)]
        if of_case:
            lines += case_table(name, length, of_case)
    return [*lines, *compiled_table(report["found"])]


def case_table(name: str, length: int, rows: list[dict]) -> list[str]:
    lines = ["", f"### {name}, {length // K}K tokens, {rows[0]['tokens']:,} a device", ""]
    lines += [
        "| | pass | ms | of tokamax | running maximum, ms | blocks, ms | skipped, ms | "
        "glue, ms | wire, ms | limit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for which, said in SHOWN.items():
        these = sorted((r for r in rows if r.get("pass") == which), key=lambda r: r["total"])
        theirs = [r["total"] for r in these if r["whose"] == "tokamax"]
        for r in these:
            cells = [
                r["label"] if r["whose"] == "ours" else "tokamax ring",
                said,
                f"{1e3 * r['total']:.2f}",
                f"{r['total'] / theirs[0]:.2f}" if theirs else "",
                *(f"{1e3 * r[x]:.2f}" for x in ("online", "works", "skips", "glue", "wire")),
                r["limit"],
            ]
            lines.append(f"| {' | '.join(cells)} |")
    for r in rows:
        if "error" in r:
            lines.append(f"| {r['whose']} {r['label']} | {r['error']} | | | | | | | | |")
    return lines


def compiled_table(counts: list[dict]) -> list[str]:
    lines = [
        "",
        "### What was compiled",
        "",
        "| chip | program, tokens a device x devices | hot bundles, forward | backward | glue of a "
        "pass or turn, MB | XLA expects, thousand cycles | sent a device, forward+backward |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in counts:
        about = f"{row['whose']} {row['strategy']}"
        if "error" in row:
            lines.append(f"| {row['chip']} | {about} | {row['error']} | | | | |")
            continue
        about += f", {row['tokens']:,} x {row['devices']}"
        glue = {
            f"{what} {part}": value
            for what, parts in row["glue"].items()
            for part, value in parts.items()
            if value["ops"]
        }
        cells = [
            row["chip"],
            about,
            bundles(row["kernels"], "forward", "fwd"),
            bundles(row["kernels"], "backward", "dkv"),
            ", ".join(f"{k} {v['hbm_bytes'] / 1e6:,.0f}" for k, v in glue.items()),
            ", ".join(f"{k} {v['cycles'] / 1e3:,.0f}" for k, v in glue.items()),
            ", ".join(
                f"{c['count']} {c['kind']} {c['bytes'] / 1e6:,.1f} MB" for c in row["collectives"]
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def bundles(kernels: dict, *names: str) -> str:
    """List the bundles of every hot region, in the order of the code."""
    hot = [k["hot"] for name, k in kernels.items() if any(x in name for x in names)]
    return ", ".join(f"{h['bundles']:,}" for k in hot for h in sorted(k, key=lambda h: h["first"]))
