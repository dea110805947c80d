# SPDX-License-Identifier: Apache-2.0
"""Which token lies on which shard: a permutation at the edge, which nothing inside knows of.

`permute` takes NumPy trees of `[B, T, ...]` in natural order and returns them in the order in
which equal slices along axis 1 are what each shard holds. It pads any T; a pad masks itself by
its position. On every shard the real tokens come first, in natural order.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np

from pallas_kernels import PAD_POSITION

PAD_VALUES = {"positions": PAD_POSITION, "segment_ids": -1, "targets": -1}
"""What pads hold, by the key of a leaf; every other leaf is padded with zeros."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Order of tokens over shards. A subclass says which places a shard holds."""

    pieces: ClassVar[int] = 1
    """Pieces of equal length that a shard holds; the padded length is a multiple of them all."""

    def places(self, padded: int, shards: int) -> np.ndarray:
        """`[shards, padded / shards]`: what each shard holds of `0..padded - 1`."""
        raise NotImplementedError

    def padded_length(self, length: int, shards: int) -> int:
        """Tokens after padding: the next multiple of the number of pieces."""
        count = self.pieces * shards
        return -(-length // count) * count

    def order(self, length: int, shards: int) -> np.ndarray:
        """Natural index of the token at each place `[padded_length]`; pads are `>= length`."""
        if shards < 1 or length < 1:
            raise ValueError(
                f"a layout needs shards >= 1 and length >= 1; got shards={shards}, length={length}"
            )
        padded = self.padded_length(length, shards)
        # Pads take the places before token 0, where causal balance feels them least; the modulus
        # numbers them from `length` on, and sorting puts a shard's real tokens first.
        natural = (self.places(padded, shards) - (padded - length)) % padded
        return np.sort(natural, axis=1).reshape(-1)

    def permute(self, tree: Any, shards: int, fill: dict[str, Any] | None = None) -> Any:
        """Tree of `[B, T, ...]` -> `[B, padded T, ...]`, in shard order, on the host.

        Args:
          fill: values for the pads by leaf key, over `PAD_VALUES` (positions, segment ids, targets
            mask themselves) and 0.
        Raises:
          ValueError: leaves that disagree on T.
        """
        values = PAD_VALUES | (fill or {})
        leaves = jax.tree_util.tree_leaves(tree)
        lengths = {np.shape(x)[1] for x in leaves}
        if len(lengths) != 1:
            raise ValueError(
                f"all leaves must be [B, T, ...] with one T; got T in {sorted(lengths)}"
            )
        length = lengths.pop()
        order = self.order(length, shards)

        def one(path, x):
            x = np.asarray(x)
            value = values.get(_key(path), 0)
            pads = np.full((x.shape[0], order.size - length, *x.shape[2:]), value, x.dtype)
            return np.concatenate([x, pads], axis=1)[:, order]

        return jax.tree_util.tree_map_with_path(one, tree)

    def inverse(self, tree: Any, shards: int, length: int) -> Any:
        """Undo `permute`: `[B, padded T, ...]` -> `[B, length, ...]` in natural order, exactly."""
        order = self.order(length, shards)
        back = np.argsort(order)[:length]

        def one(x):
            x = np.asarray(x)
            if x.shape[1] != order.size:
                raise ValueError(
                    f"length {length} over {shards} shards is {order.size} places; got {x.shape[1]}"
                )
            return x[:, back]

        return jax.tree.map(one, tree)


def _key(path) -> str:
    last = path[-1] if path else None
    return str(getattr(last, "key", getattr(last, "name", "")))


@dataclasses.dataclass(frozen=True)
class Contiguous(Layout):
    """Shard r holds the r-th of n equal pieces. Causal work is uneven: the last shard does most."""

    def places(self, padded, shards):
        return np.arange(padded).reshape(shards, -1)


@dataclasses.dataclass(frozen=True)
class Zigzag(Layout):
    """Shard r holds pieces r and 2n-1-r of 2n: every shard has equal causal work.

    Exactly equal where 2n divides the length. With p pads (less than 2n), and pieces no shorter
    than p, the busiest shard has `1 + (n - 1) * p * (p - 1) / (T * (T + 1))` times the mean.

    Source: zhuzilin/ring-flash-attention; Llama 3 (arXiv 2407.21783) head/tail sharding.
    """

    pieces = 2

    def places(self, padded, shards):
        pieces = np.arange(padded).reshape(2 * shards, -1)
        return np.concatenate([pieces[:shards], pieces[::-1][:shards]], axis=1)


@dataclasses.dataclass(frozen=True)
class Striped(Layout):
    """Shard r holds tokens r, r+n, r+2n, ... Source: Striped Attention (arXiv 2311.09431)."""

    def places(self, padded, shards):
        return np.arange(padded).reshape(-1, shards).T
