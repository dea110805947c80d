# SPDX-License-Identifier: Apache-2.0
"""Sizes in one table: a chip, head dim or dtype that needs others gets a row further up."""

import dataclasses

from pallas_kernels.dispatch import INTERPRETED, block_sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Columns of a state that a program walks with, and Triton's warps and stages."""

    columns: int = 64
    warps: int = 4
    stages: int = 1


# operation, start of the device kind, most head dim, most bytes an element; the first match wins
MANY = 1 << 31
TABLE: tuple[tuple[str, str, int, int, Blocks], ...] = (
    # the interpreter: small, so that short tests have several programs a head
    ("triton_local", INTERPRETED, MANY, 4, Blocks()),
    ("triton_scan", INTERPRETED, MANY, 4, Blocks(columns=16)),
    ("triton_scan_backward", INTERPRETED, MANY, 4, Blocks(columns=16)),
    # any NVIDIA GPU from sm_80
    ("triton_local", "", 128, 4, Blocks(warps=8)),
    ("triton_scan", "", 128, 4, Blocks(columns=32, warps=8)),
    ("triton_scan_backward", "", 128, 4, Blocks(columns=16, warps=8)),
)


def blocks(op: str, head_dim: int, dtype, *, interpret: bool) -> Blocks:
    """Look up the row for `op` on the device in scope."""
    return block_sizes(TABLE, op, head_dim, dtype, interpret=interpret, what="head_dim")
