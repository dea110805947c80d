# SPDX-License-Identifier: Apache-2.0
"""The pool of pages that all sequences share, and attention over it.

What a layer keeps of a sequence lies in pages, wherever there is room (`Full`, `Latent`), or in one
state of constant size (`Window`). The scheduler decides which sequence has which; here they are
numbers. `Compressed` has neither yet.

    sequence b     page 0    page 1    page 2    page 3    page 4     page = 64 tokens in order
    shard          0         1         2         0         1          of three: j % shards
    pages[b]       [shard 0: 5 9 | shard 1: 2 7 | shard 2: 4 .]       numbers within the shard

So shards are even to one page, whatever the turns; a sequence grows by a page without a copy; and
sequences that begin alike share pages.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxcp.attention.over_cache import NewTokens, OverKept
from jaxcp.attention.places import PagedSlots
from jaxcp.attention.slots import (
    AXIS,
    MAX_EXTEND,
    ROWS,
    TOKENS,
    on_mesh,
    positions_in_pages,
    shards_in_scope,
)
from jaxcp.context_parallel.shards import on_shards
from jaxcp.context_parallel.strategy import Strategy


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=["shards", "page"]
)
@dataclasses.dataclass(frozen=True)
class Pool:
    """Pages and states of all sequences, by stack of layers."""

    layers: dict[str, Any]
    """By the name of a stack of layers: a kind, whose arrays have a leading axis of layers."""
    shards: int
    page: int
    """Tokens of a page."""

    def bytes_per_device(self) -> int:
        """Bytes that one device holds."""
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(self.layers))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolRoom:
    """Sizes that every kind needs to be made, empty, in a pool; see `cache.Room`."""

    pages: int
    """Pages of a device."""
    page: int
    states: int
    """States of a device."""
    dtype: Any

    @property
    def batch_size(self) -> int:
        """Raise: kinds with arrays of a row's length, such as compressed blocks, have no pages."""
        raise NotImplementedError(
            "this model's layers keep compressed blocks, which have no pages yet: talk to it by "
            "`engine.session()`"
        )

    def for_slots(self, layers: int, *shape: int, spec: tuple) -> jax.Array:
        """Zeros for each slot, `[layers, P, page, *shape]`; `spec` says how `shape` is sharded."""
        axes = jax.sharding.get_abstract_mesh().shape
        pages = self.pages * axes.get("data", 1) * axes.get(AXIS, 1)
        array = jnp.zeros((layers, pages, self.page, *shape), self.dtype)
        return on_mesh(array, P(*PagedSlots.stack, *spec))

    def for_state(self, layers: int, *shape: int, spec: tuple) -> jax.Array:
        """Zeros for each state, `[layers, states, *shape]`, the same on every shard of `seq`."""
        states = self.states * jax.sharding.get_abstract_mesh().shape.get("data", 1)
        array = jnp.zeros((layers, states, *shape), self.dtype)
        return on_mesh(array, P(None, "data", *spec))


def empty_pool(
    makers: Mapping[str, Callable[[PoolRoom], Any]],
    *,
    pages: int,
    page: int,
    states: int,
    dtype: Any,
) -> Pool:
    """A pool on the mesh in scope.

    Args:
      makers: by the name of a stack of layers, what makes its kind, empty.
      pages, states: so many a device, of `page` tokens each.
    """
    room = PoolRoom(pages=pages, page=page, states=states, dtype=dtype)
    shards = shards_in_scope()

    @jax.jit
    def make():
        layers = {name: maker(room) for name, maker in makers.items()}
        return Pool(layers=layers, shards=shards, page=page)

    return make()


