# SPDX-License-Identifier: Apache-2.0
"""Costs an NVIDIA kernel from its machine code: issue slots for a unit of work.

A scheduler of a multiprocessor issues one instruction of one warp a cycle, so a loop's instructions
times its warps are the slots that a tile takes; fewer for the same tile is better. The bytes that
a turn fetches come from L2 at 64 a cycle at most, during which four schedulers issue: a tile takes
no fewer slots than that. A kernel that spills, or whose blocks do not fit into shared memory (the
compiler then refuses), has no cost.

A low cost is necessary for a fast kernel, and no time. It leaves out latency that too few resident
warps do not hide, bank conflicts, the rate of the matrix units (the same for every tile of a
shape, so no help in choosing), HBM. Between two rows within some 10 % only the device decides.
"""

import re

from jaxcp.compile.gpu_code import Kernel, Loop

L2_BYTES = 16  # an issue slot; 64 a cycle of a multiprocessor (A100 and H100 whitepapers)


def refused(kernel: Kernel) -> str | None:
    """The reason not to use the kernel, or None."""
    if kernel.spilled_bytes:
        return f"spills {kernel.spilled_bytes} B"
    if not kernel.loops:
        return "has no loop with matrix instructions"
    return None


def tile_slots(kernel: Kernel, warps: int, flops: float, nbytes: float) -> tuple[float, float]:
    """Issue slots of an unmasked tile that takes `flops`, and of one under a mask.

    `nbytes`: bytes that a turn of the loop fetches.

    Raises:
      ValueError: a turn of a loop does less than a tile.
    """
    loops = [*kernel.loops, kernel.loops[-1]][:2]
    for loop in loops:
        _does(kernel, loop, warps, flops)
    slots = [max(loop.instructions * warps, nbytes / L2_BYTES) for loop in loops]
    return slots[0], slots[1]


def _does(kernel: Kernel, loop: Loop, warps: int, flops: float) -> None:
    """Raise where matrix instructions are too few for a tile; more are fine: warps repeat work."""
    shapes = {re.search(r"m(\d+)n(\d+)k(\d+)", name) for name in kernel.matrix_names}
    sizes = {tuple(int(n) for n in shape.groups()) for shape in shapes if shape}
    if len(sizes) != 1 or kernel.matrix_names[0].startswith("wgmma"):
        return  # instructions of several sizes cannot be told apart
    ((m, n, k),) = sizes
    done = loop.matrix * warps * 2 * m * n * k / flops
    if done < 0.99:
        raise ValueError(
            f"{kernel.name}: a loop of {loop.matrix} matrix instructions does {done:.2f} of a tile"
        )
