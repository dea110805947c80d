# SPDX-License-Identifier: Apache-2.0
"""All-to-all exchange of heads for tokens among groups of neighbouring devices."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcp.context_parallel.cost import Shapes


@dataclasses.dataclass(frozen=True)
class Exchange:
    """The exchange of `[B, t, heads, H]` for `[B, size * t, heads of one device, H]`, and back.

    `kv_heads`: the KV heads that each device of a group needs, equally many, `[size][some]`.
    """

    axis_name: Any
    groups: list[list[int]] | None
    kv_heads: np.ndarray

    @classmethod
    def over(cls, axis_name, size: int, num_heads: int, num_kv_heads: int) -> "Exchange":
        """Among `size` neighbours of `axis_name`.

        Raises:
          ValueError: the query heads do not divide.
        """
        n = lax.axis_size(axis_name)
        _check_divides(num_heads, size)
        groups = None
        if size < n:
            groups = [list(range(i, i + size)) for i in range(0, n, size)]
        return cls(axis_name, groups, _kv_heads(size, num_heads, num_kv_heads))

    def queries(self, x):
        return self._swap(x, 2, 1)

    def keys(self, x):
        """KV heads go where their query heads are; one that several need is sent to each."""
        needed = self.kv_heads.reshape(-1)
        same = np.array_equal(needed, np.arange(x.shape[2]))
        return self._swap(x if same else x[:, :, needed], 2, 1)

    def back(self, x):
        return self._swap(x, 1, 2)

    def keys_back(self, x, dtype):
        """The float32 gradient `x` of what `keys` gave, in `dtype`.

        Where a KV head went to several devices their parts are summed first, in float32.
        """
        needed = self.kv_heads.reshape(-1)
        if len(set(needed)) == len(needed):
            return self.back(x.astype(dtype))
        x = self.back(x)
        return jnp.stack([x[:, :, needed == h].sum(2) for h in sorted(set(needed))], 2).astype(
            dtype
        )

    def _swap(self, x, split, concat):
        if len(self.kv_heads) == 1:
            return x
        return lax.all_to_all(
            x, self.axis_name, split, concat, axis_index_groups=self.groups, tiled=True
        )


def exchanged_shapes(shapes: Shapes, size: int) -> Shapes:
    """The shapes that a device holds after an exchange among `size`; `shards` are the groups.

    Raises:
      ValueError: the query heads do not divide.
    """
    _check_divides(shapes.num_heads, size)
    return dataclasses.replace(
        shapes,
        shards=shapes.shards // size,
        tokens=size * shapes.tokens,
        keys=size * shapes.keys,
        num_heads=shapes.num_heads // size,
        num_kv_heads=_kv_heads(size, shapes.num_heads, shapes.num_kv_heads).shape[1],
    )


def _check_divides(num_heads, size):
    if num_heads % size:
        raise ValueError(
            f"an exchange of heads over {size} devices needs a multiple of {size} query heads; "
            f"got {num_heads} a device; use Ring(), or USP with a smaller ulysses"
        )


def _kv_heads(size, num_heads, num_kv_heads):
    """KV heads that each of `size` devices needs, so that query head i reads entry i * m // N."""
    each = num_heads // size
    read = np.arange(num_heads).reshape(size, each) * num_kv_heads // num_heads
    few = [np.unique(row) for row in read]
    fits = {len(row) for row in few} == {len(few[0])} and all(
        np.array_equal(np.repeat(row, each // len(row)), reads)
        for row, reads in zip(few, read, strict=True)
        if each % len(row) == 0
    )
    # heads that straddle devices unevenly: one KV head for each query head
    return np.stack(few) if fits and each % len(few[0]) == 0 else read


def gathered(x, axis_name, groups=None):
    """`x [B, t, ...]` of every shard (of the group), side by side; None stays None."""
    if x is None or (groups is not None and len(groups[0]) == 1):
        return x
    return lax.all_gather(x, axis_name, axis=1, tiled=True, axis_index_groups=groups)


def scattered(x, axis_name):
    """The sum over shards of `x [B, n * t, ...]`, of which each shard gets its own rows.

    Tokens come first: of any other axis XLA on TPU sums all of it everywhere and cuts after that.
    """
    batch, tokens = x.shape[:2]
    rows = x.swapaxes(0, 1).reshape(tokens, -1)
    rows = lax.psum_scatter(rows, axis_name, scatter_dimension=0, tiled=True)
    return rows.reshape(-1, batch, *x.shape[2:]).swapaxes(0, 1)
