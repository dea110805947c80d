# SPDX-License-Identifier: Apache-2.0
"""Ring attention: keys and values travel, each device merges what passes by.

Communication a device, forward: n-1 rotations of its K and V (and positions: 4 bytes a token).
Backward: n-1 rotations of K and V, and n-1 of dK and dV in float32, which travel with them: a
shard's gradient starts at its first foreign host, one step behind K/V, and needs one hop home.
Memory: two K/V shards, whatever n.

`fused=True` is the same in one TPU kernel a pass (`pallas_kernels.ring_attention`): the same bytes,
sent by remote DMA out of the kernel that computes, into two K/V shards beside the device's own;
backward it also holds three of dK and dV in float32.

Source: Liu et al., Ring Attention (arXiv 2310.01889).
"""

import dataclasses

from jaxcp.context_parallel.circulate import Circle, circulate
from jaxcp.context_parallel.strategy import Strategy
from pallas_kernels.ring_attention import ring_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring(Strategy):
    """K/V rotate n-1 times; every mask is honoured.

    `bidirectional`: half of each shard's keys go round one way and half the other, the same bytes
    in all; half the time on links that carry both directions at once (TPU, NVLink).
    `fused`: one kernel a pass, which communicates itself. TPU only; on a CPU it is interpreted when
    `implementation="mosaic_tpu"` is named. Anything else raises NotImplementedError.
    """

    bidirectional: bool = False
    fused: bool = False

    def __post_init__(self):
        if self.fused and self.reproducible:
            raise NotImplementedError(
                "a fused ring has no fixed order of sums; use Ring(reproducible=True) without fused"
            )

    def attend(
        self, q, k, v, q_pos, kv_pos, q_seg, kv_seg, *,
        axis_name, mask, expand=None, weights=(), **options,
    ):  # fmt: skip
        if self.fused:
            if expand is not None:
                raise NotImplementedError(
                    "a fused ring carries keys and values, no latents; use Ring(), AllGather() or "
                    "RingPassQ()"
                )
            return ring_attention(
                q, k, v,
                axis_name=axis_name, q_positions=q_pos, kv_positions=kv_pos,
                q_segment_ids=q_seg, kv_segment_ids=kv_seg,
                causal=mask.causal, window=mask.window, bidirectional=self.bidirectional, **options,
            )  # fmt: skip
        circles: tuple[Circle, ...] = (Circle.of(axis_name),)
        if self.bidirectional and circles[0].size > 2 and kv_pos.shape[1] > 1:
            circles += (Circle.of(axis_name, reverse=True),)
        static = tuple({"mask": mask, **options}.items())
        arrays = q, k, v, q_pos, kv_pos, q_seg, kv_seg
        return circulate(circles, static, *arrays, expand=expand, weights=weights)
