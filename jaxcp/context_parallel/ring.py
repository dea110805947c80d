# SPDX-License-Identifier: Apache-2.0
"""Ring attention: keys and values travel, each device merges what passes by.

In these docstrings a shard has t tokens of B rows, N query heads and K KV heads, keys of H and
values of V (and V = H where V is not named), e bytes an element; n shards.

Communication a device, forward: n-1 rotations of K and V, `B t K (H + V) e` bytes each, and of
positions, `4 B t` (and as much of segment ids, if any). Backward: the same again, and n-1 of dK and
dV in float32, `4 B t K (H + V)`, which travel with them: a shard's gradient starts at its first
foreign host, one step behind K/V, and needs one hop home. Every transfer runs beside a kernel, but
the backward pass's first (on GPUs with `compiler_options`). No K, V or gradient is copied on the
way; two directions cut K/V in halves once a pass, which copies them once.

Memory, forward, beside the arguments: two shards of K/V and two float32 partial results whatever n
(one of each for n = 2), and out: `2 (B t K (H + V) e + 4 B t N V) + B t N V e`.

`fused=True` is the same in one TPU kernel a pass (`pallas_kernels.ring_attention`): the same bytes,
sent by remote DMA out of the kernel that computes, into two K/V shards beside the device's own;
backward it also holds three of dK and dV in float32.

Source: Liu et al., Ring Attention (arXiv 2310.01889).
"""

import dataclasses

from jaxcp.context_parallel.circulate import Circle, circulate
from jaxcp.context_parallel.cost import Cost, Shapes, circle_cost
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

    def cost(self, shapes: Shapes) -> Cost:
        """Count as every strategy does. Of `fused`, whose traffic no compiled program shows, the
        bytes are those of its docstring, and `held` is that of a plain ring.
        """
        both_ways = self.bidirectional and shapes.shards > 2 and shapes.keys > 1
        kind = "remote-dma" if self.fused else "collective-permute"
        return circle_cost(shapes, directions=2 if both_ways else 1, kind=kind)
