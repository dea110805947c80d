# SPDX-License-Identifier: Apache-2.0
"""The table of the wall-clock race, and of what emulation costs."""

from benchmarks.cp import problem
from benchmarks.cp.race import CORES

# Most that float32 and bfloat16 may be off, outputs and gradients: beyond it is another function.
WRONG = {"float32": (1e-4, 1e-3), "bfloat16": (0.05, 0.1)}
COLUMNS = {
    "forward": "forward, ms",
    "both": "forward+backward, ms",
    "out": "error of out",
    "gradients": "error of gradients",
    "differing": "bits differ",
}


def values(row: dict) -> dict[str, float]:
    """The numbers of a row, by column."""
    errors = row.get("errors", {})
    columns = {**row.get("ms", {}), "out": errors.get("out"), "differing": row.get("differing")}
    if "both" in row.get("passes", ()):
        columns["gradients"] = max((x for name, x in errors.items() if name != "out"), default=None)
    return {name: x for name, x in columns.items() if x is not None}


def wrong(row: dict) -> list[str]:
    """The columns of a row whose error is above the limit."""
    limits = dict(zip(("out", "gradients"), WRONG[row["dtype"]], strict=True))
    measured = values(row)
    return [name for name, limit in limits.items() if not measured.get(name, 0.0) <= limit]


def winners(rows: list[dict]) -> dict[str, float]:
    """The least of each column, of rows whose results are right as far as the column goes."""
    best: dict[str, float] = {}
    for row in rows:
        if "error" in row:
            continue
        bad = wrong(row)
        for column, value in values(row).items():
            if "out" in bad or (bad and column in ("both", "gradients")):
                continue
            best[column] = min(best.get(column, value), value)
    return best


def race_table(tokens: int, rounds: int, rows: list[dict]) -> list[str]:
    lines = [
        "",
        f"### {problem.RANKS} ranks on {CORES} cores, B1 S{tokens} H{problem.HEADS} "
        f"D{problem.HEAD_DIM}, causal",
        "",
        f"Medians of {rounds} rounds that go over all contenders, one thread a rank. Errors are "
        "the greatest against float64 of the same inputs; bits differ: the share of outputs whose "
        "bits are not those of the same code on one device. The first of each column is bold, of "
        "those with right results, float32 and bfloat16 apart.",
        "",
        f"| | {' | '.join(COLUMNS.values())} | note |",
        f"|{'---|' * (len(COLUMNS) + 2)}",
    ]
    for dtype in WRONG:
        of_dtype = [row for row in rows if row.get("dtype") == dtype]
        best = winners(of_dtype)
        for row in of_dtype:
            lines.append(f"| {row['name']} | {' | '.join(cells(row, best))} |")
    for row in rows:
        if "dtype" not in row:
            lines.append(f"| {row['name']} | | | | | | {one_line(row['error'])} |")
    return [*lines, "", *verdicts(rows)]


def cells(row: dict, best: dict[str, float]) -> list[str]:
    measured, bad = values(row), wrong(row)
    shown = []
    for column in COLUMNS:
        if column not in measured:
            shown.append("")
            continue
        value = measured[column]
        text = f"{value:.1f}" if column in ("forward", "both") else f"{value:.1e}"
        text = f"{value:.1%}" if column == "differing" else text
        out = "out" in bad or (bool(bad) and column in ("both", "gradients"))
        shown.append(f"**{text}**" if value == best.get(column) and not out else text)
    notes = [row["note"]] if row["note"] else []
    notes += [f"wrong {' and '.join(bad)}"] if bad else []
    notes += [one_line(row["error"])] if "error" in row else []
    return [*shown, "; ".join(notes)]


def one_line(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def verdicts(rows: list[dict]) -> list[str]:
    """Say where ours is first, and where not, by how much."""
    lines = []
    for dtype in WRONG:
        of_dtype = [row for row in rows if row.get("dtype") == dtype]
        best = winners(of_dtype)
        ours = winners([row for row in of_dtype if row["group"] == "ours"])
        for column, title in COLUMNS.items():
            if column not in ours:
                continue
            first = [
                row["name"]
                for row in of_dtype
                if "error" not in row and values(row).get(column) == best[column]
            ]
            said = f"first: {', '.join(first)}"
            if ours[column] > best[column]:
                ratio = ours[column] / best[column] if best[column] else float("inf")
                said += f"; the best of ours takes {ratio:.2f} times that"
            lines.append(f"- {dtype}, {title}: {said}.")
    return lines


def emulation_table(tokens: int, rounds: int, devices: int, rows: list[dict]) -> list[str]:
    lines = [
        "",
        f"### The cost of emulation: {devices} emulated devices against one, the same S{tokens}",
        "",
        f"Medians of {rounds} rounds in turn, in one process that has all {CORES} cores.",
        "",
        f"| | pass | {devices} devices, ms | 1 device, ms | ratio |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        said = {"forward": "forward", "both": "forward+backward"}[row["pass"]]
        ratio = row["ms"] / row["ms_one"]
        lines.append(
            f"| {row['name']} | {said} | {row['ms']:.1f} | {row['ms_one']:.1f} | {ratio:.2f} |"
        )
    return lines
