# SPDX-License-Identifier: Apache-2.0
"""Gather all keys and values once, then attend locally.

Communication a device: one all-gather each of K, V and positions (each in `chunks` parts); backward
one reduce-scatter each of dK and dV. Memory: all of K and V on every device. Fastest while that
fits.

Source: Llama 3 (arXiv 2407.21783), section 3.3.2.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcp.context_parallel.strategy import Strategy, expanded
from pallas_kernels import flash_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllGather(Strategy):
    """K/V gathered once, in natural order where the layout tells it; every mask is honoured.

    `chunks`: parts in which each shard's keys are gathered, so that one part is on its way while
    attention runs on the part before.
    """

    chunks: int = 1

    def __post_init__(self):
        if self.chunks < 1:
            raise ValueError(f"chunks must be at least 1; got {self.chunks}")

    def attend(
        self, q, k, v, q_pos, kv_pos, q_seg, kv_seg, *,
        axis_name, mask, expand=None, weights=(), **options,
    ):  # fmt: skip
        acc = np.promote_types(q.dtype, np.float32)
        keys, tokens = (k, v, kv_pos, kv_seg), kv_pos.shape[1]
        ends = np.linspace(0, tokens, min(self.chunks, tokens) + 1).astype(int)
        done = None
        for first, last in itertools.pairwise(ends):
            part = jax.tree.map(lambda x, a=first, b=last: x[:, a:b], keys)
            part_k, part_v, part_pos, part_seg = self._gather(part, axis_name)
            part_k, part_v = expanded(part_k, part_v, expand, weights)
            done = flash_attention(
                q,
                part_k,
                part_v,
                q_positions=q_pos,
                kv_positions=part_pos,
                q_segment_ids=q_seg,
                kv_segment_ids=part_seg,
                causal=mask.causal,
                window=mask.window,
                carry=done,
                out_dtype=q.dtype if last == ends[-1] else acc,
                **options,
            )
        return done

    def _gather(self, tree, axis_name):
        """Every shard's rows; in natural order where the rows are a layout's and not a part."""
        n = lax.axis_size(axis_name)
        total = n * jax.tree.leaves(tree)[0].shape[1]
        order = np.arange(total)
        known = self.chunks == 1 and not self.layout.by_segment
        if known and self.layout.padded_length(total, n) == total:
            order = np.argsort(self.layout.order(total, n))

        def one(x):
            x = lax.all_gather(x, axis_name, axis=1, tiled=True)
            # positions go along: in any order the result is right, in this one blocks are tight
            return x if np.array_equal(order, np.arange(total)) else jnp.take(x, order, axis=1)

        return jax.tree.map(one, tree)
