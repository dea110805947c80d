# SPDX-License-Identifier: Apache-2.0
"""Draw what an attention tile costs on each chip: docs/tile_cost.png."""

import pathlib

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.deviceless.bars import INSTRUCTIONS, TPUS, Row, pick

OURS, MASKED, THEIRS, BAR = "#1f4e79", "#7fa8cf", "#c8c8c8", "#b5392b"


def draw(counts: list[dict], rows: list[Row], path: pathlib.Path) -> None:
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 4), width_ratios=(3, 1), layout="constrained"
    )
    tpu(left, counts)
    gpu(right, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def tpu(axes, counts):
    labels = []
    for chip in TPUS:
        for head_dim in INSTRUCTIONS:
            rows = pick(counts, chip=chip, op="flash_forward", head_dim=head_dim)
            ours = [r for r in pick(rows, whose="ours") if "unmasked" in r]
            theirs = [r["unmasked"] for r in pick(rows, whose="tokamax") if "unmasked" in r]
            at = len(labels)
            if ours:
                axes.bar(at - 0.27, ours[0]["unmasked"], 0.27, color=OURS, label="ours")
                axes.bar(at, ours[0]["masked"], 0.27, color=MASKED, label="ours, masked")
            if theirs:
                axes.bar(at + 0.27, min(theirs), 0.27, color=THEIRS, label="tokamax splash")
            labels.append(f"{chip}\nD={head_dim}")
    axes.set_xticks(range(len(labels)), labels, fontsize=7)
    axes.set_ylabel("cycles (bundles) of a 1024 x 1024 tile")
    handles, names = axes.get_legend_handles_labels()
    once = dict(zip(names, handles, strict=True))
    axes.legend(once.values(), once.keys(), frameon=False, fontsize=8)
    axes.set_title("Forward, one head", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def gpu(axes, rows):
    chosen = [row for row in rows if row.what.startswith("SM120 flash forward")]
    if not chosen:  # a run of some chips only
        axes.set_axis_off()
        return
    for at, row in enumerate(chosen):
        axes.bar(at, row.value or 0, 0.5, color=OURS)
        axes.hlines(row.bar, at - 0.35, at + 0.35, color=BAR)
    axes.set_xticks(range(len(chosen)), [f"D={d}" for d in INSTRUCTIONS], fontsize=8)
    axes.set_ylabel("instructions a matrix instruction")
    axes.set_title("SM120, hot loop (line: the bar)", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
