# SPDX-License-Identifier: Apache-2.0
"""Block sizes in one table: a chip, group size or dtype that needs others gets a row further up."""

import dataclasses

from pallas_kernels.dispatch import INTERPRETED, block_sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Most rows, columns and summed entries a block.

    For `outer`, whose result is `k x n`, `m` is the rows that a step sums over. `warps` and
    `stages` are Triton's; a TPU kernel multiplies `rows x columns` of a block at a time.
    """

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 2
    rows: int = 128
    columns: int = 256


# operation, start of the device kind, most mean rows a group, most bytes an element of lhs;
# the first match wins. Shared memory: sm_120 has 101,376 B a block, which every GPU row fits.
MANY = 1 << 31
TABLE: tuple[tuple[str, str, int, int, Blocks], ...] = (
    # the interpreter: small, so that short tests still cross block borders
    ("triton_matmul", INTERPRETED, MANY, 4, Blocks(m=16, n=32, k=32)),
    ("triton_outer", INTERPRETED, MANY, 4, Blocks(m=16, n=32, k=32)),
    ("triton_swiglu", INTERPRETED, MANY, 4, Blocks(m=16, n=32, k=32)),
    ("mosaic_matmul", INTERPRETED, MANY, 4, Blocks(m=32, n=256, k=128, rows=16, columns=128)),
    ("mosaic_outer", INTERPRETED, MANY, 4, Blocks(m=32, n=256, k=128, rows=16, columns=128)),
    ("mosaic_swiglu", INTERPRETED, MANY, 4, Blocks(m=32, n=256, k=128, rows=16, columns=128)),
    # any NVIDIA GPU from sm_80
    ("triton_matmul", "", 32, 2, Blocks(m=16, n=128, k=128, warps=4, stages=2)),
    ("triton_matmul", "", MANY, 2, Blocks(m=128, n=128, k=64, warps=8, stages=3)),
    ("triton_matmul", "", MANY, 4, Blocks(m=64, n=64, k=32, warps=8, stages=2)),
    ("triton_outer", "", 32, 2, Blocks(m=16, n=128, k=128, warps=8, stages=2)),
    ("triton_outer", "", MANY, 2, Blocks(m=64, n=128, k=128, warps=8, stages=3)),
    ("triton_outer", "", MANY, 4, Blocks(m=32, n=64, k=64, warps=8, stages=2)),
    ("triton_swiglu", "", 32, 2, Blocks(m=16, n=64, k=128, warps=4, stages=2)),
    ("triton_swiglu", "NVIDIA H200", MANY, 2, Blocks(m=128, n=128, k=32, warps=8, stages=4)),
    ("triton_swiglu", "", MANY, 2, Blocks(m=128, n=64, k=64, warps=8, stages=3)),
    ("triton_swiglu", "", MANY, 4, Blocks(m=64, n=32, k=32, warps=8, stages=2)),
    # any TPU
    ("mosaic_matmul", "", 32, 2, Blocks(m=128, n=768, k=4096, rows=16, columns=256)),
    ("mosaic_matmul", "TPU v6", MANY, 2, Blocks(m=512, n=1536, k=4096, rows=128, columns=768)),
    ("mosaic_matmul", "TPU v5 lite", MANY, 2, Blocks(m=512, n=1536, k=4096, rows=128, columns=256)),
    ("mosaic_matmul", "TPU7x", MANY, 2, Blocks(m=512, n=1536, k=4096, rows=128, columns=512)),
    ("mosaic_matmul", "TPU v5p", MANY, 2, Blocks(m=512, n=1536, k=4096, rows=128, columns=256)),
    ("mosaic_matmul", "", MANY, 2, Blocks(m=512, n=768, k=4096, rows=256, columns=256)),
    ("mosaic_matmul", "", MANY, 4, Blocks(m=256, n=512, k=2048, rows=128, columns=256)),
    ("mosaic_outer", "", MANY, 2, Blocks(m=512, n=1536, k=1024, rows=128, columns=256)),
    ("mosaic_outer", "", MANY, 4, Blocks(m=256, n=512, k=1024, rows=128, columns=256)),
    ("mosaic_swiglu", "", 32, 2, Blocks(m=128, n=512, k=4096, rows=16, columns=256)),
    ("mosaic_swiglu", "", MANY, 2, Blocks(m=512, n=512, k=4096, rows=256, columns=256)),
    ("mosaic_swiglu", "", MANY, 4, Blocks(m=256, n=256, k=2048, rows=128, columns=256)),
)


def blocks(op: str, mean_rows: int, dtype, *, interpret: bool) -> Blocks:
    """Look up the row for `op` on the device in scope; `mean_rows`: rows of lhs over groups."""
    return block_sizes(TABLE, op, mean_rows, dtype, interpret=interpret, what="mean_rows")
