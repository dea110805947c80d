# SPDX-License-Identifier: Apache-2.0
"""Host batches on the mesh: the rows that a process reads, and the pieces that its devices hold."""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcp.data.batch import Batch
from jaxcp.layout import Layout


class Share(NamedTuple):
    """The rows of a batch that one process reads."""

    rows: np.ndarray
    """Their numbers in the batch, ascending."""
    total: int
    """Rows of the whole batch."""
    counted: np.ndarray
    """Places in `rows` of those that this process counts: of all processes that read a row one
    does."""


@functools.lru_cache(maxsize=8)
def share_of(mesh: Mesh, total: int, accumulate: int) -> Share:
    """Find the rows of which this process's devices hold some tokens; all, of one process.

    Raises:
      ValueError: `accumulate` pieces do not divide over the axis `data`.
    """
    if total % (accumulate * mesh.shape["data"]):
        raise ValueError(
            f"rows must divide by accumulate x data = {accumulate} x {mesh.shape['data']}; "
            f"got {total} rows"
        )
    numbers = np.arange(total).reshape(accumulate, -1)
    local = NamedSharding(mesh, P(None, "data")).addressable_devices_indices_map(numbers.shape)
    rows = np.unique(np.concatenate([numbers[index].ravel() for index in local.values()]))
    shards = numbers.reshape(accumulate, mesh.shape["data"], -1)
    first = mesh.devices.reshape(mesh.shape["data"], -1)[:, 0]  # `data` is the first axis
    ours = [device.process_index == jax.process_index() for device in first]
    return Share(rows, total, np.flatnonzero(np.isin(rows, shards[:, ours])))


def put(
    batch: Batch, *, mesh: Mesh, layout: Layout, accumulate: int = 1, share: Share | None = None
) -> dict[str, jax.Array]:
    """Put a host batch `[B, T]` on the mesh as `[accumulate, B / accumulate, padded T]`: rows over
    `data`; tokens, in the order of `layout`, over `seq`.

    No process waits for another, so a thread may do it beside the steps.

    Args:
      share: the rows of a larger batch that `batch` has; None where it has all.
    """
    share = share or whole(batch["tokens"].shape[0], mesh, accumulate)
    sharding = NamedSharding(mesh, P(None, "data", "seq"))
    placed = layout.permute(batch, shards=mesh.shape["seq"])
    numbers = np.arange(share.total).reshape(accumulate, -1)

    def one(x: np.ndarray) -> jax.Array:
        def piece(index: Any) -> np.ndarray:
            rows = np.searchsorted(share.rows, numbers[index[:2]])
            return x[(rows, *index[2:])]

        return jax.make_array_from_callback((*numbers.shape, *x.shape[1:]), sharding, piece)

    return {key: one(x) for key, x in placed.items()}


def whole(total: int, mesh: Mesh, accumulate: int) -> Share:
    """The share of a process that has read all rows."""
    numbers = np.arange(total)
    share = share_of(mesh, total, accumulate)
    return Share(numbers, total, share.rows[share.counted])


def prefetch(make, start: int, stop: int) -> Iterator[Any]:
    """Yield `make(step)` for each step; a thread makes the next one meanwhile."""
    with ThreadPoolExecutor(1, thread_name_prefix="jaxcp-data") as pool:
        future = pool.submit(make, start)
        for step in range(start, stop):
            ready = future.result()
            if step + 1 < stop:
                future = pool.submit(make, step + 1)
            yield ready
