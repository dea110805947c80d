# SPDX-License-Identifier: Apache-2.0
"""Rolling rows: what a cache keeps of the newest tokens, the same on every device.

Row `p % R` of R holds the token at position p, until the token at p + R takes its place; which
position a row holds follows from how many tokens there were. R = 4 after 6 tokens, then after 7:

    row        0  1  2  3          0  1  2  3
    position   4  5  2  3    ->    4  5  6  3
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped

from pallas_kernels import PAD_POSITION


def row_positions(lengths: Int[Array, "B"], rows: int) -> Int[Array, "B R"]:
    """The position in each of `rows` after so many tokens; `PAD_POSITION` in one still empty."""
    last = lengths[:, None] - 1
    positions = last - (last - jnp.arange(rows, dtype=jnp.int32)) % rows
    return jnp.where(positions < 0, PAD_POSITION, positions)


def append(
    rows: Shaped[Array, "B R ..."], new: Shaped[Array, "B T ..."], positions: Int[Array, "B T"]
) -> Shaped[Array, "B R ..."]:
    """The rows after `new` tokens, R at most, which every shard has."""
    return _put(rows, new, positions, positions != PAD_POSITION)


def renew(
    rows: Shaped[Array, "B R ..."],
    new: Shaped[Array, "B T ..."],
    positions: Int[Array, "B T"],
    start: Int[Array, "B"],
    end: Int[Array, "B"],
    *,
    axis_name: str | None,
) -> Shaped[Array, "B R ..."]:
    """The rows after tokens `start..end - 1`, which lie in any order over shards; None: on one."""
    count = rows.shape[1]
    newest = (positions != PAD_POSITION) & (positions >= end[:, None] - count)
    written = _put(jnp.zeros_like(rows), new, positions, newest)
    if axis_name is not None:
        written = lax.psum(written, axis_name)  # exact: every row has one owner
    then = row_positions(end, count)
    fresh = (then >= start[:, None]) & (then != PAD_POSITION)
    return jnp.where(fresh[(..., *[None] * (rows.ndim - 2))], written, rows)


def _put(rows, new, positions, which):
    count = rows.shape[1]
    row = jnp.where(which, positions % count, count)  # the row after the last is dropped
    batch = jnp.arange(rows.shape[0])[:, None]
    return rows.at[batch, row].set(new.astype(rows.dtype), mode="drop")
