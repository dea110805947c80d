# SPDX-License-Identifier: Apache-2.0
"""Costs a TPU kernel from the bundles of its machine code.

A bundle issues in one cycle of a TensorCore, so bundles of the hot regions, times how often each
runs, are cycles where DMA is hidden. Two things keep a count honest:

* the number of runs of a region is checked against its multiplications (`matmuls`): a region with
  too few for the FLOPs that it should do is an error;
* matrix instructions may issue faster than the unit works them off (its queue then stalls the
  core, which no bundle shows), so a region takes at least its FLOPs over the chip's peak.

The count leaves out DMA that is not hidden, the fixed cost of a grid step, stalls of other units.
"""

import math

from jaxcp.compile.tpu_code import Hot, Kernel
from pallas_kernels.devices import CHIPS

# bfloat16 FLOPs a cycle of one TensorCore: matrix units x rows a cycle x side^2 x 2. Times the
# clock that is the chip's peak in pallas_kernels.devices: 1.5, 1.75, 1.75 and 2.2 GHz.
PEAK = {"v5e": 1 << 17, "v5p": 1 << 17, "v6e": 1 << 19, "tpu7x": 1 << 19}
SIDE = {"v5e": 128, "v5p": 128, "v6e": 256, "tpu7x": 256}  # rows and columns of a matrix unit
ROWS = 16  # bfloat16 rows that one instruction multiplies

# GHz that the medians published in tokamax 0.0.17's autotuning data imply for its own kernels
# (cycles counted here / milliseconds there), the lowest of each chip; v5e: its peak's.
CLOCK = {"v5e": 1.5, "v5p": 1.51, "v6e": 1.42, "tpu7x": 1.71}
CORES = {"v5e": 1, "v5p": 2, "v6e": 1, "tpu7x": 2}  # TensorCores that share a chip's HBM


def hbm_cycles(chip: str, nbytes: float) -> float:
    """Core cycles to fetch `nbytes` with one core's share of the HBM bandwidth."""
    return nbytes * CORES[chip] / CHIPS[chip].hbm_bytes_per_second * CLOCK[chip] * 1e9


def holds(chip: str, hot: Hot, flops: float) -> bool:
    """Tell whether a region has the multiplications that `flops` in bfloat16 take."""
    return hot.matmuls * 2 * ROWS * SIDE[chip] ** 2 >= 0.99 * flops


def cycles(chip: str, hot: Hot, flops: float) -> float:
    """Cycles of a region that does `flops` in bfloat16: its bundles, or those at the chip's peak.

    Raises:
      ValueError: it has fewer multiplications than that.
    """
    if not holds(chip, hot, flops):
        raise ValueError(
            f"a region of {hot.bundles} bundles has {hot.matmuls} matrix instructions, too few for "
            f"{flops:.3g} FLOPs: it runs more often than it is counted"
        )
    return max(hot.bundles, flops / PEAK[chip])


def attention_tile(chip: str, kernel: Kernel, tile, flops: float) -> tuple[float, float]:
    """Cycles of an unmasked and of a diagonal tile of `(queries, keys)`; `flops` of a pair.

    A kernel with code of its own for the diagonal has a region that multiplies less than a tile.
    """
    needed = flops * tile[0] * tile[1]
    most = max(hot.matmuls for hot in kernel.hot)
    whole = [hot for hot in kernel.hot if hot.matmuls > 0.9 * most]
    parts = [hot for hot in kernel.hot if hot.matmuls <= 0.9 * most]
    if len(kernel.hot) < 2:
        raise ValueError(f"expected an unmasked and a masked part; got {kernel.hot}")
    unmasked = cycles(chip, whole[0], needed)
    if not parts:
        return unmasked, cycles(chip, whole[1], needed)
    share = parts[0].matmuls / whole[0].matmuls
    return unmasked, max(parts[0].bundles, share * needed / PEAK[chip])


def parts_of(tokens: int, size: int, *, aligned: bool) -> float:
    """Parts of `size` rows that `tokens` rows touch: from a border, or from anywhere on average."""
    return math.ceil(tokens / size) if aligned else (tokens + size - 1) / size


def expert(
    chip: str,
    kernel: Kernel,
    block,
    tokens: int,
    embed: int,
    width: int,
    products: int = 1,
    *,
    aligned: bool,
) -> float:
    """Cycles of one expert's product: pieces of a block, and what a grid step adds.

    `aligned`: the expert's rows begin where a block does. Real groups begin anywhere.
    """
    deep = math.ceil(embed / block.k)
    pieces = parts_of(tokens, block.rows, aligned=aligned) * math.ceil(width / block.columns) * deep
    steps = parts_of(tokens, block.m, aligned=aligned) * math.ceil(width / block.n) * deep
    flops = 2 * products * min(block.rows, tokens) * block.columns * block.k
    return pieces * cycles(chip, kernel.hot[0], flops) + steps * kernel.around


def expert_gradient(chip: str, kernel: Kernel, block, tokens: int, embed: int, width: int):
    """Cycles of one expert's `lhs.T @ dout`, summed over `rows` at a time, from anywhere."""
    blocks = math.ceil(embed / block.k) * math.ceil(width / block.n)
    pieces = parts_of(tokens, block.rows, aligned=False) * math.ceil(block.n / block.columns)
    steps = parts_of(tokens, block.m, aligned=False)
    flops = 2 * min(block.rows, tokens) * block.columns * block.k
    return blocks * (pieces * cycles(chip, kernel.hot[0], flops) + steps * kernel.around)


def decode_step(chip: str, kernel: Kernel, block, flops: float) -> float:
    """Cycles of an unmasked step of our decode kernel: its branch comes before the masked one.

    A branch is straight-line code, or for each group of heads scores the keys and weighs the
    values, each in a loop over `sub` of the group's rows. `flops`: of one row of the cache.
    """
    hot = sorted(kernel.hot, key=lambda h: h.first)
    rows = step_rows(kernel)
    if hot[0].loops == 1:
        return cycles(chip, hot[0], flops * rows) + kernel.around
    branch = hot[: len(hot) // 2]
    own = 2 * rows // len(branch)  # rows of a group
    trips = own // math.gcd(block.sub, own)
    part = flops * rows / trips / len(branch)
    return trips * sum(cycles(chip, h, part) for h in branch) + kernel.around


def step_rows(kernel: Kernel) -> int:
    """Rows of the cache, all KV heads together, that a step of the decode kernel reads."""
    return max(shape[-2] for _, shape, _ in kernel.windows if len(shape) > 1)


def step_bytes(kernel: Kernel) -> int:
    """Bytes that a step of a decode kernel fetches: its two largest windows, keys and values."""
    return sum(sorted((nbytes for _, _, nbytes in kernel.windows), reverse=True)[:2])
