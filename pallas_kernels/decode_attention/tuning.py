# SPDX-License-Identifier: Apache-2.0
"""Block sizes of the decode kernels in one table: the first row that matches is taken."""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.dispatch import INTERPRETED, block_sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """The cuts of a cache.

    `rows`: rows that one step of a kernel reads; of one KV head in Triton, that is tokens; of all
    KV heads on a TPU, that is tokens times KV heads, of which the body of a loop takes `sub` (with
    8 query rows a KV head; fewer with more). `splits` workers share a sequence; 0: as many as fill
    the GPU twice. `warps` and `stages` are Triton's.
    """

    rows: int
    splits: int = 0
    sub: int = 16384
    warps: int = 4
    stages: int = 3


# operation, start of the device kind, most head dim, most bytes an element of q, the row
TABLE: tuple[tuple[str, str, int, int, Blocks], ...] = (
    # the interpreter: small, so that short tests still cross block borders and merge
    ("triton", INTERPRETED, 256, 4, Blocks(rows=32, splits=3)),
    ("mosaic", INTERPRETED, 256, 4, Blocks(rows=256, splits=2, sub=128)),
    ("triton", "", 128, 2, Blocks(rows=64)),
    ("triton", "", 256, 2, Blocks(rows=32)),
    ("triton", "", 128, 4, Blocks(rows=32, stages=2)),
    ("triton", "", 256, 4, Blocks(rows=16, stages=2)),
    # two workers: the two cores of a v4 or v5p
    ("mosaic", "", 128, 2, Blocks(rows=16384, splits=2)),
    ("mosaic", "", 256, 4, Blocks(rows=4096, splits=2)),
)


def blocks(op: str, head_dim: int, dtype, *, interpret: bool) -> Blocks:
    """Look up the row for `op` on the device in scope; `head_dim`: the wider of keys and values."""
    return block_sizes(TABLE, op, head_dim, dtype, interpret=interpret, what="head_dim")


def unsupported(name, q, v):
    """Raise NotImplementedError for a dtype or head dim that no Pallas backend has a path for."""
    widest = max(q.shape[-1], v.shape[-1])
    if q.dtype in (jnp.float32, jnp.bfloat16) and widest <= 256:
        return
    raise NotImplementedError(
        f"decode_attention {name}: q in float32 or bfloat16 and head dims up to 256; got "
        f"{q.dtype} and head dims {q.shape[-1]} and {v.shape[-1]}; use implementation='xla' or "
        "'reference'"
    )
