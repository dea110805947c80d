# SPDX-License-Identifier: Apache-2.0
"""Places of the slots of a sequence: rows of its own, or pages of a pool.

A kind writes and reads through a place, which is passed into the function of a shard beside the
arrays: so what a kind does is the same in a cache and in a pool. Besides slots there are states,
of constant size a sequence, and entries of blocks of tokens.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxcp.attention.blocks import in_order
from jaxcp.attention.slots import (
    AXIS,
    ROWS,
    axis_in_scope,
    blocks_in_pages,
    deal_rows,
    layer_of,
    shards_in_scope,
    with_layer,
    write_blocks,
    write_first,
    write_pages,
    write_rows,
    write_scales,
)
from jaxcp.context_parallel.exchange import gathered
from pallas_kernels import PAD_POSITION


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["lengths"],
    meta_fields=["sharded", "first"],
)
@dataclasses.dataclass(frozen=True)
class OwnSlots:
    """Slots `[L, B, S, ...]`: each sequence is a row, and new tokens come behind those it has."""

    lengths: Any
    """int32 `[B]`: tokens before the new ones."""
    sharded: bool
    first: bool

    stack = (None, "data", AXIS)
    """Mesh axes of layers, sequences and slots."""
    block_stack = (None, "data", None)
    """Mesh axes of layers, sequences and entries: every shard has all of them."""
    divides_blocks = False
    pages = None

    @property
    def specs(self) -> "OwnSlots":
        return dataclasses.replace(self, lengths=ROWS)

    def write(self, stack, layer, new, **options):
        """The layer's slots of this shard with the rows `new [B, T, ...]`."""
        if not self.sharded:
            return deal_rows(stack, layer, new, self.lengths, **options)
        return (write_first if self.first else write_rows)(stack, layer, new, self.lengths)

    def read(self, stack, layer, used=None):
        """Rows `[B, used, ...]` of this shard."""
        return layer_of(stack, layer)[:, :used]

    def state(self, stacks, layer):
        """The layer's arrays `[B, ...]` of what is not kept in slots (a tree)."""
        return layer_of(stacks, layer)

    def with_state(self, stacks, layer, new):
        """`stacks` with `new [B, ...]` in the layer (trees)."""
        return with_layer(stacks, layer, new)

    def write_blocks(self, stacks, layer, new, blocks, ratio):
        """The layer's entries with `new [B, E, D]` of `blocks [B, E]`, this shard's (trees)."""
        if self.sharded:
            new, blocks = _on_every_shard((new, blocks))
        line = jnp.arange(len(blocks))[:, None]
        return jax.tree.map(
            lambda x, y: x.at[layer, line, blocks].set(y.astype(x.dtype), mode="drop"), stacks, new
        )

    def read_blocks(self, stacks, layer, after, ratio):
        """Entries `[B, E, D]` (a tree), ascending, and which block each is, `[B, E]`.

        `after [B]`: tokens with the new ones. `PAD_POSITION` marks what is no complete block.
        """
        entries = layer_of(stacks, layer)
        number = jnp.arange(jax.tree.leaves(entries)[0].shape[1], dtype=jnp.int32)
        return entries, jnp.where(number < (after // ratio)[:, None], number, PAD_POSITION)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions", "pages", "states"],
    meta_fields=["page", "sharded"],
)
@dataclasses.dataclass(frozen=True)
class PagedSlots:
    """Slots `[L, P, page, ...]`: page j of a sequence is on shard `j % shards`.

    States, which are what is not kept in slots, are `[L, states, ...]`. The entry of a block lies
    in the page of the block's last token: `[L, P, block_slots(page, ratio), D]`.
    """

    positions: Any
    """int32 `[B, T]` of the new tokens."""
    pages: Any
    """int32 `[B, M]`, a shard's: its pages of each sequence, in order."""
    states: Any
    """int32 `[B]`: the state of each sequence. A row without one has a number past the last, where
    nothing is written."""
    page: int
    """Tokens of a page."""
    sharded: bool

    stack = block_stack = (None, ("data", AXIS), None)

    @property
    def divides_blocks(self) -> bool:
        """Tell whether `read_blocks` gives a shard its own entries alone."""
        return not self.sharded

    @property
    def specs(self) -> "PagedSlots":
        tokens = P("data", AXIS) if self.sharded else ROWS
        return dataclasses.replace(self, positions=tokens, pages=P("data", AXIS), states=ROWS)

    def write(self, stack, layer, new, *, slots_last=False):
        """The layer's pages of this shard with the rows `new [B, T, ...]` that belong there.

        Tokens that are sharded lie in any order: one all-gather brings them to all shards. With
        `slots_last` the stack is `[L, P, K, page]`.
        """
        positions = self.positions
        if self.sharded:
            new, positions = _on_every_shard((new, positions))
        put = write_scales if slots_last else write_pages
        return put(stack, layer, new, positions, self.pages)

    def read(self, stack, layer, used=None, *, slots_last=False):
        """Rows `[B, used, ...]`, a copy of one layer's pages of these sequences."""
        pages = self.pages if used is None else self.pages[:, : -(-used // self.page)]
        rows = stack[layer, pages]
        if slots_last:
            rows = jnp.moveaxis(rows, -1, 2)
        return rows.reshape(len(pages), -1, *rows.shape[3:])[:, :used]

    def state(self, stacks, layer):
        """The layer's arrays `[B, ...]` of what is not kept in slots (a tree)."""
        return jax.tree.map(lambda x: x.at[layer, self.states].get(mode="clip"), stacks)

    def with_state(self, stacks, layer, new):
        """`stacks` with `new [B, ...]` in the layer (trees)."""
        return jax.tree.map(
            lambda x, y: x.at[layer, self.states].set(y.astype(x.dtype), mode="drop"), stacks, new
        )

    def write_blocks(self, stacks, layer, new, blocks, ratio):
        """The layer's entries with those of `new [B, E, D]` that belong on this shard (trees)."""
        if self.sharded:
            new, blocks = _on_every_shard((new, blocks))
        return jax.tree.map(
            lambda x, y: write_blocks(x, layer, y, blocks, self.pages, self.page, ratio),
            stacks,
            new,
        )

    def read_blocks(self, stacks, layer, after, ratio):
        """Give what `OwnSlots.read_blocks` does; of this shard alone where it `divides_blocks`."""
        entries = jax.tree.map(lambda x: self.read(x, layer), stacks)
        count = self.pages.shape[1]
        blocks = blocks_in_pages(after, count, self.page, ratio)
        if self.divides_blocks:
            return entries, blocks
        most = max(1, shards_in_scope() * count * self.page // ratio)
        return in_order(entries, blocks, most, axis_in_scope())

    def entries_at(self, stack, layer, indices):
        """Give those of a shard's entries of one kind that are at `indices [B, T, k]` of what
        `read_blocks` gives where it `divides_blocks`."""
        slots = stack.shape[2]
        row = jnp.arange(len(self.pages))[:, None, None]
        return stack[layer, self.pages[row, indices // slots], indices % slots]


def _on_every_shard(rows):
    """Rows `[B, T, ...]` (a tree) of all shards, by one all-gather; as they are without a mesh."""
    axis_name = axis_in_scope()
    return rows if axis_name is None else jax.tree.map(lambda x: gathered(x, axis_name), rows)
