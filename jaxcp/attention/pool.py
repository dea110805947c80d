# SPDX-License-Identifier: Apache-2.0
"""The pool of pages that all sequences share, and attention over it.

What a layer keeps of a sequence lies in pages, wherever there is room (`Full`, `Latent`), in one
state of constant size (`Window`), or in both (`Compressed`). The scheduler decides which sequence
has which; here they are numbers.

    sequence b     page 0    page 1    page 2    page 3    page 4     page = 64 tokens in order
    shard          0         1         2         0         1          of three: j % shards
    pages[b]       [shard 0: 5 9 | shard 1: 2 7 | shard 2: 4 .]       numbers within the shard

So shards are even to one page, whatever the turns; a sequence grows by a page without a copy; and
sequences that begin alike share pages.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxcp.attention.eight_bits import EightBits
from jaxcp.attention.over_cache import NewTokens, OverKept, check_tokens
from jaxcp.attention.places import PagedSlots
from jaxcp.attention.slots import (
    AXIS,
    ROWS,
    TOKENS,
    block_slots,
    on_mesh,
    positions_in_pages,
    shards_in_scope,
)
from jaxcp.context_parallel.halo import full_reach
from jaxcp.context_parallel.shards import on_shards
from jaxcp.context_parallel.strategy import Strategy
from jaxcp.layout import Layout
from pallas_kernels.number_formats import LARGEST


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
        return self.bytes_of(1, 1)

    def bytes_of(self, pages: float, states: float) -> int:
        """Bytes of so many times the pages, and the states, of one device."""
        return sum(
            round((pages if in_pages else states) * _bytes_on_device(x))
            for x, in_pages in zip(jax.tree.leaves(self.layers), self.paged, strict=True)
        )

    @property
    def paged(self) -> list[bool]:
        """Tell for each array whether it lies in pages, `[L, P, ...]`; the others are states, `[L,
        states, ...]`."""
        return jax.tree.leaves(_in_pages(self.layers))

    @property
    def specs(self) -> list[P]:
        """Mesh axes of each array."""
        return [jax.typeof(x).sharding.spec for x in jax.tree.leaves(self.layers)]

    @property
    def keeps_state(self) -> bool:
        """Tell whether a layer keeps something in a state of constant size a sequence."""
        return not all(self.paged)

    @property
    def rolls_back(self) -> bool:
        """Tell whether a few tokens may be written that turn out to be none of the sequence."""
        return all(kind.rolls_back for kind in self.layers.values())


def _bytes_on_device(x):
    """Bytes of one device, of an array or of its shape alone."""
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolRoom:
    """Sizes that every kind needs to be made, empty, in a pool; see `cache.Room`."""

    pages: int
    """Pages of a device."""
    page: int
    states: int
    """States of a device."""
    dtype: Any
    rolled_back: int = 0
    """Latest tokens of a sequence that may turn out to be none."""
    heads_dtype: str | None = None
    """int8 or float8_e4m3fn: of keys and values of heads in pages; None: `dtype`."""

    def for_slots(self, layers: int, *shape: int, spec: tuple) -> jax.Array:
        """Zeros for each slot, `[layers, P, page, *shape]`; `spec` says how `shape` is sharded.

        Raises:
          NotImplementedError: the pool is one of 8 bits.
        """
        self._refuse_eight_bits("latents")
        return self._in_pages(layers, self.page, *shape, spec=(None, *spec))

    def for_heads(self, layers: int, num_kv_heads: int, head_dim: int) -> jax.Array | EightBits:
        """Zeros for the keys, or values, of each slot, in 8 bits where the pool has them so."""
        shape, spec = (layers, self.page, num_kv_heads, head_dim), (None, "model", None)
        if self.heads_dtype is None:
            return self._in_pages(*shape, spec=spec)
        scales, scales_spec = (layers, num_kv_heads, self.page), ("model", None)
        return EightBits(
            self._in_pages(*shape, spec=spec, dtype=self.heads_dtype),
            self._in_pages(*scales, spec=scales_spec, dtype=jnp.float32),
        )

    def for_blocks(self, layers: int, *shape: int, ratio: int) -> jax.Array:
        """Zeros for each block of `ratio` tokens, `[layers, P, blocks of a page, *shape]`.

        Raises:
          NotImplementedError: the pool is one of 8 bits.
        """
        self._refuse_eight_bits("compressed blocks")
        shape = block_slots(self.page, ratio), *shape
        return self._in_pages(layers, *shape, spec=(None,) * len(shape))

    def _in_pages(self, layers, *shape, spec, dtype=None):
        axes = jax.sharding.get_abstract_mesh().shape
        pages = self.pages * axes.get("data", 1) * axes.get(AXIS, 1)
        dtype = self.dtype if dtype is None else dtype
        return on_mesh(jnp.zeros((layers, pages, *shape), dtype), P(*PagedSlots.stack[:2], *spec))

    def _refuse_eight_bits(self, what):
        if self.heads_dtype is not None:
            raise NotImplementedError(
                f"{what} have no form in 8 bits; leave cache_dtype={self.heads_dtype!r} out"
            )

    def for_state(
        self, layers: int, *shape: int, spec: tuple, dtype: DTypeLike | None = None
    ) -> jax.Array:
        """Zeros for each state, `[layers, states, *shape]`, the same on every shard of `seq`."""
        states = self.states * jax.sharding.get_abstract_mesh().shape.get("data", 1)
        array = jnp.zeros((layers, states, *shape), self.dtype if dtype is None else dtype)
        return on_mesh(array, P(None, "data", *spec))


def empty_pool(
    makers: Mapping[str, Callable[[PoolRoom], Any]],
    *,
    pages: int,
    page: int,
    states: int,
    dtype: Any,
    cache_dtype: str | None = None,
    rolled_back: int = 0,
) -> Pool:
    """A pool on the mesh in scope.

    Args:
      makers: by the name of a stack of layers, what makes its kind, empty.
      pages, states: so many a device, of `page` tokens each.
      rolled_back: latest tokens of a sequence that may turn out to be none.
      cache_dtype: "int8" or "float8_e4m3fn" for keys and values of heads in pages, with a float32
        scale for each token's head; None: `dtype`. States are of `dtype`, whatever this is.
    Raises:
      ValueError: another `cache_dtype`, or no layer that keeps keys and values in pages.
      NotImplementedError: layers keep in pages what has no form in 8 bits.
    """
    if cache_dtype is not None and cache_dtype not in tuple(LARGEST):
        raise ValueError(
            f"cache_dtype must be one of {tuple(LARGEST)} or None; got {cache_dtype!r}"
        )
    room = PoolRoom(
        pages=pages, page=page, states=states, dtype=dtype, heads_dtype=cache_dtype,
        rolled_back=rolled_back,
    )  # fmt: skip
    shards = shards_in_scope()

    @jax.jit
    def make():
        layers = {name: maker(room) for name, maker in makers.items()}
        if cache_dtype is not None and not any(jax.tree.leaves(_in_pages(layers))):
            raise ValueError(
                f"no layer of this model keeps pages, which cache_dtype={cache_dtype!r} is for: "
                "leave it out"
            )
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
      sharded: the tokens lie over `seq`, in any order; else every device has them all.
      strategy: for layers that see everything, see `OverCache`.
      layout: (static) the layout in whose places tokens that are sharded lie, the last ones pads:
        shards then send each other the windows, as `Halo` does. None: all of the new tokens.
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
        layout: Layout | None = None,
        used: int | None = None,
    ):
        check_tokens(positions, sharded, strategy)
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
            layout=layout,
            halos=_Halos(layout, pool.shards, positions.shape[1] // pool.shards),
            place=PagedSlots(positions, pages, states, page=pool.page, sharded=sharded),
            slots=on_shards(local, (ROWS,), TOKENS)(before + added),
        )
        super().__init__(pool.layers, tokens)

    @property
    def pool_after(self) -> Pool:
        """The pool after all layers."""
        return dataclasses.replace(self.pool, layers=self.layers)


class _Halos(dict):
    """By window, what shards send each other of new tokens: made when a layer asks."""

    def __init__(self, layout, shards, tokens):
        super().__init__()
        self._reach = layout, shards, tokens

    def __missing__(self, window):
        layout, shards, tokens = self._reach
        if shards == 1:
            return {}
        return None if layout is None else full_reach(layout, shards, tokens, window)


def copied(pool: Pool, pages: Any, states: Any) -> Pool:
    """The pool after copies from page to page and from state to state, one after the other.

    Args:
      pages, states: int32 `[data, 2, n]`, sources and targets of each group of devices along
        `data`; targets of -1 end the list. Page i of shard r is `r * pages of a shard + i`; source
        and target are on one shard.
    """
    with_mesh = not jax.sharding.get_abstract_mesh().empty
    flat, tree = jax.tree.flatten(pool.layers)
    paged, specs = pool.paged, pool.specs

    def local(arrays, pages, states):
        rank = jax.lax.axis_index(AXIS) if with_mesh else 0
        return [
            _copied(x, (pages if in_pages else states)[0], rank if in_pages else 0)
            for x, in_pages in zip(arrays, paged, strict=True)
        ]

    run = on_shards(local, (specs, P("data"), P("data")), specs)
    layers = jax.tree.unflatten(tree, run(flat, pages, states))
    return dataclasses.replace(pool, layers=layers)


def _in_pages(layers):
    """Tell for each array of the kinds `layers` (a tree) whether it lies in pages."""
    return {
        name: jax.tree.map_with_path(lambda path, _, kind=kind: path[0].name in kind.in_pages, kind)
        for name, kind in layers.items()
    }


def _copied(stack, pairs, rank):
    """`stack [L, n, ...]` of the shard `rank` with rows copied."""
    count, (sources, targets) = stack.shape[1], pairs

    def one(i, stack):
        source, target = sources[i] - rank * count, targets[i] - rank * count
        own = (target >= 0) & (target < count)
        row = jax.lax.dynamic_index_in_dim(stack, jnp.clip(source, 0, count - 1), 1)
        return stack.at[:, jnp.where(own, target, count)].set(row[:, 0], mode="drop")

    return jax.lax.fori_loop(0, (targets >= 0).sum(), one, stack)
