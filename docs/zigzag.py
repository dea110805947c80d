# SPDX-License-Identifier: Apache-2.0
"""Draw docs/zigzag.png: which tokens lie on which shard, and the causal work that makes.

Above for one document, below for a row into which documents of very different lengths are packed.

python docs/zigzag.py
"""

import pathlib

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import colormaps, pyplot

from jaxcp.layout import Balanced, Contiguous, Layout, Zigzag

SHARDS, TOKENS = 8, 32_768
LAYOUTS = Contiguous(), Zigzag(), Balanced(block=128)


def packed() -> np.ndarray:
    """Segment ids of a row: log-normal documents around one that is half of the row."""
    lengths = np.random.default_rng(0).lognormal(np.log(500), 1, 200).astype(int) + 1
    lengths = np.insert(lengths, 6, TOKENS // 2)
    return np.searchsorted(np.cumsum(lengths), np.arange(TOKENS), side="right")


def owners(layout: Layout, segments: np.ndarray) -> np.ndarray:
    """The shard of each token, in natural order."""
    order = layout.order(TOKENS, SHARDS, segments[None]).reshape(-1)
    return np.repeat(np.arange(SHARDS), TOKENS // SHARDS)[np.argsort(order)]


def work(owner: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Visible (query, key) pairs of each shard's queries, as a multiple of the mean."""
    index = np.arange(TOKENS)
    starts = np.searchsorted(segments, segments)  # of each token's document
    pairs = np.bincount(owner, weights=index - starts + 1, minlength=SHARDS)
    return pairs / pairs.mean()


def draw(path: pathlib.Path) -> None:
    figure = pyplot.figure(figsize=(11, 7), layout="constrained")
    colors = colormaps["viridis"](np.linspace(0.05, 0.95, SHARDS))
    rows = {"one document": np.zeros(TOKENS, int), "packed documents": packed()}
    for part, (title, segments) in zip(figure.subfigures(2, 1), rows.items(), strict=True):
        part.suptitle(title, fontsize=12, fontweight="bold")
        axes = part.subplots(2, len(LAYOUTS), height_ratios=(1, 3), sharey="row")
        for (top, below), layout in zip(axes.T, LAYOUTS, strict=True):
            owner = owners(layout, segments)
            top.imshow(colors[owner][None], aspect="auto", extent=(0, TOKENS, 0, 1))
            borders = np.flatnonzero(np.diff(segments)) + 1
            top.vlines(borders, 1.05, 1.3, color="black", linewidth=0.6, clip_on=False)
            top.set_ylim(0, 1)
            top.set_title(type(layout).__name__, fontsize=11, pad=14)
            top.set_yticks([])
            top.set_xlabel(
                "token, coloured by its shard" + "; ticks: a document begins" * bool(borders.size),
                fontsize=8,
            )
            each = work(owner, segments)
            below.bar(range(SHARDS), each, color=colors)
            below.axhline(1, color="#b5392b", linewidth=1)
            below.set_xlabel(f"shard; busiest {each.max():.2f} of the mean", fontsize=9)
            below.set_xticks(range(SHARDS))
            below.spines[["top", "right"]].set_visible(False)
        axes[1][0].set_ylabel("causal work, mean = 1")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    draw(pathlib.Path(__file__).with_suffix(".png"))
