# SPDX-License-Identifier: Apache-2.0
"""Ulysses among neighbours, rings across them: u x r devices, u of them exchange heads.

Communication a device: all-to-alls of q, k, v and out among u neighbours (see `ulysses`), then
r - 1 rotations of the K and V that it holds by then, all tokens of u shards and 1/u of the heads
(see `ring`): `B t max(K, u) (H + V) e` bytes each, and positions, `4 u B t`.
Where K < u a KV head's gradients from several devices are summed in k's dtype, not in float32.
Memory, forward, beside the arguments: that of a ring,
`2 (B t max(K, u) (H + V) e + 4 B t N V) + B t N V e`; q takes the place that out gets.

Source: Fang and Zhao, USP (arXiv 2405.07719).
"""

import dataclasses

from jax import lax

from jaxcp.context_parallel.circulate import Circle, circulate
from jaxcp.context_parallel.cost import Cost, Shapes, Traffic, circle_cost
from jaxcp.context_parallel.exchange import Exchange, exchanged_shapes, gathered
from jaxcp.context_parallel.strategy import Strategy


@dataclasses.dataclass(frozen=True, kw_only=True)
class USP(Strategy):
    """`ulysses` neighbours exchange heads for tokens, the rest is a ring; every mask is honoured.

    `ulysses` must divide the shards and the query heads. Over two mesh axes
    (`axis_name=("outer", "inner")`) the neighbours are those of the last one.

    Raises:
      ValueError: `ulysses` below 1; at the call: one that does not divide the shards, or the
        query heads.
      NotImplementedError (at the call): a latent, which has no heads to send.
    """

    ulysses: int

    def __post_init__(self):
        if self.ulysses < 1:
            raise ValueError(f"ulysses must be at least 1; got {self.ulysses}")

    def attend(
        self, q, k, v, q_pos, kv_pos, q_seg, kv_seg, *,
        axis_name, mask, expand=None, weights=(), **options,
    ):  # fmt: skip
        if expand is not None:
            raise NotImplementedError(
                "USP sends heads, which a latent has none of; use Ring() or AllGather()"
            )
        self._check(lax.axis_size(axis_name))
        swap = Exchange.over(axis_name, self.ulysses, q.shape[2], k.shape[2])
        ids = [gathered(x, axis_name, swap.groups) for x in (q_pos, kv_pos, q_seg, kv_seg)]
        circles = (Circle.of(axis_name, stride=self.ulysses),)
        static = tuple({"mask": mask, **options}.items())
        out, lse = circulate(circles, static, swap.queries(q), swap.keys(k), swap.keys(v), *ids)
        return swap.back(out), swap.back(lse)

    def cost(self, shapes: Shapes) -> Cost:
        """Leaves out the lse, as `Ulysses.cost` does."""
        self._check(shapes.shards)
        u, inner = self.ulysses, exchanged_shapes(shapes, self.ulysses)
        circle = circle_cost(inner)
        swaps = Traffic("all-to-all", 4, shapes.q_bytes + shapes.out_bytes + inner.kv_bytes, u)
        ids = Traffic("all-gather", shapes.ids, u * shapes.query_ids_bytes, u)
        return Cost(
            forward=(swaps, ids, *circle.forward),
            backward=(swaps, *circle.backward),
            held=circle.held,
        )

    def _check(self, shards):
        if shards % self.ulysses:
            raise ValueError(f"USP: ulysses={self.ulysses} does not divide the {shards} shards")
