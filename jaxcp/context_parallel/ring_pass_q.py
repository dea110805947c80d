# SPDX-License-Identifier: Apache-2.0
"""Queries travel and keys stay: for few new tokens against a long sharded cache.

Communication a device, with t new tokens and n shards: all-gather of q (and positions), to
`n * B * t * N * H * e` bytes; one all-to-all of partial results and their lse in float32,
`n * B * t * N * (V + 1) * 4` bytes. Keys and values: none. Memory: q and out of all new tokens.

`fewer_bytes` is the rule: K/V of s slots a shard that go round a ring cost
`(n - 1) * s * K * (H + V) * e`, the above `(n - 1) * t * N * (H * e + (V + 1) * 4)`. With e = 2
and H = V that is pass-Q where `t / s < 2 K / (3 N)` about; Meta's `t / (t + p) < 2 K / N` is for
partial results in 16 bits that a kernel hides. (arXiv 2411.01783)
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcp.context_parallel.exchange import gathered
from jaxcp.context_parallel.strategy import Strategy, expanded
from pallas_kernels import flash_attention
from pallas_kernels.online_softmax import merge_stacked


@dataclasses.dataclass(frozen=True, kw_only=True)
class RingPassQ(Strategy):
    """Every device attends to its own keys for all queries; every mask is honoured."""

    def attend(
        self, q, k, v, q_pos, kv_pos, q_seg, kv_seg, *,
        axis_name, mask, expand=None, weights=(), **options,
    ):  # fmt: skip
        n = lax.axis_size(axis_name)
        acc = np.promote_types(q.dtype, np.float32)
        k, v = expanded(k, v, expand, weights)
        out, lse = flash_attention(
            gathered(q, axis_name),
            k,
            v,
            q_positions=gathered(q_pos, axis_name),
            kv_positions=kv_pos,
            q_segment_ids=gathered(q_seg, axis_name),
            kv_segment_ids=kv_seg,
            causal=mask.causal,
            window=mask.window,
            out_dtype=acc,
            **options,
        )
        packed = jnp.concatenate([out, lse[..., None].astype(acc)], axis=-1)
        packed = lax.all_to_all(packed, axis_name, 1, 0, tiled=True)  # [n * B, t, N, V + 1]
        packed = packed.reshape(n, q.shape[0], *packed.shape[1:])
        out, lse = merge_stacked(packed[..., :-1], packed[..., -1])
        return out.astype(q.dtype), lse

    @staticmethod
    def fewer_bytes(q, k, v) -> bool:
        """Whether local shards of these shapes send less by passing q than by rotating k and v."""
        _, t, heads, width = q.shape
        _, s, kv_heads, value_width = v.shape
        rotated = s * kv_heads * (width + value_width) * k.dtype.itemsize
        return t * heads * (width * q.dtype.itemsize + (value_width + 1) * 4) < rotated
