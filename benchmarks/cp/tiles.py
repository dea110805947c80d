# SPDX-License-Identifier: Apache-2.0
"""Counts the blocks that a kernel visits, and their cost: counts x bundles.

Blocks are sorted by the kernel's own rule (`pallas_kernels.flash_attention.blocks`) from the
positions that each rank really holds.
"""

import dataclasses

import numpy as np

from benchmarks.cp.programs import HEAD_DIM
from jaxcp.compile.tpu_code import Hot, Kernel
from jaxcp.tune import tpu_cost
from jaxcp.tune.parts import attention_flops
from pallas_kernels.devices import CHIPS
from pallas_kernels.flash_attention import Mask, blocks

KINDS = ("full", "diagonal", "masked")


def visits(q: np.ndarray, kv: np.ndarray, block_q: int, block_kv: int) -> np.ndarray:
    """`[ranks, 4]` blocks of queries `[ranks, t]` on keys `[ranks, s]`: KINDS, and skipped.

    "diagonal" are equal runs of consecutive positions, of which the lower triangle is visible.
    """
    queries, keys = (
        x.reshape(len(x), -1, min(block, x.shape[1])) for x, block in ((q, block_q), (kv, block_kv))
    )
    sides = [blocks.Bounds(*(f(x, -1) for f in (np.min, np.max) * 3)) for x in (queries, keys)]
    rows = blocks.Bounds(*(x[:, :, None] for x in sides[0]))
    columns = blocks.Bounds(*(x[:, None] for x in sides[1]))
    some, every = (np.asarray(x) for x in blocks.visibility(Mask(), rows, columns, False))
    partly, diagonal = some & ~every, np.zeros_like(some)
    if queries.shape[2] == keys.shape[2]:
        run = [(np.diff(x, axis=-1) == 1).all(-1) for x in (queries, keys)]
        same = queries[:, :, None, 0] == keys[:, None, :, 0]
        diagonal = partly & same & run[0][:, :, None] & run[1][:, None]
    counted = every & some, diagonal, partly & ~diagonal, ~some
    return np.stack([x.sum((1, 2)) for x in counted], axis=1)


@dataclasses.dataclass(frozen=True)
class Costs:
    """Cycles of one query and key in a block of each kind, and what the matrix units alone need.

    A block that is smaller than `q` x `kv` costs its share. `skip`: cycles of a block with nothing
    to see, zero where the grid leaves such blocks out.
    """

    q: int
    kv: int
    cycles: tuple[float, float, float]
    matrix: tuple[float, float, float]
    skip: float


def costs(chip: str, kernel: dict, what: str, q: int, kv: int, *, bounded=True, skip=0) -> Costs:
    """Read the costs of a kernel, ours or tokamax's, from a row of `compiled.py`.

    `bounded`: ours looks for no maximum where no score can be large; else it does. `skip`: see
    `Costs`.
    """
    read = Kernel([Hot(**hot) for hot in kernel["hot"]], kernel["around"], kernel["windows"])
    flops = attention_flops(f"mosaic_{what}", HEAD_DIM) * q * kv
    most = max(hot.matmuls for hot in read.hot)
    whole = [hot for hot in read.hot if hot.matmuls > 0.9 * most]
    parts = [hot for hot in read.hot if hot.matmuls <= 0.9 * most]
    whole.sort(key=lambda hot: hot.first)  # as the code stands: unmasked, then masked
    if len(whole) == 4 and not bounded:
        whole, parts = whole[2:], []
    full, masked = (tpu_cost.cycles(chip, hot, flops) for hot in whole[:2])
    matrix = [flops / tpu_cost.PEAK[chip]] * 3
    diagonal = masked
    if parts:
        matrix[1] *= parts[0].matmuls / whole[0].matmuls
        diagonal = max(parts[0].bundles, matrix[1])
    cycles, matrix = (tuple(x / (q * kv) for x in y) for y in ((full, diagonal, masked), matrix))
    return Costs(q, kv, cycles, matrix, skip)


def seconds(chip: str, costs: Costs, q, kv, heads: int, cores: int | None = None) -> np.ndarray:
    """`[3, ranks]` of a kernel call over `heads` query heads: blocks that are worked on, what the
    matrix units need of that, and blocks that are skipped.
    """
    block_q, block_kv = min(costs.q, q.shape[1]), min(costs.kv, kv.shape[1])
    counts = visits(q, kv, block_q, block_kv) * heads
    cores = cores or tpu_cost.CORES[chip] // CHIPS[chip].devices_per_chip
    rate = tpu_cost.CLOCK[chip] * 1e9 * cores
    pairs = counts[:, :3] * block_q * block_kv
    works, matrix = (pairs @ np.array(x) / rate for x in (costs.cycles, costs.matrix))
    return np.stack([works, matrix, counts[:, 3] * costs.skip / rate])
