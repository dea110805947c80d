# SPDX-License-Identifier: Apache-2.0
"""Attention where a model sees a whole sequence at once: no cache, all tokens sharded."""

import dataclasses
from typing import Any

from jaxcp.attention.attend import Attend
from jaxcp.attention.blocks import block_ends, compress
from jaxcp.attention.selected import shared_head, sparse_attention
from jaxcp.context_parallel.api import context_parallel_attention, latent_attention
from jaxcp.context_parallel.gated_delta import (
    context_parallel_convolution,
    context_parallel_gated_delta,
)
from jaxcp.context_parallel.strategy import Strategy
from jaxcp.layout import Zigzag


@dataclasses.dataclass(frozen=True, eq=False)  # one is like no other: arrays do not compare
class WholeSequence(Attend):
    """Attention of every kind among the tokens at `positions [B, T]`; nothing is kept."""

    positions: Any
    segment_ids: Any = None
    strategy: Strategy | None = None
    consecutive: bool = False
    length: int | None = None
    """Tokens of a row before a layout filled it up: recurrent layers on several shards ask."""

    def __call__(self, q, k, v, *, window, sinks=None, scale=None, soft_cap=None):
        """Heads that have keys and values of their own: `[B, T, heads, H]`."""
        return context_parallel_attention(
            q, k, v, self.positions, window=window, sinks=sinks, scale=scale, soft_cap=soft_cap,
            **self._options,
        )  # fmt: skip

    def latent(self, q, latent, weights, *, expand, scale, window=None, sinks=None):
        """Keys and values made of a latent where they are used: see `latent_attention`."""
        return latent_attention(
            q, latent, weights, self.positions, expand=expand, scale=scale, window=window,
            sinks=sinks, **self._options,
        )  # fmt: skip

    def selected(self, q, keys, selection, *, value_dim, scale):
        """One head of `keys [B, T, H]`, of which a query sees what `selection` chooses."""
        self._check("a selection of tokens", "it scores all keys before a query")
        return sparse_attention(
            q, keys, self.positions, self.positions, scale=scale, value_dim=value_dim,
            selection=selection, strategy=self.strategy,
        )  # fmt: skip

    def compress(self, values, gates, *, ratio, overlap, name):
        """Entries of complete blocks, and which block each is: see `compressed.compress`.

        `name`: what the entries are, where a layer compresses more than one thing.
        """
        self._check("compression", "blocks are numbered by position, which begins again in each")
        layout = None if self.strategy is None else self.strategy.layout
        return compress(values, gates, self.positions, ratio=ratio, overlap=overlap, layout=layout)

    def compressed(self, q, kv, entries, blocks, *, ratio, window, scale, sinks,
                   selection=None):  # fmt: skip
        """A window of `kv [B, T, H]`, and the entries of blocks that end before the query."""
        ends = block_ends(blocks, ratio)
        return sparse_attention(
            q, entries, self.positions, ends, scale=scale, selection=selection,
            limit=self.positions.shape[1] // ratio, window_keys=kv, window=window, sinks=sinks,
            strategy=self.strategy, consecutive=self.consecutive,
        )  # fmt: skip

    def shared(self, q, kv, *, window, scale, sinks):
        """One head that is key and value, `kv [B, T, H]`."""
        return self.latent(q, kv, (), expand=shared_head, scale=scale, window=window, sinks=sinks)

    def convolved(self, inputs, taps):
        """Short causal convolutions of `inputs`, several `[B, T, N, H]`, by `taps [W, N, H]`."""
        return context_parallel_convolution(inputs, taps, self.positions, **self._order)

    def delta(self, q, k, v, log_decay, beta):
        """The gated delta rule over the row: see `pallas_kernels.gated_delta`."""
        arrays = q, k, v, log_decay, beta
        return context_parallel_gated_delta(*arrays, self.positions, **self._order)

    @property
    def _order(self):
        """The value that says in which order tokens lie."""
        self._check_bits("a recurrence")
        layout = Zigzag() if self.strategy is None else self.strategy.layout
        return {"layout": layout, "length": self.length, "segment_ids": self.segment_ids}

    def _check_bits(self, what):
        if self.strategy is not None and self.strategy.same_bits:
            raise NotImplementedError(f"{what} has no reproducible form; use Ring()")

    def _check(self, what, why):
        self._check_bits(what)
        if self.segment_ids is not None:
            raise NotImplementedError(
                f"{what} does not keep packed documents apart ({why}), and got segment_ids: "
                "give each document a row of its own, without them"
            )

    @property
    def _options(self):
        return {
            "strategy": self.strategy,
            "segment_ids": self.segment_ids,
            "consecutive": self.consecutive,
        }
