# SPDX-License-Identifier: Apache-2.0
"""One tile of attention on a TPU: its masks, and the code of its scores, forward and backward.

`flash_attention` and `ring_attention` share it. Everything inside a kernel is transposed,
keys x queries: a query is a lane, so its maximum, sum, lse and delta are rows of one sublane and
reductions run down the sublanes. Heads lie side by side in the minor axis, `[B, T, N * H]` with H
padded to whole lanes.

The compiler overlaps matrix and vector work only where it finds both side by side with nothing
between them. A block is therefore cut into pieces, and the code of one piece's softmax stands
between the first product of the piece after it and the last product of the piece before it.

The forward kernel looks for no maximum where none is needed. By Cauchy and Schwarz no score of a
head exceeds its longest query times its longest key, so where that is at most SAFE, `exp2(score)`
can neither overflow nor vanish, and the softmax is the same without a shift. Other heads take the
online softmax.

float16 is computed in float32, which holds it exactly: the matrix units have no float16.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import online_softmax
from pallas_kernels.flash_attention import blocks as tiles
from pallas_kernels.flash_attention import tuning
from pallas_kernels.online_softmax import dot

LANES = 128
SUBLANES = 16  # rows of a tile of bfloat16
SAFE = 80.0  # log2 units: 2^80 times a million keys and values of 2^20 is below float32's 2^128
EDGE = 256  # queries of a block on the diagonal that share their keys


def longest(x, hidden):
    """The greatest squared length of `[B, T, heads, H]` over tokens not `hidden`: `[B, heads]`."""
    flat = x.reshape(*x.shape[:2], -1)  # the kernel's layout: a second one would be a copy
    heads = jnp.split(flat, x.shape[2], axis=2)
    square = [jnp.sum(jnp.square(head.astype(jnp.float32)), axis=-1) for head in heads]
    return jnp.where(hidden[..., None], 0, jnp.stack(square, axis=-1)).max(1)


def safe(queries, keys, lse, soft_cap, scale):
    """Mark the heads, int32 `[B, N]`, none of whose scores can exceed SAFE in log2 units.

    `queries [B, N]` and `keys [B, K]` are squared lengths; `lse [B, T, N]` is that of the carry.
    """
    keys = jnp.repeat(keys, queries.shape[1] // keys.shape[1], axis=1)
    most = jnp.sqrt(queries) * jnp.sqrt(keys) * abs(scale)
    if soft_cap is not None:
        most = jnp.minimum(most, soft_cap)
    if lse is not None:
        most = jnp.maximum(most, jnp.where(jnp.isneginf(lse), 0, jnp.abs(lse)).max(1))
    return (most * online_softmax.LOG2E <= SAFE).astype(jnp.int32)  # not for NaN


class Tile:
    """Sizes of a block of queries and a block of keys, and which pairs of it are visible."""

    def __init__(self, op, q, k, v, mask, *, segmented, queries_inner, interpret):
        widest = max(q.shape[3], v.shape[3])
        tuned = tuning.blocks(op, widest, q.dtype, interpret=interpret)
        self.batch, t, self.heads, h = q.shape
        s, self.kv_heads = k.shape[1:3]
        self.group = self.heads // self.kv_heads
        self.q, self.kv = min(tuned.q, lanes(t)), min(tuned.kv, lanes(s))
        self.sub = min(tuned.sub, self.kv)
        self.edge = min(EDGE, self.q)
        self.strip = self.q if queries_inner else min(tuned.strip, self.q)
        self.h, self.hv = lanes(h), lanes(v.shape[3])
        # transposed, a head is rows: no more of them than it has
        self.rows_h, self.rows_v = (pl.cdiv(x, SUBLANES) * SUBLANES for x in (h, v.shape[3]))
        self.mask, self.segmented, self.queries_inner = mask, segmented, queries_inner

    def visibility(self, q, kv):
        """Tell whether a block has any visible pair, all pairs, or exactly its lower triangle.

        `q` and `kv` are rows of `block_scalars`, of a block each or of many that broadcast.
        """
        (*q, q_run), (*kv, kv_run) = q, kv
        q, kv = tiles.Bounds(*q), tiles.Bounds(*kv)
        some, every = tiles.visibility(self.mask, q, kv, self.segmented)
        if not self.mask.causal or self.q != self.kv:
            return some, every, None
        # with every query at the last one's position only the triangle is left of the mask
        _, lower = tiles.visibility(self.mask, q._replace(min=q.max), kv, self.segmented)
        return some, every, lower & (q.min == kv.min) & (q_run & kv_run == 1) & ~every

    def columns(self):
        """The shape of the scratch in which `work` keeps the ids of a block's keys."""
        return 1 + self.segmented, self.kv, LANES


