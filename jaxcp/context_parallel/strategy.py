# SPDX-License-Identifier: Apache-2.0
"""What every strategy is: a frozen value with one method on local shards."""

import dataclasses
import functools

from jaxcp.context_parallel.fixed_order import attend_in_fixed_order
from jaxcp.layout import Layout, Zigzag


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strategy:
    """How queries on one shard meet keys on the others.

    `layout` is the order of tokens that suits the strategy; whoever puts tokens on devices asks
    for it. The result is right under any layout, because only positions mask.

    `reproducible`: the same bits, forward and backward, from 1, 2, 4 and 8 shards and for every
    strategy, at the cost that `fixed_order` states: keys are then gathered, whatever the strategy.
    With latents (`latent_attention`) only while the `data` and `model` axes stay as they are.
    """

    layout: Layout = dataclasses.field(default_factory=Zigzag)
    reproducible: bool = False

    def __init_subclass__(cls, **options):
        """No `attend` of a subclass can overlook `reproducible`."""
        super().__init_subclass__(**options)
        if "attend" in cls.__dict__:
            cls.attend = _or_in_fixed_order(cls.attend)  # type: ignore[method-assign]

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


def _or_in_fixed_order(attend):
    @functools.wraps(attend)
    def either(self, *arrays, **options):
        if self.reproducible:
            return attend_in_fixed_order(*arrays, layout=self.layout, **options)
        return attend(self, *arrays, **options)

    return either


def expanded(k, v, expand, weights):
    """Keys and values, of themselves or of what travelled for them."""
    return (k, v) if expand is None else expand(k, *weights)
