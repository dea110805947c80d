# SPDX-License-Identifier: Apache-2.0
"""Places of the slots of a sequence: rows of its own, or pages of a pool.

A kind writes and reads through a place, which is passed into the function of a shard beside the
arrays: so what a kind does is the same in a cache and in a pool.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from jaxcp.attention.slots import (
    AXIS,
    ROWS,
    deal_rows,
    layer_of,
    with_layer,
    write_first,
    write_pages,
    write_rows,
)


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


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions", "pages", "states"],
    meta_fields=["sharded"],
)
@dataclasses.dataclass(frozen=True)
class PagedSlots:
    """Slots `[L, P, page, ...]`: page j of a sequence is on shard `j % shards`.

    States, which are what is not kept in slots, are `[L, states, ...]`.
    """

    positions: Any
    """int32 `[B, T]` of the new tokens."""
    pages: Any
    """int32 `[B, M]`, a shard's: its pages of each sequence, in order."""
    states: Any
    """int32 `[B]`: the state of each sequence. A row without one has a number past the last, where
    nothing is written."""
    sharded: bool

    stack = (None, ("data", AXIS), None)

    @property
    def specs(self) -> "PagedSlots":
        tokens = P("data", AXIS) if self.sharded else ROWS
        return dataclasses.replace(self, positions=tokens, pages=P("data", AXIS), states=ROWS)

    def write(self, stack, layer, new):
        """The layer's pages of this shard with those of the rows `new [B, T, ...]` that lie there.

        Tokens that are sharded must be where their pages are.
        """
        return write_pages(stack, layer, new, self.positions, self.pages)

    def read(self, stack, layer, used=None):
        """Rows `[B, used, ...]`, a copy of one layer's pages of these sequences."""
        page = stack.shape[2]
        pages = self.pages if used is None else self.pages[:, : -(-used // page)]
        rows = stack[layer, pages]
        return rows.reshape(len(pages), -1, *rows.shape[3:])[:, :used]

    def state(self, stacks, layer):
        """The layer's arrays `[B, ...]` of what is not kept in slots (a tree)."""
        return jax.tree.map(lambda x: x.at[layer, self.states].get(mode="clip"), stacks)

    def with_state(self, stacks, layer, new):
        """`stacks` with `new [B, ...]` in the layer (trees)."""
        return jax.tree.map(
            lambda x, y: x.at[layer, self.states].set(y.astype(x.dtype), mode="drop"), stacks, new
        )
