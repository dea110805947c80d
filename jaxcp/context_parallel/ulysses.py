# SPDX-License-Identifier: Apache-2.0
"""Heads for sequence: every device gets all tokens of some heads, and attends alone.

Communication a device, with `e` bytes an element and n devices: all-to-alls of q, k, v and the
result. Each keeps 1/n of its operand, `B * t * heads * head_dim * e`, `t` tokens a shard. Where KV
heads are fewer than devices, each is sent to those that hold its query heads and to no other.
Positions (and segment ids) are gathered. Backward: as many all-to-alls the other way.
Memory: K, V, q and out of all tokens, of 1/n of the heads: independent of n.

Source: Jacobs et al., DeepSpeed Ulysses (arXiv 2309.14509).
"""

import dataclasses

from jax import lax

from jaxcp.context_parallel.exchange import Exchange, gathered
from jaxcp.context_parallel.strategy import Strategy
from pallas_kernels import flash_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ulysses(Strategy):
    """One exchange of heads for tokens; every mask is honoured. N must be a multiple of n."""

    def attend(
        self, q, k, v, q_pos, kv_pos, q_seg, kv_seg, *,
        axis_name, mask, expand=None, weights=(), **options,
    ):  # fmt: skip
        if expand is not None:
            raise NotImplementedError(
                "Ulysses sends heads, which a latent has none of; use Ring(), AllGather() or Halo()"
            )
        swap = Exchange.over(axis_name, lax.axis_size(axis_name), q.shape[2], k.shape[2])
        out, lse = flash_attention(
            swap.queries(q),
            swap.keys(k),
            swap.keys(v),
            q_positions=gathered(q_pos, axis_name),
            kv_positions=gathered(kv_pos, axis_name),
            q_segment_ids=gathered(q_seg, axis_name),
            kv_segment_ids=gathered(kv_seg, axis_name),
            causal=mask.causal,
            window=mask.window,
            **options,
        )
        return swap.back(out), swap.back(lse)
