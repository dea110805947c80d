# SPDX-License-Identifier: Apache-2.0
"""Gather all keys and values once, then attend locally.

Communication a device: one all-gather each of K, V and positions; backward one reduce-scatter
each of dK and dV. Memory: all of K and V on every device. Fastest while that fits.

Source: Llama 3 (arXiv 2407.21783), section 3.3.2.
"""

import dataclasses

from jax import lax

from jaxcp.context_parallel.strategy import Strategy
from pallas_kernels import flash_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllGather(Strategy):
    """K/V gathered once; every mask is honoured."""

    def attend(self, q, k, v, q_pos, kv_pos, q_seg, kv_seg, *, axis_name, mask, **options):
        def gather(x):
            return None if x is None else lax.all_gather(x, axis_name, axis=1, tiled=True)

        return flash_attention(
            q,
            gather(k),
            gather(v),
            q_positions=q_pos,
            kv_positions=gather(kv_pos),
            q_segment_ids=q_seg,
            kv_segment_ids=gather(kv_seg),
            causal=mask.causal,
            window=mask.window,
            **options,
        )
