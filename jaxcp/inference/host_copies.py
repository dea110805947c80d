# SPDX-License-Identifier: Apache-2.0
"""Copies pages and snapshots between the pool and the host's memory, a few in a call.

One program takes blocks out of the pool and one puts them back; between them and the pinned memory
of the host, blocks are copied as they are, shard by shard. Once measured, nothing waits for a copy.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding

from jaxcp.attention.pool import Pool
from jaxcp.attention.taken_out import BLOCK, PAGES, STATES, put_back, taken_out
from jaxcp.inference.geometry import Geometry
from jaxcp.inference.host_store import Block, nobodys_block
from jaxcp.inference.limits import HostLimits
from jaxcp.inference.plan import Plan

log = logging.getLogger(__name__)

PAGES_A_CALL = 8
"""Pages of each shard that one call copies; and one state of each group, where there are states."""
MEMORY = "pinned_host"

_take_out = jax.jit(taken_out)
_put_back = jax.jit(put_back, donate_argnums=0)


class _Call(NamedTuple):
    """The pages of each shard, and the states of each group, that one call copies."""

    pages: list[Sequence[tuple[int, Block]]]
    states: list[Sequence[tuple[int, Block]]]


class HostCopies:
    """The copies of plans; none where the geometry has no room on the host.

    The content of a block is a dict: by device, its array of each dtype, in the host's memory.
    """

    def __init__(self, geometry: Geometry):
        self.geometry = geometry
        self.seconds_a_call = 0.0
        self._rows = geometry.groups * geometry.shards
        self._row_of: dict[Any, int] = {}

    def begin(self, pool: Pool) -> Pool:
        """The pool as it was, after both programs were compiled and timed.

        Raises:
          NotImplementedError: devices that have no pinned memory on the host.
        """
        if self.geometry.host is None:
            return pool
        sharding = jax.tree.leaves(pool.layers)[0].sharding
        self._shardings: list[Sharding] = [sharding] * 3
        if isinstance(sharding, NamedSharding):
            self._shardings = [
                NamedSharding(sharding.mesh, spec)  # type: ignore[arg-type]
                for spec in (BLOCK, PAGES, STATES)
            ]
        shape = self._rows, len(sharding.device_set)
        places: dict[Any, Any] = {**self._shardings[0].devices_indices_map(shape)}
        self._row_of = {device: index[0].start or 0 for device, index in places.items()}
        kinds = {memory.kind for device in places for memory in device.addressable_memories()}
        if MEMORY not in kinds:
            raise NotImplementedError(
                f"host_memory needs devices with memory of the kind {MEMORY}; these have "
                f"{sorted(kinds)}. Leave host_memory out"
            )
        numbers = self._numbers(_Call([()] * self._rows, [()] * self.geometry.groups))
        self._shapes = jax.eval_shape(taken_out, pool, *numbers)
        blocks: list[list] = [next(iter(kind), []) for kind in self._shapes]
        self._blanks = [[self._blank(x) for x in block] for block in blocks]
        return self._measured(pool)

    def settled(self, arrays: Any) -> Any:
        """Arrays committed to their device, as what comes back from the host is: without a mesh
        they are not, and jit compiles a program for each way."""
        if self.geometry.host is None or not jax.sharding.get_abstract_mesh().empty:
            return arrays
        return jax.device_put(arrays, *jax.tree.leaves(arrays)[0].devices())

    def limits(self) -> HostLimits | None:
        """The room of each group, with the price of what comes back."""
        host = self.geometry.host
        return None if host is None else dataclasses.replace(host, seconds=self.seconds)

    def seconds(self, pages: int, states: int) -> float:
        """Predict the seconds of copying in so many pages on each shard, and so many states."""
        return self.seconds_a_call * max(math.ceil(pages / PAGES_A_CALL), states)

    def save(self, pool: Pool, plans: Sequence[Plan]) -> None:
        """Send what plans give up to the host."""
        for call in self._calls([(plan.pages_out, plan.states_out) for plan in plans]):
            self._save(pool, call)

    def load(self, pool: Pool, plans: Sequence[Plan]) -> Pool:
        """The pool with what rows of the plans begin with."""
        copies = [
            tuple([(to, block) for block, to in pairs] for pairs in (plan.pages_in, plan.states_in))
            for plan in plans
        ]
        for call in self._calls(copies):
            pool = self._load(pool, call)
        return pool

    def _measured(self, pool: Pool) -> Pool:
        """The pool, from which a full call was copied out and back, twice: the second time nothing
        is compiled."""
        groups, states = self.geometry.groups, len(self._shapes[1])
        call = _Call(
            [[(0, nobodys_block()) for _ in range(PAGES_A_CALL)] for _ in range(self._rows)],
            [[(0, nobodys_block()) for _ in range(states)] for _ in range(groups)],
        )
        for _ in range(2):
            jax.block_until_ready(pool)
            began = time.perf_counter()
            self._save(pool, call)
            blocks = [block for pairs in (*call.pages, *call.states) for _, block in pairs]
            jax.block_until_ready([[*block.content.values()] for block in blocks])
            out = time.perf_counter()
            pool = jax.block_until_ready(self._load(pool, call))
            self.seconds_a_call = time.perf_counter() - out
        size = sum(x.nbytes for block in blocks for own in block.content.values() for x in own)
        log.info(
            "host memory: copied out at %.2f GB/s, and back at %.2f GB/s",
            size / (out - began) / 1e9, size / self.seconds_a_call / 1e9,
        )  # fmt: skip
        return pool

    def _calls(self, copies) -> Iterator[_Call]:
        """Divide the copies of each group, `(pages, states)`, among calls; page i of shard r is
        `r * pages_per_shard + i`."""
        each = self.geometry.pages_per_shard
        by_row: list[list[tuple[int, Block]]] = [[] for _ in range(self._rows)]
        for group, (pages, _) in enumerate(copies):
            for number, block in pages:
                row = group * self.geometry.shards + number // each
                by_row[row].append((number % each, block))
        most = max(map(len, by_row)), max(len(states) for _, states in copies)
        for i in range(max(math.ceil(most[0] / PAGES_A_CALL), most[1])):
            own = slice(i * PAGES_A_CALL, (i + 1) * PAGES_A_CALL)
            yield _Call([pairs[own] for pairs in by_row], [s[i : i + 1] for _, s in copies])

    def _numbers(self, call: _Call) -> Any:
        """Numbers of the pages and of the states of a call, on devices."""
        pages = np.full((self._rows, PAGES_A_CALL), -1, np.int32)
        states = np.full((self.geometry.groups, min(1, self.geometry.states)), -1, np.int32)
        for array, lists in [(pages, call.pages), (states, call.states)]:
            for line, pairs in zip(array, lists, strict=True):
                line[: len(pairs)] = [number for number, _ in pairs]
        return jax.device_put((pages, states), tuple(self._shardings[1:]))

    def _slots(self, call: _Call) -> Iterator[tuple[int, int, Any, Block]]:
        """Each `(0 for pages or 1 for states, slot, device, block)` that a call copies."""
        for device, row in self._row_of.items():
            for slot, (_, block) in enumerate(call.pages[row]):
                yield 0, slot, device, block
            for slot, (_, block) in enumerate(call.states[row // self.geometry.shards]):
                yield 1, slot, device, block

    def _save(self, pool, call) -> None:
        local = jax.tree.map(_by_device, _take_out(pool, *self._numbers(call)))
        slots = list(self._slots(call))
        arrays = [[x[device] for x in local[kind][slot]] for kind, slot, device, _ in slots]
        arrays = _moved(arrays, [device for _, _, device, _ in slots], MEMORY)
        for (_, _, device, block), own in zip(slots, arrays, strict=True):
            if block.content is None:
                block.content = {}
            block.content[device] = own

    def _load(self, pool, call) -> Pool:
        slots = list(self._slots(call))
        arrays = [block.content[device] for _, _, device, block in slots]
        arrays = _moved(arrays, [device for _, _, device, _ in slots], None)
        own = {slot[:3]: x for slot, x in zip(slots, arrays, strict=True)}
        blocks = [
            [self._assembled(own, kind, slot) for slot in range(len(self._shapes[kind]))]
            for kind in (0, 1)
        ]
        return _put_back(pool, *self._numbers(call), *blocks)

    def _assembled(self, own, kind, slot) -> list[jax.Array]:
        """The arrays of a block, blank where a device has none of it."""
        assembled: list[jax.Array] = []
        for number, (shape, blank) in enumerate(
            zip(self._shapes[kind][slot], self._blanks[kind], strict=True)
        ):
            parts = [
                own[kind, slot, device][number] if (kind, slot, device) in own else blank[device]
                for device in self._row_of
            ]
            assembled.append(
                jax.make_array_from_single_device_arrays(shape.shape, self._shardings[0], parts)
            )
        return assembled

    def _blank(self, shape) -> dict[Any, jax.Array]:
        local = np.zeros(self._shardings[0].shard_shape(shape.shape), shape.dtype)
        return {
            device: jax.device_put(local, SingleDeviceSharding(device)) for device in self._row_of
        }


def _by_device(array) -> dict[Any, jax.Array]:
    return {shard.device: shard.data for shard in array.addressable_shards}


def _moved(arrays, devices, memory):
    """Lists of arrays, each in a memory of its device."""
    there = [
        [SingleDeviceSharding(device, memory_kind=memory)] * len(own)
        for own, device in zip(arrays, devices, strict=True)
    ]
    return jax.device_put(arrays, there)
