# SPDX-License-Identifier: Apache-2.0
"""Orders of tokens over shards: a permutation at the edge, of which nothing inside knows.

`permute` takes NumPy trees of `[B, T, ...]` in natural order and returns them in the order in
which equal slices along axis 1 are what each shard holds. It pads any T; a pad masks itself by
its position. On every shard the real tokens come first, in natural order.

`Contiguous`, `Zigzag` and `Striped` know the length alone. `Balanced` looks at the documents of
each row, so nothing that is compiled knows its order.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np

from pallas_kernels import PAD_POSITION

PAD_VALUES = {"positions": PAD_POSITION, "segment_ids": -1, "targets": -1}
"""The value of pads, by the key of a leaf; every other leaf is padded with zeros."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """An order of tokens over shards. A subclass says which places a shard holds."""

    pieces: ClassVar[int] = 1
    """Pieces of equal length that a shard holds; the padded length is a multiple of them all."""
    by_segment: ClassVar[bool] = False
    """True where each row has an order of its own, which follows from its segment ids."""

    def places(self, padded: int, shards: int) -> np.ndarray:
        """The places that each shard holds, of `0..padded - 1`: `[shards, padded / shards]`."""
        raise NotImplementedError

    def padded_length(self, length: int, shards: int) -> int:
        """Number of tokens after padding: the next multiple of the number of pieces."""
        count = self.pieces * shards
        return -(-length // count) * count

    def order(self, length: int, shards: int, segment_ids: Any = None) -> np.ndarray:
        """Natural index of the token at each place `[padded_length]`; pads are `>= length`.

        Of a layout `by_segment` it takes `segment_ids [B, length]` and is `[B, padded_length]`.
        """
        padded = self._checked(length, shards)
        # Pads take the places before token 0, where causal balance feels them least; the modulus
        # numbers them from `length` on, and sorting puts a shard's real tokens first.
        natural = (self.places(padded, shards) - (padded - length)) % padded
        return np.sort(natural, axis=1).reshape(-1)

    def permute(self, tree: Any, shards: int, fill: dict[str, Any] | None = None) -> Any:
        """Tree of `[B, T, ...]` -> `[B, padded T, ...]`, in shard order, on the host.

        Any positions are taken: what they let tokens see is the caller's to know, see
        `context_parallel_attention`.

        Args:
          fill: values for the pads by leaf key, over `PAD_VALUES` (positions, segment ids, targets
            mask themselves) and 0.
        Raises:
          ValueError: leaves that disagree on T; a layout `by_segment` and no leaf "segment_ids"; a
            dtype that cannot hold the leaf's pads.
        """
        values = PAD_VALUES | (fill or {})
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        lengths = {np.shape(x)[1] for _, x in leaves}
        if len(lengths) != 1:
            raise ValueError(
                f"all leaves must be [B, T, ...] with one T; got T in {sorted(lengths)}"
            )
        length = lengths.pop()
        segments = next((x for path, x in leaves if _key(path) == "segment_ids"), None)
        order = self.order(length, shards, segments)

        def one(path, x):
            x = np.asarray(x)
            shape = x.shape[0], order.shape[-1] - length, *x.shape[2:]
            pads = _pads(_key(path), values.get(_key(path), 0), shape, x.dtype)
            return _taken(np.concatenate([x, pads], axis=1), order)

        return jax.tree_util.tree_map_with_path(one, tree)

    def inverse(self, tree: Any, shards: int, length: int, segment_ids: Any = None) -> Any:
        """Undo `permute`: `[B, padded T, ...]` -> `[B, length, ...]` in natural order, exactly.

        A layout `by_segment` needs the `segment_ids [B, length]` that `permute` was given.
        """
        order = self.order(length, shards, segment_ids)
        back = np.argsort(order, axis=-1)[..., :length]

        def one(x):
            x = np.asarray(x)
            if x.shape[1] != order.shape[-1]:
                raise ValueError(
                    f"length {length} over {shards} shards is {order.shape[-1]} places; "
                    f"got {x.shape[1]}"
                )
            return _taken(x, back)

        return jax.tree.map(one, tree)

    def _checked(self, length: int, shards: int) -> int:
        """The padded length."""
        if shards < 1 or length < 1:
            raise ValueError(
                f"a layout needs shards >= 1 and length >= 1; got shards={shards}, length={length}"
            )
        return self.padded_length(length, shards)


def _key(path) -> str:
    last = path[-1] if path else None
    return str(getattr(last, "key", getattr(last, "name", "")))


def _pads(key: str, value: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        pad = np.asarray(value).astype(dtype)
    if pad != value and value == value and 0 not in shape:
        raise ValueError(
            f"pads of {key!r} are {value}, which {dtype} cannot hold; give it as int32"
        )
    return np.full(shape, pad)


def _taken(x: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Take `x [B, T, ...]` along axis 1 in one order for all rows, or in each row's own."""
    if order.ndim == 1:
        return x[:, order]
    if order.shape[0] != x.shape[0]:
        raise ValueError(f"segment_ids have {order.shape[0]} rows, but a leaf has {x.shape[0]}")
    return x[np.arange(x.shape[0])[:, None], order]