class OverPool(OverKept):
    """Attention over the pages and states of `pool` that are a batch's; `pool_after` is what it
    becomes.

    Args:
      positions: int32 `[B, T]`, from `before` on; `PAD_POSITION` for pads.
      before, added: int32 `[B]`, tokens that each sequence has in the pool, and of `positions`.
      pages: int32 `[B, shards * M]`: column `r * M + i` is the i-th page of a sequence on shard r,
        counted from 0 on each device; columns behind its pages may hold any number.
      states: int32 `[B]`, the state of each sequence; one beyond the last of a device writes none.
      sharded: the tokens lie over `seq`, each where its page is; else every device has them all.
      strategy: for layers that see everything, see `OverCache`.
      used: (static) bounds the slots that a shard holds of a sequence afterwards; None: all of its
        pages.
    Raises:
      ValueError: more than `MAX_EXTEND` tokens that are not sharded.
      NotImplementedError: the strategy cannot fill a cache.
    """

    def __init__(
        self,
        pool: Pool,
        positions: Any,
        before: Any,
        added: Any,
        *,
        pages: Any,
        states: Any,
        sharded: bool,
        strategy: Strategy | None = None,
        used: int | None = None,
    ):
        if strategy is not None and not strategy.fills_caches:
            raise NotImplementedError("prefill over a pool has no reproducible form; use Ring()")
        if not sharded and positions.shape[1] > MAX_EXTEND:
            raise ValueError(
                f"at most {MAX_EXTEND} tokens are not sharded; got {positions.shape[1]}: "
                "sharded=True"
            )
        self.pool = pool
        count = pages.shape[1] // pool.shards
        local = functools.partial(positions_in_pages, count=count, page=pool.page)
        tokens = NewTokens(
            positions=positions,
            before=before,
            added=added,
            sharded=sharded,
            strategy=strategy,
            used=used,
            first=False,
            # a window spans pages of every shard: None gathers all of the new tokens, {} none
            halos=collections.defaultdict(lambda: None if pool.shards > 1 else {}),
            place=PagedSlots(positions, pages, states, sharded=sharded),
            slots=on_shards(local, (ROWS,), TOKENS)(before + added),
        )
        super().__init__(pool.layers, tokens)

    @property
    def pool_after(self) -> Pool:
        """The pool after all layers."""
        return dataclasses.replace(self.pool, layers=self.layers)


def copied(pool: Pool, pages: Any, states: Any) -> Pool:
    """The pool after copies from page to page and from state to state, one after the other.

    Args:
      pages, states: int32 `[2, n]`, sources and targets; targets of -1 end the list. Page i of
        shard r is `r * pages of a shard + i`; source and target are on one shard.
    """
    with_mesh = not jax.sharding.get_abstract_mesh().empty
    kinds = {name: (kind.in_pages, kind) for name, kind in pool.layers.items()}
    flat, tree = jax.tree.flatten({name: kind for name, (_, kind) in kinds.items()})
    paged = jax.tree.leaves(
        {name: jax.tree.map(lambda _, p=p: p, kind) for name, (p, kind) in kinds.items()}
    )
    specs = [jax.typeof(x).sharding.spec if with_mesh else None for x in flat]

    def local(arrays, pages, states):
        rank = jax.lax.axis_index(AXIS) if with_mesh else 0
        return [
            _copied(x, pages if in_pages else states, rank if in_pages else 0)
            for x, in_pages in zip(arrays, paged, strict=True)
        ]

    run = on_shards(local, (specs, P(), P()), specs)
    layers = jax.tree.unflatten(tree, run(flat, pages, states))
    return dataclasses.replace(pool, layers=layers)


def _copied(stack, pairs, rank):
    """`stack [L, n, ...]` of the shard `rank` with rows copied."""
    count, (sources, targets) = stack.shape[1], pairs

    def one(i, stack):
        source, target = sources[i] - rank * count, targets[i] - rank * count
        own = (target >= 0) & (target < count)
        row = jax.lax.dynamic_index_in_dim(stack, jnp.clip(source, 0, count - 1), 1)
        return stack.at[:, jnp.where(own, target, count)].set(row[:, 0], mode="drop")

    return jax.lax.fori_loop(0, (targets >= 0).sum(), one, stack)
