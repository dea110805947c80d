# SPDX-License-Identifier: Apache-2.0
"""The base of every strategy: a frozen value with one method on local shards."""

import dataclasses
from typing import ClassVar

from jaxcp.context_parallel.cost import Cost, Shapes
from jaxcp.layout import Layout, Zigzag


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strategy:
    """A way in which queries on one shard meet keys on the others.

    `layout` is the order of tokens that suits the strategy; whoever puts tokens on devices asks
    for it. The result is right under any layout, because only positions mask.

    `fills_caches`: keys may be other tokens than the queries', those of a cache among them.
    `same_bits`: the result has the bits of one shard whatever their number, so nothing else may
    stand in for the strategy, nor be merged with what it gives; of a latent `attend` is told its
    `copies`.
    """

    layout: Layout = dataclasses.field(default_factory=Zigzag)
    fills_caches: ClassVar[bool] = True
    same_bits: ClassVar[bool] = False

    def attend(
        self, q, k, v, q_pos, kv_pos, q_seg, kv_seg, *,
        axis_name, mask, expand=None, weights=(), **options,
    ):  # fmt: skip
        """`(out in q's dtype, lse)` of local queries over all shards' keys. Runs inside shard_map.

        `options`: `soft_cap`, `scale` and `implementation`, as `flash_attention` takes them.
        With `expand` (and its `weights`) `k` is what travels, a tree of `[B, S, ...]`, v is None,
        and `expand(k, *weights)` makes `(k, v)` of it.

        Differentiable in q, k, v and weights. Raises NotImplementedError for what it cannot honour.
        """
        raise NotImplementedError

    def cost(self, shapes: Shapes) -> Cost:
        """Count what a device sends, forward and backward, and holds; of K and V, not of latents.

        Raises what `attend` raises for such shapes.
        """
        raise NotImplementedError


def expanded(k, v, expand, weights):
    """Keys and values, of themselves or of what travelled for them."""
    return (k, v) if expand is None else expand(k, *weights)