@dataclasses.dataclass(frozen=True)
class Contiguous(Layout):
    """Shard r holds the r-th of n equal pieces, in natural order.

    Causal work is uneven: of n shards the last does `2 - 1/n` times the mean. For windows, scoring
    without causality, and where somebody else's code expects the natural order.
    """

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
    """Shard r holds tokens r, r+n, r+2n, ...: every shard has equal causal work to a token.

    Source: Striped Attention (arXiv 2311.09431). Windows reach over all shards, where `Zigzag`
    keeps most of a window on one.
    """

    def places(self, padded, shards):
        return np.arange(padded).reshape(-1, shards).T


@dataclasses.dataclass(frozen=True)
class Balanced(Layout):
    """Layout for packed documents: shards visit equally many tiles, whatever the lengths.

    Causal work is per document, so a zigzag over the row is not fair to packed rows: with one
    document of half of the row the busiest of eight shards has 1.5 to 3 times the mean. Here each
    row is cut into blocks, which are dealt out, equally many to each shard: those with most work
    first, to the shard that has least. Then blocks are swapped with the busiest shard while that
    helps. Work is counted in tiles as kernels visit them, of several shapes at once, and in pairs.

    `block`: tokens of a block; best the longest tile of the kernels that run: 1024 on TPU, 128 on
    NVIDIA, 512 on CPU. A smaller block puts two places of the row into one tile: balance stays,
    work grows (to twice as much with half a tile, where documents are short). A greater one leaves
    fewer blocks to deal out.

    From 16 blocks a shard on the busiest has at most 1.02 of the mean (1.022 was the worst of 150
    packed rows on 8 shards) or, as a tile cannot be shared, the next whole tile: documents shorter
    than a tile are 1 or 2 tiles a block, 32 of the mean 31.75. With few blocks no way of dealing
    them out is fair: 8 blocks a shard end at 1.05 (64 shards: 1.13), 4 at 1.27 (64 shards: 1.9).
    That is for positions which go on through the row, as training makes them: with ones that start
    anew, kernels visit tiles in vain (1.5 times as many, of short documents), unevenly (to 1.11).
    Balanced are the queries of full attention, so `Ring`, `AllGather` and `USP` across groups; not
    the keys of `RingPassQ`, nor each single step of a ring.

    Every row has its own order, which no program knows. So window layers send whole K/V, not the
    window alone; recurrent layers, `Halo`, `FixedOrder`, `attention_fn` and inference refuse.

    Source: the dispatch solver of MagiAttention (SandAI-org/MagiAttention); Graham (1969), largest
    processing time first.
    """

    block: int = 1024
    by_segment = True

    def __post_init__(self):
        if self.block < 1:
            raise ValueError(f"block must be at least 1; got block={self.block}")

    def places(self, padded, shards):
        raise ValueError(
            f"the order of {self} follows the documents of each row, and there are no "
            "segment_ids: give them, [B, T] in natural order. What must know the order "
            "beforehand (Halo, recurrent layers, FixedOrder, attention_fn, inference), and "
            "rows of one document, take Zigzag() or Contiguous()"
        )

    def order(self, length, shards, segment_ids=None):
        padded = self._checked(length, shards)
        if segment_ids is None:
            return self.places(padded, shards)
        segments = np.asarray(segment_ids)
        if segments.ndim != 2 or segments.shape[1] != length:
            raise ValueError(f"segment_ids must be [B, {length}]; got {segments.shape}")
        tokens = padded // shards
        block = min(self.block, max(1, tokens // 2))
        each, rest = divmod(tokens, block)
        starts = block * np.arange(shards * each)
        if rest:  # one shorter block for every shard, at the end of the row
            starts = np.append(starts, shards * each * block + rest * np.arange(shards))
        lengths = np.diff(starts, append=padded)

        def row(segments):
            segments = np.pad(segments, (0, padded - length), mode="edge")
            owner = _dealt(_work(segments, starts, block), shards, each)
            return np.argsort(np.repeat(owner, lengths), kind="stable")

        return np.stack([row(x) for x in segments])


_TILES = ((1, 1), (2, 1), (1, 2), (2, 4), (4, 1))
"""Tiles (queries, keys) as parts of a block: forward and backward on TPU; on NVIDIA forward, dQ
and dK/dV."""


def _work(segments: np.ndarray, starts: np.ndarray, block: int) -> np.ndarray:
    """Count pairs that a block's queries see, and its tiles of each shape: `[blocks, measures]`."""
    index = np.arange(segments.size)
    new = np.append(True, segments[1:] != segments[:-1])
    first = np.maximum.accumulate(
        np.where(new, index, 0)
    )  # the first token of each token's document
    measures = [np.add.reduceat(index - first + 1.0, starts)]
    ends = np.append(starts[1:], segments.size)
    for rows, columns in _TILES:
        height, width = max(1, block // rows), max(1, block // columns)
        # tiles of queries start anew in every block; those of keys lie in natural order
        tops = np.concatenate([np.arange(*ab, height) for ab in zip(starts, ends, strict=True)])
        last = np.minimum(tops + height, np.repeat(ends, -(-(ends - starts) // height))) - 1
        counts = last // width - first[tops] // width + 1
        measures.append(np.add.reduceat(counts * 1.0, np.searchsorted(tops, starts)))
    return np.stack(measures, axis=1)


NEAR = 1.01
"""A shard whose work is below this multiple of the mean is left alone."""


def _dealt(work: np.ndarray, shards: int, each: int) -> np.ndarray:
    """Deal blocks to shards: `each` of the whole blocks (they come first), one of the rest."""
    work = work / work.sum(0) * shards
    best = np.zeros(len(work), int), np.inf
    for size in (work.max(1), *work.T):  # orders of blocks, largest first: one order may get stuck
        owner, load = _greedy(work, size, shards, each)
        most = _swapped(work, owner, load, shards * each)
        if most < best[1]:
            best = owner, most
        if most <= NEAR:
            break
    return best[0]


def _greedy(work, size, shards, each):
    """Deal large blocks first, to the least loaded: `(owner [blocks], load [shards, measures])`."""
    whole = shards * each
    load, owner = np.zeros((shards, work.shape[1])), np.empty(len(work), int)
    for blocks, most in ((np.arange(whole), each), (np.arange(whole, len(work)), 1)):
        room = np.full(shards, most)
        for block in blocks[np.argsort(-size[blocks], kind="stable")]:
            after = np.where(room > 0, (load + work[block]).max(1), np.inf)
            owner[block] = after.argmin()
            load[owner[block]] += work[block]
            room[owner[block]] -= 1
    return owner, load


def _swapped(work, owner, load, whole) -> float:
    """Swap whole blocks with the busiest shard while that helps; return the greatest load.

    Changes `owner` and `load` in place.
    """
    for _ in range(64 + 4 * len(load)):
        busiest = load.max(1).argmax()
        own = np.flatnonzero(owner[:whole] == busiest)
        others = np.flatnonzero(owner[:whole] != busiest)
        if load[busiest].max() <= NEAR or not others.size:
            break
        gain = work[own][:, None] - work[others]
        after = np.maximum((load[busiest] - gain).max(-1), (load[owner[others]] + gain).max(-1))
        pair = np.unravel_index(after.argmin(), after.shape)
        if after[pair] >= load[busiest].max() - 1e-9:
            break
        a, b = own[pair[0]], others[pair[1]]
        load[busiest] -= work[a] - work[b]
        load[owner[b]] += work[a] - work[b]
        owner[a], owner[b] = owner[b], owner[a]
    return load.max()