class At(NamedTuple):
    """One grid step: batch, heads, blocks, and which pairs in it are visible.

    `some`: any pair is; `every`: all are; `diagonal`: the lower triangle is, because queries and
    keys have the same consecutive positions.
    """

    b: jax.Array
    head: jax.Array
    kv_head: jax.Array
    i: jax.Array
    j: jax.Array
    some: jax.Array
    every: jax.Array
    diagonal: jax.Array | None


class Piece(NamedTuple):
    """A part of a block that is worked on at a time, and `mask(scores, queries, keys)`, which hides
    the invisible pairs; scores are keys x queries."""

    queries: pl.Slice
    keys: pl.Slice
    mask: Callable


class Turn(NamedTuple):
    """The state of the accumulators: `first` and `last` step of a sum over the inner grid axes.

    In the backward kernel that sum belongs to a block of keys; `first_keys` and `last_keys` are the
    first and last step for a block of queries, the `queries`-th of its KV head.
    """

    first: jax.Array
    last: jax.Array
    first_keys: jax.Array
    last_keys: jax.Array
    queries: jax.Array


def lanes(size):
    return pl.cdiv(size, LANES) * LANES


def exactly(*arrays):
    """Cast arrays to a dtype that the chip's units take."""
    return [x.astype(jnp.float32) if x.dtype == jnp.float16 else x for x in arrays]


def side_by_side(x, tokens, h):
    x = tiles.pad_axis(tiles.pad_axis(x, tokens, 1), h, 3)
    return x.reshape(x.shape[0], tokens, -1)


def apart(x, heads, tokens, h):
    return x.reshape(*x.shape[:2], heads, -1)[:, :tokens, :, :h]


def block_scalars(ids, block, pad):
    """Compute rows of `[B, blocks]`: the bounds of blocks, and 1 for consecutive positions."""
    positions = ids[:, 0].reshape(ids.shape[0], -1, block)
    run = jnp.all(positions[..., 1:] - positions[..., :-1] == 1, axis=-1).astype(jnp.int32)
    return [*tiles.block_bounds(ids, block, pad), run]


