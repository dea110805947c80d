# SPDX-License-Identifier: Apache-2.0
"""Runs plans on devices: owns the pool, and the few programs that there are.

| program | how many |
|---|---|
| copies of pages and states | 1 |
| a step of decoding, all rows | 1 |
| a chunk of a prompt | one for each of `SIZES` |

Steps donate the pool. One that fails may have taken it along: `reset` makes a new one.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxcp.attention.pool import OverPool, Pool, copied
from jaxcp.context_parallel import Strategy
from jaxcp.context_parallel.overlap import compiler_options
from jaxcp.inference.batch import (
    FIELDS,
    SHORT,
    Batch,
    Geometry,
    chunk_batch,
    copies,
    decode_batch,
    resting_chunk,
)
from jaxcp.inference.plan import Plan
from jaxcp.inference.sampling import sample_rows
from jaxcp.inference.steps import logits_at
from pallas_kernels.dispatch import target_platform

WIDTHS = (128, 512, 2048)
"""Tokens a shard of the chunks that are sharded."""


class Runner:
    """The pool of an engine, and what computes on it. Make and use it under the engine's mesh."""

    def __init__(self, model: Any, geometry: Geometry, *, strategy: Strategy | None = None):
        self.model, self.geometry, self.strategy = model, geometry, strategy
        self.sizes = _sizes(geometry)
        self.pool: Pool
        self.reset()

    def reset(self) -> None:
        """Make the pool anew: whatever was in it is lost."""
        g = self.geometry
        self.pool = self.model.init_pool(pages=g.pages_per_shard, page=g.page_size, states=g.states)

    def run(self, plan: Plan) -> list[list[int]]:
        """The tokens that each row of the plan samples, for `Scheduler.advance`."""
        if plan.page_copies or plan.state_copies:
            self._copy(plan.page_copies, plan.state_copies)
        sampled: dict[int, int] = {}
        single = [row for row in plan.rows if row.count == 1]
        if single:
            tokens = self._step(decode_batch(single, self.geometry))
            sampled = {id(row): int(tokens[row.seat.row]) for row in single}
        for row in plan.rows:
            if row.count > 1:
                tokens = self._step(chunk_batch(row, self.geometry, self.sizes))
                sampled[id(row)] = int(tokens[0])
        snapshots = [
            (row.seat.state, row.snapshot) for row in plan.rows if row.snapshot is not None
        ]
        if snapshots:
            self._copy([], snapshots)
        return [[sampled[id(row)]] if row.samples else [] for row in plan.rows]

    def warm_up(self) -> None:
        """Compile every program: no request compiles anything afterwards."""
        self._copy([], [])
        self._step(decode_batch([], self.geometry))
        for size in self.sizes:
            self._step(resting_chunk(size, self.geometry))

    def _copy(self, pages, states) -> None:
        pairs = (copies(x, self.geometry.max_rows) for x in (pages, states))
        self.pool = _program(_copy)(self.pool, *pairs)

    def _step(self, batch: Batch) -> np.ndarray:
        arrays = batch.ids, batch.positions, batch.numbers
        if not jax.sharding.get_abstract_mesh().empty:
            tokens = P("data", "seq" if batch.sharded else None)
            specs = tokens, tokens, P("data")
            arrays = tuple(jax.device_put(x, s) for x, s in zip(arrays, specs, strict=True))
        static = batch.sharded, self.geometry.listed * self.geometry.shards, self.strategy
        found, self.pool = _program(_step)(self.model, self.pool, *arrays, *static)
        return np.asarray(found)


def _sizes(geometry) -> tuple[int, ...]:
    """Tokens of chunks, up to one that takes the longest prompt at once."""
    sizes = (*SHORT, *(width * geometry.shards for width in WIDTHS))
    longest = geometry.shards * geometry.listed * geometry.page_size
    enough = [size for size in sizes if size >= longest]
    return tuple(size for size in sizes if not enough or size <= enough[0])


def _step(model, pool, ids, positions, numbers, sharded, listed, strategy):
    """`(token [B] after each row's last, pool)`."""
    columns = {name: numbers[:, i] for i, name in enumerate(FIELDS)}
    attend = OverPool(
        pool, positions, columns["before"], columns["added"], pages=numbers[:, -listed:],
        states=columns["state"], sharded=sharded, strategy=strategy,
    )  # fmt: skip
    hidden, _ = model.forward(ids, positions, attend)
    logits = logits_at(model, hidden, positions, columns["last"])
    seeds = lax.bitcast_convert_type(columns["seed"], jnp.uint32)
    temperature, top_p = (
        lax.bitcast_convert_type(columns[name], jnp.float32) for name in ("temperature", "top_p")
    )
    token = sample_rows(logits, seeds, columns["last"], temperature, columns["top_k"], top_p)
    return token, attend.pool_after


def _copy(pool, pages, states):
    return copied(pool, pages, states)


def _program(fn):
    return _compiled(fn, target_platform())


@functools.cache
def _compiled(fn, platform: str):
    static, donated = {_step: ((5, 6, 7), 1), _copy: ((), 0)}[fn]
    return jax.jit(
        fn, static_argnums=static, donate_argnums=donated,
        compiler_options=compiler_options(platform),
    )  # fmt: skip
