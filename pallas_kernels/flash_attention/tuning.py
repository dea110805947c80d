# SPDX-License-Identifier: Apache-2.0
"""Block sizes in one table: a chip, head dim or dtype that needs others gets a row further up."""

import dataclasses

from pallas_kernels.dispatch import INTERPRETED, block_sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Queries and keys a block, and how the block is worked on.

    `warps` and `stages` are Triton's; `sub` is how many keys of a block a TPU kernel turns into
    scores at a time, and `strip` for how many queries (the forward kernel).
    """

    q: int
    kv: int
    warps: int = 4
    stages: int = 2
    sub: int = 512
    strip: int = 512


# operation, start of the device kind, most head dim, most bytes an element; the first match wins
# Shared memory: sm_120 has 101,376 B a block, which every row for any GPU fits.
TABLE: tuple[tuple[str, str, int, int, Blocks], ...] = (
    # the interpreter: small, so that short tests still cross block borders
    ("triton_forward", INTERPRETED, 512, 4, Blocks(q=64, kv=32)),
    ("triton_dq", INTERPRETED, 512, 4, Blocks(q=64, kv=32)),
    ("triton_dkv", INTERPRETED, 512, 4, Blocks(q=32, kv=64)),
    ("mosaic_forward", INTERPRETED, 512, 4, Blocks(q=128, kv=128, sub=64, strip=64)),
    ("mosaic_backward", INTERPRETED, 512, 4, Blocks(q=128, kv=128, sub=64)),
    # any NVIDIA GPU from sm_80; those of a kind were timed on it (benchmarks/results)
    ("triton_forward", "NVIDIA H200", 64, 2, Blocks(q=64, kv=64, warps=4, stages=4)),
    ("triton_forward", "", 64, 2, Blocks(q=128, kv=128, warps=8, stages=2)),
    ("triton_forward", "NVIDIA H200", 128, 2, Blocks(q=128, kv=64, warps=4, stages=2)),
    ("triton_forward", "", 128, 2, Blocks(q=128, kv=64, warps=8, stages=2)),
    ("triton_forward", "NVIDIA H200", 256, 2, Blocks(q=128, kv=64, warps=8, stages=3)),
    ("triton_forward", "", 256, 2, Blocks(q=64, kv=32, warps=4, stages=2)),
    ("triton_forward", "", 64, 4, Blocks(q=64, kv=32, warps=8, stages=2)),
    ("triton_forward", "", 128, 4, Blocks(q=32, kv=16, warps=8, stages=2)),
    ("triton_forward", "", 256, 4, Blocks(q=32, kv=16, warps=8, stages=2)),
    ("triton_forward", "", 512, 2, Blocks(q=32, kv=32, warps=8, stages=2)),
    ("triton_dq", "", 64, 2, Blocks(q=128, kv=64, warps=8, stages=2)),
    ("triton_dq", "NVIDIA H200", 128, 2, Blocks(q=128, kv=128, warps=8, stages=3)),
    ("triton_dq", "", 128, 2, Blocks(q=64, kv=32, warps=4, stages=2)),
    ("triton_dq", "NVIDIA H200", 256, 2, Blocks(q=128, kv=32, warps=8, stages=2)),
    ("triton_dq", "", 256, 2, Blocks(q=64, kv=16, warps=4, stages=2)),
    ("triton_dq", "", 128, 4, Blocks(q=32, kv=32, warps=8, stages=2)),
    ("triton_dq", "", 256, 4, Blocks(q=16, kv=16, warps=4, stages=2)),
    ("triton_dq", "", 512, 2, Blocks(q=32, kv=16, warps=8, stages=2)),
    ("triton_dkv", "", 64, 2, Blocks(q=64, kv=128, warps=8, stages=2)),
    ("triton_dkv", "NVIDIA H200", 128, 2, Blocks(q=64, kv=64, warps=4, stages=2)),
    ("triton_dkv", "", 128, 2, Blocks(q=32, kv=128, warps=8, stages=2)),
    ("triton_dkv", "NVIDIA H200", 256, 2, Blocks(q=64, kv=64, warps=8, stages=2)),
    ("triton_dkv", "", 256, 2, Blocks(q=32, kv=32, warps=8, stages=2)),
    ("triton_dkv", "", 128, 4, Blocks(q=32, kv=32, warps=8, stages=2)),
    ("triton_dkv", "", 256, 4, Blocks(q=16, kv=16, warps=8, stages=2)),
    ("triton_dkv", "", 512, 2, Blocks(q=32, kv=16, warps=8, stages=2)),
    # any TPU
    ("mosaic_forward", "TPU v5", 128, 2, Blocks(q=1024, kv=1024, strip=256)),
    ("mosaic_forward", "TPU v5", 256, 2, Blocks(q=512, kv=512, strip=256)),
    ("mosaic_forward", "", 256, 2, Blocks(q=1024, kv=1024)),
    ("mosaic_forward", "", 256, 4, Blocks(q=512, kv=512)),
    ("mosaic_forward", "", 512, 2, Blocks(q=512, kv=512, strip=256)),
    ("mosaic_forward", "", 512, 4, Blocks(q=256, kv=256)),
    ("mosaic_backward", "", 128, 2, Blocks(q=512, kv=1024)),
    ("mosaic_backward", "", 256, 2, Blocks(q=512, kv=1024)),
    ("mosaic_backward", "", 256, 4, Blocks(q=512, kv=512)),
    ("mosaic_backward", "", 512, 2, Blocks(q=256, kv=512)),
    ("mosaic_backward", "", 512, 4, Blocks(q=256, kv=256)),
)


def blocks(op: str, head_dim: int, dtype, *, interpret: bool) -> Blocks:
    """Look up the row for `op` on the device in scope; `head_dim`: the wider of keys and values."""
    return block_sizes(TABLE, op, head_dim, dtype, interpret=interpret, what="head_dim")