def work(tile, at, parts, q_ids_ref, kv_ids_ref, columns_ref):
    """Run one grid step of a kernel's `parts`: start the accumulators, work on the block under its
    mask, write the results at the end."""

    def masked(s, queries, keys):
        lanes = min(LANES, queries.size)
        q = [q_ids_ref[row : row + 1, queries] for row in range(q_ids_ref.shape[0])]
        kv = [
            jnp.concatenate([columns_ref[row, keys, :lanes]] * (queries.size // lanes), axis=1)
            for row in range(q_ids_ref.shape[0])
        ]
        return jnp.where(tiles.visible(tile.mask, q, kv), s, -jnp.inf)

    def columns():  # a key's ids in every lane, once a block: turning them is slow
        for row in range(kv_ids_ref.shape[0]):
            ids = kv_ids_ref[row : row + 1, :].T
            columns_ref[row] = jnp.broadcast_to(ids, columns_ref.shape[1:])

    before, steps, after = parts
    partly = at.some & ~at.every
    for when, do in before:
        pl.when(when)(do)
    for when, step, triangle in steps:
        pl.when(when & at.every)(functools.partial(step, _pieces(tile, _unmasked)))
        general = partly
        if triangle and at.diagonal is not None:
            pl.when(when & at.diagonal)(functools.partial(step, _triangle(tile)))
            general = partly & ~at.diagonal

        @pl.when(when & general)
        def _(step=step):
            columns()
            step(_pieces(tile, masked))

    for when, do in after:
        pl.when(when)(do)


def _unmasked(s, queries, keys):
    return s


def _lower(s, queries, keys):
    key, query = (jax.lax.broadcasted_iota(jnp.int32, s.shape, axis) for axis in (0, 1))
    return jnp.where(key + keys.start <= query + queries.start, s, -jnp.inf)


def _pieces(tile, mask):
    return [
        Piece(queries, keys, mask)
        for queries in _cut(tile.q, tile.strip)
        for keys in _cut(tile.kv, tile.sub)
    ]


def _triangle(tile):
    """Cut the lower triangle: all keys before a strip of queries, then those beside it, masked."""
    pieces = []
    for queries in _cut(tile.q, tile.edge):
        pieces += [Piece(queries, keys, _unmasked) for keys in _cut(queries.start, tile.sub)]
        pieces.append(Piece(queries, queries, _lower))
    return pieces


def _cut(size, most):
    return [pl.ds(begin, min(most, size - begin)) for begin in range(0, size, most)]


def _columns(x, ref):
    """Transpose `x` for `ref`, which is whole lanes wide."""
    return tiles.pad_axis(x.T.astype(ref.dtype), ref.shape[1], 1)


# A kernel returns `before, steps, after`: pairs `(when, do)` before and after a block, and triples
# `(when, step, triangle)` over its pieces; `triangle` asks for code of its own on the diagonal.


def forward_kernel(turn, safe, q_ref, k_ref, v_ref, *refs, soft_cap, scale):
    """Build the forward kernel; `refs`: the carry `(out, lse)`, if any; results; accumulators."""
    *before, out_ref, lse_ref, acc_ref, m_ref, total_ref = refs

    def start():
        if before:
            out, lse = before[0][...].astype(jnp.float32).T[: acc_ref.shape[0]], before[1][...]
            acc, m, total = online_softmax.carried(out, lse)
            # relative to a maximum of 0 where there is to be none
            weight = jnp.where(safe, jnp.exp2(jnp.where(safe, m, 0.0)), 1.0)
            acc_ref[...], total_ref[...] = acc * weight, total * weight
            m_ref[...] = jnp.where(safe, 0.0, m)
            return
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)
        m_ref[...] = jnp.full(m_ref.shape, jnp.where(safe, 0.0, -jnp.inf), jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)

    def finish():
        inverse, lse_ref[...] = online_softmax.finish(m_ref[...], total_ref[...])
        out_ref[...] = _columns(acc_ref[...] * inverse, out_ref)

    accumulators = acc_ref, m_ref, total_ref
    steps = forward_steps(safe, q_ref, k_ref, v_ref, *accumulators, soft_cap=soft_cap, scale=scale)
    return [(turn.first, start)], steps, [(turn.last, finish)]


def forward_steps(safe, q_ref, k_ref, v_ref, acc_ref, m_ref, total_ref, *, soft_cap, scale):
    """Build the steps over a block, with and without a maximum: `acc` is `[V, queries]`."""

    def scores(piece):
        qk = dot(k_ref[piece.keys, :], q_ref[piece.queries, :], (1, 1))
        s, _ = online_softmax.scores(qk, scale, soft_cap)
        return piece.mask(s, piece.queries, piece.keys)

    def step(pieces, online):
        def values(piece, p, alpha):
            taken = dot(v_ref[piece.keys, : acc_ref.shape[0]], p, (0, 0))
            acc = acc_ref[:, piece.queries]
            acc_ref[:, piece.queries] = (acc * alpha if online else acc) + taken

        waiting: list[tuple] = []
        coming = scores(pieces[0])
        for piece, after in zip(pieces, [*pieces[1:], None], strict=True):
            s, coming = coming, None if after is None else scores(after)
            if waiting:
                values(*waiting.pop())
            m, total = m_ref[:, piece.queries], total_ref[:, piece.queries]
            if online:
                p, alpha, m_ref[:, piece.queries], total = online_softmax.update(s, m, total, 0)
            else:
                p, alpha = jnp.exp2(s), None
                total = total + jnp.sum(p, axis=0, keepdims=True)
            total_ref[:, piece.queries] = total
            waiting.append((piece, p.astype(v_ref.dtype), alpha))
        values(*waiting.pop())

    return [
        (safe, functools.partial(step, online=False), True),
        (~safe, functools.partial(step, online=True), False),
    ]


def _gradients(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, piece, soft_cap, scale):
    """Issue the products of some keys; return the function that finishes `(p, ds)`, keys x queries.

    `ds` still lacks the scale.
    """
    qk = dot(k_ref[piece.keys, :], q_ref[...], (1, 1))
    dp = dot(v_ref[piece.keys, :], dout_ref[...], (1, 1))

    def rest():
        s, slope = online_softmax.scores(qk, scale, soft_cap)
        p = jnp.exp2(piece.mask(s, piece.queries, piece.keys) - lse_ref[...])
        ds = p * (dp - delta_ref[...])
        if slope is not None:
            ds *= slope
        return p.astype(q_ref.dtype), ds.astype(q_ref.dtype)

    return rest


def backward_kernel(
    turn, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs, soft_cap, scale, fresh=None,
):  # fmt: skip
    """Build the backward kernel; `refs`: gradients so far, if `fresh`; gradients; accumulators.

    `fresh`: two flags, true while dq, and while dk and dv, hold nothing yet.
    """
    *before, dq_ref, dk_ref, dv_ref, dq_acc, dk_acc, dv_acc = refs

    def put(ref, gradient, which, new):
        gradient = _columns(gradient, ref)
        ref[...] = gradient + jnp.where(new, 0.0, before[which][...]) if before else gradient

    dq_new, dkv_new = (None, None) if fresh is None else fresh

    def start_queries():
        dq_acc[turn.queries] = jnp.zeros(dq_acc.shape[1:], jnp.float32)

    def start_keys():
        dk_acc[...] = jnp.zeros(dk_acc.shape, jnp.float32)
        dv_acc[...] = jnp.zeros(dv_acc.shape, jnp.float32)

    def step(pieces):
        queries = q_ref[...].T[: dk_acc.shape[0]]
        douts = dout_ref[...].T[: dv_acc.shape[0]]
        gradients = functools.partial(
            _gradients, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref,
            soft_cap=soft_cap, scale=scale,
        )  # fmt: skip

        def add(keys, p, ds):
            dv_acc[:, keys] += dot(douts, p, (1, 1))
            dk_acc[:, keys] += dot(queries, ds, (1, 1))
            dq_acc[turn.queries] += dot(k_ref[keys, : dk_acc.shape[0]], ds, (0, 0))

        waiting: list[tuple] = []
        coming = gradients(pieces[0])
        for piece, after in zip(pieces, [*pieces[1:], None], strict=True):
            here, coming = coming, None if after is None else gradients(after)
            if waiting:
                add(*waiting.pop())
            waiting.append((piece.keys, *here()))
        add(*waiting.pop())

    def finish_queries():
        put(dq_ref, dq_acc[turn.queries] * scale, 0, dq_new)

    def finish_keys():
        put(dk_ref, dk_acc[...] * scale, 1, dkv_new)
        put(dv_ref, dv_acc[...], 2, dkv_new)

    first = [(turn.first_keys, start_queries), (turn.first, start_keys)]
    last = [(turn.last_keys, finish_queries), (turn.last, finish_keys)]
    return first, [(True, step, False)], last
