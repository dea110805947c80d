# SPDX-License-Identifier: Apache-2.0
"""Draw docs/zigzag.png: which tokens lie on which shard, and the causal work that makes.

python -m benchmarks.zigzag_picture docs/zigzag.png
"""

import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import colormaps, pyplot

from jaxcp.layout import Contiguous, Layout, Zigzag

SHARDS, TOKENS = 8, 4096


def work(layout: Layout, length: int = TOKENS, shards: int = SHARDS) -> np.ndarray:
    """Visible (query, key) pairs of each shard's queries, as a multiple of the mean."""
    order = layout.order(length, shards).reshape(shards, -1).astype(np.int64)
    pairs = np.where(order < length, order + 1, 0).sum(1)
    return pairs / pairs.mean()


def owners(layout: Layout) -> np.ndarray:
    """The shard of each token, in natural order."""
    order = layout.order(TOKENS, SHARDS)
    return np.repeat(np.arange(SHARDS), TOKENS // SHARDS)[np.argsort(order)]


def draw(path: pathlib.Path) -> None:
    layouts = Contiguous(), Zigzag()
    figure, axes = pyplot.subplots(
        2, 2, figsize=(9, 4.4), height_ratios=(1, 3), layout="constrained", sharey="row"
    )
    colors = colormaps["viridis"](np.linspace(0.05, 0.95, SHARDS))
    for (top, below), layout in zip(axes.T, layouts, strict=True):
        top.imshow(colors[owners(layout)][None], aspect="auto", extent=(0, TOKENS, 0, 1))
        top.set_title(type(layout).__name__, fontsize=11)
        top.set_yticks([])
        top.set_xlabel("token, coloured by its shard", fontsize=8)
        each = work(layout)
        below.bar(range(SHARDS), each, color=colors)
        below.axhline(1, color="#b5392b", linewidth=1)
        below.set_xlabel(f"shard; busiest {each.max():.2f} of the mean", fontsize=9)
        below.set_xticks(range(SHARDS))
        below.spines[["top", "right"]].set_visible(False)
    axes[1][0].set_ylabel("causal work, mean = 1")
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    draw(pathlib.Path(sys.argv[1]))
