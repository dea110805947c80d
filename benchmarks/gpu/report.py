# SPDX-License-Identifier: Apache-2.0
"""Rows as they come, the tables that are made of them, and the goals."""

import json
import pathlib

from benchmarks.tables import table

# Name, rows that are compared (theirs and ours are milliseconds), least ratio.
LONG = "B1 T16384 N32/32 H128 causal"
HY3 = "grouped 192 x 4096 x 1536, 512 tokens an expert, bfloat16"
GOALS = (
    ("forward, D=128, 16k causal, of Pallas' kernel", f"{LONG} forward", None, "pallas mha", 1.15),
    (
        "backward, D=128, 16k causal, of Pallas' kernel",
        f"{LONG} forward+backward",
        f"{LONG} forward",
        "pallas mha",
        1.1,
    ),
    ("grouped matmul, of lax.ragged_dot", f"{HY3} forward", None, "lax.ragged_dot", 5.0),
)


def add(out: pathlib.Path, row: dict) -> None:
    with open(out / "rows.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def read(out: pathlib.Path) -> list[dict]:
    """The last that was written of each row."""
    path = out / "rows.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    latest: dict = {}
    for row in map(json.loads, lines):
        latest[row["part"], row["name"]] = row
    return list(latest.values())


def line(row: dict) -> str:
    """Summarize a row in a few words."""
    if "failed" in row:
        return f"{row['name']}: FAILED {row['failed'].splitlines()[0][:120]}"
    if "ms" in row:
        return f"{row['name']}: {row['ms']:.3f} ms, {row['tflops']:.1f} TFLOP/s"
    return f"{row['name']}: {_verdict(row)}"


def goals(rows: list[dict]) -> list[dict]:
    """Each goal with the ratio found; None where one of the two was not measured."""
    ms = {(row["case"], row["contender"]): row["ms"] for row in rows if "ms" in row}

    def took(case, less, contender):
        parts = [ms.get((name, contender)) for name in (case, less) if name is not None]
        if None in parts:
            return None
        return parts[0] - sum(parts[1:])

    ratios = []
    for name, case, less, other, least in GOALS:
        ours, theirs = (took(case, less, contender) for contender in ("ours", other))
        ratio = theirs / ours if ours and theirs else None
        ratios.append({"goal": name, "least": least, "ratio": ratio})
    return ratios


def wrong(rows: list[dict]) -> list[str]:
    """Checks that found something, or that did not run to their end."""
    checks = [row for row in rows if row["part"].startswith("check")]
    return [line(row) for row in checks if row.get("problems") or "failed" in row]


def write(out: pathlib.Path) -> list[str]:
    """report.json and report.md from the rows so far; what is wrong."""
    rows = read(out)
    about = json.loads((out / "about.json").read_text())
    report = about | {"goals": goals(rows), "rows": rows, "wrong": wrong(rows)}
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "report.md").write_text(markdown(report) + "\n")
    return report["wrong"]


def markdown(report: dict) -> str:
    named = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    goals = [
        [goal["goal"], goal["least"], f"{goal['ratio']:.2f}" if goal["ratio"] else "not measured"]
        for goal in report["goals"]
    ]
    checks, times = [], []
    for row in report["rows"]:
        if row["part"].startswith("check"):
            worst = max(row.get("errors", {}).values(), default=None)
            error = "" if worst is None else f"{worst:.1e}"
            checks.append([row["part"], row["name"], error, _verdict(row)])
            continue
        case, contender = row["name"].split(" | ")
        if "failed" in row:
            times.append([case, contender, _verdict(row)])
            continue
        limit = f"{row['of_peak']:.0%}" if "of_peak" in row else ""
        span = f"{row['ms']:.3f} ({row['ms_min']:.3f}, {row['ms_max']:.3f})"
        speeds = f"{row['tflops']:.1f}", f"{row['gbytes']:.0f}"
        times.append([case, contender, span, *speeds, limit])
    head = ("case", "contender", "median ms (min, max)", "TFLOP/s", "GB/s", "of the limit")
    parts = [
        f"# The Triton kernels on {report['device']}, {report['date']}",
        named,
        report["note"],
        table(("goal", "at least", "found"), goals),
        "Against float64; the error is of the worst result, relative in the 2-norm.",
        table(("part", "case", "error", ""), checks),
        table(head, times),
    ]
    return "\n\n".join(part for part in parts if part)


def _verdict(row: dict) -> str:
    said = row.get("failed"), "; ".join(row.get("problems", [])), "right"
    text = next(text for text in said if text)
    return text.splitlines()[0][:120]
