# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism: rows travel to the device that holds their expert, and back.

Every one of n devices has M tokens that choose k of E experts each, `R = M k` rows, and holds E/n
experts. A round is one all-to-all there and one back of C rows for each device, where
`C = ceil(SLACK * R / n)`; rounds go on until every row has been away, so no row is dropped,
however uneven the choice. Even choices take one round, any at most `ceil(min(R, M E / n) / C)`.

Communication a device and round: `(n - 1) * C * (D * e + 4)` bytes there (rows and the number of
their expert) and `(n - 1) * C * D * e` back. Backward: the rounds once more, and their transposes.
Memory: `n C` rows of D sent, received, sorted and answered, about `4 * SLACK * R` rows whatever
the choice: uneven ones cost rounds, not memory. Backward: the rows once, rounds are recomputed.

A row's result does not depend on which device it came from, nor on the rows beside it.

Source: Lepikhin et al., GShard (arXiv 2006.16668), with rounds in place of its capacity.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

SLACK = 1.25
"""Rows of a round over those of an even choice: room for uneven ones."""


def capacity(rows: int, shards: int) -> int:
    """The number of rows that a device sends to each other one in a round."""
    return max(1, -(-int(rows * SLACK) // shards))


def zeros_after(count: Int[Array, ""], shape: tuple[int, ...], dtype: Any) -> Array:
    """Make zeros that depend on `count`, which is not negative, so that XLA cannot make them early.

    XLA makes the plain zeros of all layers at once and keeps them from the first layer to the
    last: 1 GiB a layer at 16,384 tokens of Hy3, seen on GPU.
    """
    return jnp.full(shape, jnp.minimum(count, 0).astype(dtype))


def exchanged(
    rows: Float[Array, "M D"],
    chosen: Int[Array, "M k"],
    compute: Callable[..., Float[Array, "R D"]],
    weights: Any,
    *,
    axis_name: str,
    num_experts: int,
) -> Float[Array, "M k D"]:
    """Run each choice's expert on its row, inside shard_map, over the devices of `axis_name`.

    Args:
      chosen: experts, of all `num_experts`; device i holds the i-th E / n of them.
      compute: `compute(weights, rows, expert, sizes)` with rows sorted by local expert, which
        `expert` names and `sizes [E / n]` count. A row of no local expert has E / n, and gives 0.
    """
    shards, choices = lax.axis_size(axis_name), chosen.size
    each = num_experts // shards
    room = capacity(choices, shards)
    expert = chosen.reshape(-1)
    owner = expert // each
    order = jnp.argsort(owner)  # stable
    counts = jnp.bincount(owner, length=shards)
    starts = jnp.cumsum(counts) - counts
    rounds = -(-min(choices, rows.shape[0] * each) // room)
    # the same on every device of the mesh: all of them take part in a round or none
    needed = lax.pmax(-(-counts.max() // room), jax.sharding.get_abstract_mesh().axis_names)

    def swap(x):
        return lax.all_to_all(x, axis_name, 0, 0, tiled=True)

    @jax.checkpoint
    def there_and_back(rows, weights, index):
        """Exchange the choices `index [n * C]`, which are grouped by device."""
        sent = rows.at[index // chosen.shape[1]].get(mode="fill", fill_value=0)
        local = (expert - owner * each).at[index].get(mode="fill", fill_value=each)
        arrived, number = swap(sent), swap(local)
        by_expert = jnp.argsort(number)
        sizes = jnp.bincount(number, length=each).astype(jnp.int32)
        made = compute(weights, arrived[by_expert], number[by_expert], sizes)
        empty = zeros_after(sizes[0], made.shape, made.dtype)
        return swap(empty.at[by_expert].set(made, unique_indices=True))

    def round_(out, i):
        place = i * room + jnp.arange(room)
        index = order.at[starts[:, None] + place].get(mode="clip")
        index = jnp.where(place < counts[:, None], index, choices).reshape(-1)

        def more(out):
            return out.at[index].set(there_and_back(rows, weights, index), mode="drop")

        return lax.cond(i < needed, more, lambda out: out, out), None

    out = zeros_after(needed, (choices, rows.shape[1]), rows.dtype)
    out, _ = lax.scan(round_, out, jnp.arange(rounds))
    return out.reshape(*chosen.shape, -1)
