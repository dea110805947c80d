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
from typing import Any, NamedTuple

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


class _Groups(NamedTuple):
    """The R choices of a device, those of each of n devices together.

        by_device   choices of device 0 | choices of device 1 | ...
                    ^ starts[0]           ^ starts[1]
                    counts[0] of them     counts[1]

    A round takes the next C of every group.
    """

    by_device: Int[Array, "R"]
    starts: Int[Array, "n"]
    counts: Int[Array, "n"]

    @classmethod
    def of(cls, device: Int[Array, "R"], shards: int) -> "_Groups":
        counts = jnp.bincount(device, length=shards)
        return cls(jnp.argsort(device), jnp.cumsum(counts) - counts, counts)  # stable

    def in_round(self, i, rows: int) -> Int[Array, "nC"]:
        """The choices that go in round i, `rows` for each device; R where a group has ended."""
        place = i * rows + jnp.arange(rows)
        choices = self.by_device.at[self.starts[:, None] + place].get(mode="clip")
        return jnp.where(place < self.counts[:, None], choices, self.by_device.size).reshape(-1)


@jax.named_scope("exchange")
def exchanged(
    rows: Float[Array, "M D"],
    chosen: Int[Array, "M k"],
    compute: Callable[..., Float[Array, "R D"]],
    weights: Any,
    *,
    axis_name: str,
    num_experts: int,
) -> Float[Array, "M k D"]:
    """Apply the expert of each choice to its row. Inside shard_map, over devices of `axis_name`.

    Args:
      chosen: experts, of all `num_experts`; device i holds the i-th E / n of them.
      compute: `compute(weights, rows, expert, sizes)` with rows sorted by local expert, which
        `expert` names and `sizes [E / n]` count. A row of no local expert has E / n, and gives 0.
    """
    shards = lax.axis_size(axis_name)
    local_experts = num_experts // shards
    device, local_expert = jnp.divmod(chosen.reshape(-1), local_experts)
    groups = _Groups.of(device, shards)
    round_rows = capacity(chosen.size, shards)
    most_rounds = -(-min(chosen.size, rows.shape[0] * local_experts) // round_rows)
    rounds = -(-groups.counts.max() // round_rows)
    # the same on every device of the mesh: all of them take part in a round or none
    rounds = lax.pmax(rounds, jax.sharding.get_abstract_mesh().axis_names)

    def swap(x):
        return lax.all_to_all(x, axis_name, 0, 0, tiled=True)

    @jax.checkpoint
    def there_and_back(rows, weights, choices):
        sent = rows.at[choices // chosen.shape[1]].get(mode="fill", fill_value=0)
        experts = local_expert.at[choices].get(mode="fill", fill_value=local_experts)
        rows, experts = swap(sent), swap(experts)
        by_expert = jnp.argsort(experts)
        sizes = jnp.bincount(experts, length=local_experts).astype(jnp.int32)
        results = compute(weights, rows[by_expert], experts[by_expert], sizes)
        empty = zeros_after(sizes[0], results.shape, results.dtype)
        return swap(empty.at[by_expert].set(results, unique_indices=True))

    def one_round(out, i):
        choices = groups.in_round(i, round_rows)

        def send(out):
            return out.at[choices].set(there_and_back(rows, weights, choices), mode="drop")

        return lax.cond(i < rounds, send, lambda out: out, out), None

    out = zeros_after(rounds, (chosen.size, rows.shape[1]), rows.dtype)
    out, _ = lax.scan(one_round, out, jnp.arange(most_rounds))
    return out.reshape(*chosen.shape, -1)
