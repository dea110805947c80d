# SPDX-License-Identifier: Apache-2.0
"""Flash attention for TPUs, through Pallas and Mosaic.

Everything inside a kernel is transposed, keys x queries: a query is a lane, so its maximum, sum,
lse and delta are rows of one sublane and reductions run down the sublanes. Heads lie side by side
in the minor axis, `[B, T, N * H]` with H padded to whole lanes; nothing is transposed outside.
The innermost grid axis walks the other side's blocks and accumulates in VMEM; a block with nothing
to see is neither fetched nor multiplied. The backward pass is one kernel: keys outside, queries
inside, with the gradient of all queries in VMEM. Interpreted on CPU; inside `shard_map` the
interpreter needs the caller's `check_vma=False`.

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
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import online_softmax
from pallas_kernels.dispatch import target_platform
from pallas_kernels.flash_attention import blocks as tiles
from pallas_kernels.flash_attention import tuning
from pallas_kernels.flash_attention.mask import NO_POSITION, PAD_POSITION
from pallas_kernels.online_softmax import dot

LANES = 128
SUBLANES = 16  # rows of a tile of bfloat16
SAFE = 80.0  # log2 units: 2^80 times a million keys and values of 2^20 is below float32's 2^128
EDGE = 256  # queries of a block on the diagonal that share their keys
DQ_BYTES = 24 << 20  # of VMEM for the queries' gradient; the smallest chip has 64 MiB


def forward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, *, mask, soft_cap, scale, carry, out_dtype):
    _check(q, v)
    q, k, v = _exactly(q, k, v)
    b, t, n, _ = q.shape
    call = _Call("mosaic_forward", q, k, v, mask, q_pos, kv_pos, q_seg, kv_seg, queries_inner=False)
    lse = None if carry is None else carry[1]
    call.scalars.append(_safe(q, k, q_pos, kv_pos, lse, soft_cap, scale).reshape(-1))
    before = [] if carry is None else [call.outs(*_exactly(carry[0])), call.rows(carry[1])]
    kernel_dtype = jnp.float32 if jnp.dtype(out_dtype) == jnp.float16 else out_dtype
    out, lse = call(
        functools.partial(_forward_kernel, soft_cap=soft_cap, scale=scale),
        [call.queries(q), call.keys(k), call.values(v), *before],
        [
            ((b, call.t, n * call.hv), kernel_dtype, call.out_spec),
            ((b, n, 1, call.t), None, call.row_spec),
        ],
        [(call.rows_v, call.q), (1, call.q), (1, call.q)],
    )
    return _apart(out, n, t, v.shape[3]).astype(out_dtype), lse[:, :, 0, :t].swapaxes(1, 2)


def _check(q, v):
    tiles.unsupported("mosaic_tpu", q, v, dtypes=("float32", "bfloat16", "float16"), head_dim=512)


def _exactly(*arrays):
    """The arrays in a type that the chip's units take."""
    return [x.astype(jnp.float32) if x.dtype == jnp.float16 else x for x in arrays]


def _safe(q, k, q_pos, kv_pos, lse, soft_cap, scale):
    """int32 `[B, N]`: 1 for a head none of whose scores, in log2 units, can exceed SAFE."""

    def longest(x, hidden):
        square = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1)
        return jnp.where(hidden[..., None], 0, square).max(1)

    keys = jnp.repeat(longest(k, kv_pos == PAD_POSITION), q.shape[2] // k.shape[2], axis=1)
    most = jnp.sqrt(longest(q, q_pos == NO_POSITION)) * jnp.sqrt(keys) * abs(scale)
    if soft_cap is not None:
        most = jnp.minimum(most, soft_cap)
    if lse is not None:
        most = jnp.maximum(most, jnp.where(jnp.isneginf(lse), 0, jnp.abs(lse)).max(1))
    return (most * online_softmax.LOG2E <= SAFE).astype(jnp.int32)  # not for NaN


def backward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, lse, dout, delta, *, mask, soft_cap, scale):
    _check(q, v)
    q, k, v = _exactly(q, k, v)
    (_, t, n, h), kv_heads = q.shape, k.shape[2]
    lse, delta = online_softmax.backward_rows(lse, delta)
    options = dict(mask=mask, soft_cap=soft_cap, scale=scale)
    most = max(DQ_BYTES // (n // kv_heads * _lanes(h) * 4) // LANES, 1) * LANES
    arrays = {"q": q, "dout": dout.astype(q.dtype), "lse": lse, "delta": delta, "q_pos": q_pos}
    if q_seg is not None:
        arrays["q_seg"] = q_seg
    if t <= most:
        return _backward(k, v, kv_pos, kv_seg, **arrays, **options)
    # The gradient of more queries than VMEM holds: some at a time, each time over all keys.
    chunks = pl.cdiv(t, most)

    def cut(x, pad=0):
        x = tiles.pad_axis(x, chunks * most, 1, pad)
        return x.reshape(x.shape[0], chunks, most, *x.shape[2:]).swapaxes(0, 1)

    pads = {"q_pos": NO_POSITION, "q_seg": "edge"}
    cuts = {name: cut(x, pads.get(name, 0)) for name, x in arrays.items()}

    def add(sums, part):
        dq, dk, dv = _backward(k, v, kv_pos, kv_seg, **part, **options)
        return (sums[0] + dk, sums[1] + dv), dq

    head = {name: x[0] for name, x in cuts.items()}
    first = _backward(k, v, kv_pos, kv_seg, **head, **options)
    rest, dq = jax.lax.scan(add, first[1:], {name: x[1:] for name, x in cuts.items()})
    dq = jnp.concatenate([first[0][None], dq]).swapaxes(0, 1)
    return (dq.reshape(q.shape[0], chunks * most, n, h)[:, :t], *rest)


def _backward(k, v, kv_pos, kv_seg, *, q, dout, lse, delta, q_pos, q_seg=None, mask, **options):
    (b, t, n, h), (_, s, kv_heads, _) = q.shape, k.shape
    call = _Call("mosaic_backward", q, k, v, mask, q_pos, kv_pos, q_seg, kv_seg, queries_inner=True)
    inputs = [call.queries(q), call.keys(k), call.values(v), call.outs(dout)]
    dq, dk, dv = call(
        functools.partial(_backward_kernel, **options),
        [*inputs, call.rows(lse), call.rows(delta)],
        [
            ((b, call.t, n * call.h), None, call.dq_spec),
            ((b, call.s, kv_heads * call.h), None, call.kv_spec),
            ((b, call.s, kv_heads * call.hv), None, call.v_spec),
        ],
        [
            (call.group * call.nq, call.rows_h, call.q),
            (call.rows_h, call.kv),
            (call.rows_v, call.kv),
        ],
    )
    return _apart(dq, n, t, h), _apart(dk, kv_heads, s, h), _apart(dv, kv_heads, s, v.shape[3])


class _Call:
    """One kernel on one set of shapes: block sizes, padding, index maps, and which blocks to skip.

    The grid is `(batch, head, query block, key block)`, or with `queries_inner`
    `(batch, kv head, key block, query head of the group, query block)`.
    """

    def __init__(self, op, q, k, v, mask, q_pos, kv_pos, q_seg, kv_seg, *, queries_inner):
        self.interpret = target_platform() == "cpu"
        widest = max(q.shape[3], v.shape[3])
        tuned = tuning.blocks(op, widest, q.dtype, interpret=self.interpret)
        self.batch, t, heads, h = q.shape
        s, kv_heads = k.shape[1:3]
        self.group = heads // kv_heads
        self.q, self.kv = min(tuned.q, _lanes(t)), min(tuned.kv, _lanes(s))
        self.sub = min(tuned.sub, self.kv)
        self.edge = min(EDGE, self.q)
        self.strip = self.q if queries_inner else min(tuned.strip, self.q)
        self.nq, self.nk = pl.cdiv(t, self.q), pl.cdiv(s, self.kv)
        self.h, self.hv = _lanes(h), _lanes(v.shape[3])
        # transposed, a head is rows: no more of them than it has
        self.rows_h, self.rows_v = (pl.cdiv(x, SUBLANES) * SUBLANES for x in (h, v.shape[3]))
        self.t, self.s = self.nq * self.q, self.nk * self.kv
        self.mask, self.segmented, self.queries_inner = mask, q_seg is not None, queries_inner
        self.q_ids = tiles.token_ids(q_pos, q_seg, self.t, NO_POSITION)
        self.kv_ids = tiles.token_ids(kv_pos, kv_seg, self.s, PAD_POSITION)
        self.scalars = [
            _block_scalars(ids, block, pad)
            for ids, block, pad in (
                (self.q_ids, self.q, NO_POSITION),
                (self.kv_ids, self.kv, PAD_POSITION),
            )
        ]
        # inside shard_map an output varies over the axes that the inputs vary over
        self.varies = jax.typeof(q).manual_axis_type
        if queries_inner:
            self.grid: tuple[int, ...] = (self.batch, kv_heads, self.nk, self.group, self.nq)
        else:
            self.grid = (self.batch, heads, self.nq, self.nk)
        self.q_spec, self.out_spec = (
            self._spec((None, self.q, width), lambda at: (at.b, at.i, at.head))
            for width in (self.h, self.hv)
        )
        self.kv_spec, self.v_spec = (
            self._spec((None, self.kv, width), lambda at: (at.b, at.j, at.kv_head))
            for width in (self.h, self.hv)
        )
        self.dq_spec = pl.BlockSpec((None, self.q, self.h), self._last_turn)
        self.row_spec = self._spec((None, None, 1, self.q), lambda at: (at.b, at.head, 0, at.i))

    def queries(self, x):
        return _side_by_side(x, self.t, self.h), self.q_spec

    def keys(self, x):
        return _side_by_side(x, self.s, self.h), self.kv_spec

    def values(self, x):
        return _side_by_side(x, self.s, self.hv), self.v_spec

    def outs(self, x):
        return _side_by_side(x, self.t, self.hv), self.out_spec

    def rows(self, x):
        return tiles.pad_axis(x.swapaxes(1, 2), self.t, 2)[:, :, None], self.row_spec

    def _spec(self, shape, where):
        return pl.BlockSpec(
            shape,
            lambda *index: where(
                self.at(index[: len(self.grid)], index[len(self.grid) :], fetch=True)
            ),
        )

    def _last_turn(self, b, kv_head, j, g, i, *_):
        """The queries' block, standing still until the last keys: nothing is written before."""
        last = j == self.nk - 1
        return b, jnp.where(last, i, 0), kv_head * self.group + jnp.where(last, g, 0)

    def at(self, index, scalars, *, fetch=False):
        """Where a grid step works.

        With `fetch`, a step to be skipped asks for a block that is there or soon needed instead.
        """
        if self.queries_inner:
            b, kv_head, j, g, i = index
            head = kv_head * self.group + g
        else:
            b, head, i, j = index
            kv_head = head // self.group
        some, every, diagonal = self.visibility(scalars, b, i, j)
        if fetch and self.queries_inner:
            i = jnp.where(some, i, self.nq - 1)  # causal: the last query block sees the most keys
        elif fetch:
            j = jnp.where(some, j, 0)
        return _At(b, head, kv_head, i, j, some, every, diagonal)

    def visibility(self, scalars, b, i, j):
        """Whether any pair of a block is visible, every pair, exactly its lower triangle."""
        rows = range(len(tiles.Bounds._fields) + 1)

        def block_of(ref, blocks, block):
            *found, run = (ref[(b * len(rows) + row) * blocks + block] for row in rows)
            return tiles.Bounds(*found), run

        q, q_run = block_of(scalars[0], self.nq, i)
        kv, kv_run = block_of(scalars[1], self.nk, j)
        some, every = tiles.visibility(self.mask, q, kv, self.segmented)
        if not self.mask.causal or self.q != self.kv:
            return some, every, None
        # as if every query stood where the last does: what is left of the mask is the triangle
        _, lower = tiles.visibility(self.mask, q._replace(min=q.max), kv, self.segmented)
        return some, every, lower & (q.min == kv.min) & (q_run & kv_run == 1) & ~every

    def __call__(self, kernel, inputs, outs, scratch):
        """`outs`: shape, dtype (None is float32) and block of each; `scratch`: float32 shapes."""
        c = self.q_ids.shape[1]
        ids = [
            (self.q_ids, self._spec((None, c, self.q), lambda at: (at.b, 0, at.i))),
            (self.kv_ids, self._spec((None, c, self.kv), lambda at: (at.b, 0, at.j))),
        ]
        arrays, in_specs = zip(*ids, *inputs, strict=True)
        return pl.pallas_call(
            functools.partial(_entry, call=self, kernel=kernel),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(self.scalars),
                grid=self.grid,
                in_specs=in_specs,
                out_specs=[spec for _, _, spec in outs],
                scratch_shapes=[
                    *(pltpu.VMEM(shape, jnp.float32) for shape in scratch),
                    pltpu.VMEM((c, self.kv, LANES), jnp.int32),
                ],
            ),
            out_shape=[
                jax.ShapeDtypeStruct(shape, dtype or jnp.float32, manual_axis_type=self.varies)
                for shape, dtype, _ in outs
            ],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=(pltpu.PARALLEL,) * (2 if self.queries_inner else 3)
                + (pltpu.ARBITRARY,) * (3 if self.queries_inner else 1),
                vmem_limit_bytes=DQ_BYTES + (32 << 20) if self.queries_inner else None,
            ),
            interpret=self.interpret,
            name=f"flash_attention{kernel.func.__name__.removesuffix('_kernel')}",
        )(*self.scalars, *arrays)


class _At(NamedTuple):
    """One grid step: batch, heads, blocks, and which pairs in it are visible.

    Any pair, every pair, the lower triangle (queries and keys at the same consecutive positions).
    """

    b: jax.Array
    head: jax.Array
    kv_head: jax.Array
    i: jax.Array
    j: jax.Array
    some: jax.Array
    every: jax.Array
    diagonal: jax.Array | None


class _Piece(NamedTuple):
    """Queries and keys of a block that are worked on at a time, and `mask(scores, queries, keys)`
    that hides what is not to be seen; scores are keys x queries."""

    queries: pl.Slice
    keys: pl.Slice
    mask: Callable


class _Turn(NamedTuple):
    """Where the accumulators stand: `first` and `last` step of what the inner grid axes sum up.

    In the backward kernel that is a block of keys, and `first_keys`, `last_keys` are the turns of
    a block of queries, the `queries`-th of its KV head.
    """

    first: jax.Array
    last: jax.Array
    first_keys: jax.Array
    last_keys: jax.Array
    queries: jax.Array


def _lanes(size):
    return pl.cdiv(size, LANES) * LANES


def _side_by_side(x, tokens, h):
    x = tiles.pad_axis(tiles.pad_axis(x, tokens, 1), h, 3)
    return x.reshape(x.shape[0], tokens, -1)


def _apart(x, heads, tokens, h):
    return x.reshape(*x.shape[:2], heads, -1)[:, :tokens, :, :h]


def _block_scalars(ids, block, pad):
    """`[B, rows, blocks]` flat (SMEM pads a minor axis): the bounds, and 1 for consecutive."""
    positions = ids[:, 0].reshape(ids.shape[0], -1, block)
    run = jnp.all(positions[..., 1:] - positions[..., :-1] == 1, axis=-1).astype(jnp.int32)
    return jnp.stack([*tiles.block_bounds(ids, block, pad), run], axis=1).reshape(-1)


def _entry(*refs, call, kernel):
    """Start the accumulators, work on the block as its mask asks, write them at the end."""
    scalars = refs[: len(call.scalars)]
    q_ids_ref, kv_ids_ref, *blocks, columns_ref = refs[len(call.scalars) :]
    index = [pl.program_id(axis) for axis in range(len(call.grid))]
    at = call.at(index, scalars)
    ends = list(zip(index, call.grid, strict=True))
    turn = _Turn(
        first=functools.reduce(jnp.logical_and, [i == 0 for i, _ in ends[3:]]),
        last=functools.reduce(jnp.logical_and, [i == size - 1 for i, size in ends[3:]]),
        first_keys=index[2] == 0,
        last_keys=index[2] == call.grid[2] - 1,
        queries=index[3] * call.grid[-1] + index[-1],
    )

    def masked(s, queries, keys):
        lanes = min(LANES, queries.size)
        q = [q_ids_ref[row : row + 1, queries] for row in range(q_ids_ref.shape[0])]
        kv = [
            jnp.concatenate([columns_ref[row, keys, :lanes]] * (queries.size // lanes), axis=1)
            for row in range(q_ids_ref.shape[0])
        ]
        return jnp.where(tiles.visible(call.mask, q, kv), s, -jnp.inf)

    def columns():  # a key's ids in every lane, once a block: turning them is slow
        for row in range(kv_ids_ref.shape[0]):
            ids = kv_ids_ref[row : row + 1, :].T
            columns_ref[row] = jnp.broadcast_to(ids, columns_ref.shape[1:])

    partly = at.some & ~at.every
    if call.queries_inner:
        before, steps, after = kernel(turn, *blocks)
    else:
        safe = scalars[2][at.b * call.grid[1] + at.head] == 1
        before, steps, after = kernel(turn, safe, *blocks)

    for when, do in before:
        pl.when(when)(do)
    for when, step, triangle in steps:
        pl.when(when & at.every)(functools.partial(step, _pieces(call, _unmasked)))
        general = partly
        if triangle and at.diagonal is not None:
            pl.when(when & at.diagonal)(functools.partial(step, _triangle(call)))
            general = partly & ~at.diagonal

        @pl.when(when & general)
        def _(step=step):
            columns()
            step(_pieces(call, masked))

    for when, do in after:
        pl.when(when)(do)


def _unmasked(s, queries, keys):
    return s


def _lower(s, queries, keys):
    key, query = (jax.lax.broadcasted_iota(jnp.int32, s.shape, axis) for axis in (0, 1))
    return jnp.where(key + keys.start <= query + queries.start, s, -jnp.inf)


def _pieces(call, mask):
    return [
        _Piece(queries, keys, mask)
        for queries in _cut(call.q, call.strip)
        for keys in _cut(call.kv, call.sub)
    ]


def _triangle(call):
    """Keys up to each strip of queries, and under the mask only those beside it."""
    pieces = []
    for queries in _cut(call.q, call.edge):
        pieces += [_Piece(queries, keys, _unmasked) for keys in _cut(queries.start, call.sub)]
        pieces.append(_Piece(queries, queries, _lower))
    return pieces


def _cut(size, most):
    return [pl.ds(begin, min(most, size - begin)) for begin in range(0, size, most)]


def _columns(x, ref):
    """`x` transposed for `ref`, which is whole lanes wide."""
    return tiles.pad_axis(x.T.astype(ref.dtype), ref.shape[1], 1)


# A kernel gives what to do before and when, what to do with the pieces of a block (and when, and
# whether a block on the diagonal gets code of its own), and what to do after it and when.


def _forward_kernel(turn, safe, q_ref, k_ref, v_ref, *refs, soft_cap, scale):
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

    def finish():
        inverse, lse_ref[...] = online_softmax.finish(m_ref[...], total_ref[...])
        out_ref[...] = _columns(acc_ref[...] * inverse, out_ref)

    steps = [
        (safe, functools.partial(step, online=False), True),
        (~safe, functools.partial(step, online=True), False),
    ]
    return [(turn.first, start)], steps, [(turn.last, finish)]


def _gradients(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, piece, soft_cap, scale):
    """Issue the products of some keys; what comes back finishes `(p, ds)`, keys x queries.

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


def _backward_kernel(
    turn, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dq_ref, dk_ref, dv_ref,
    dq_acc, dk_acc, dv_acc, *, soft_cap, scale,
):  # fmt: skip
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
        dq_ref[...] = _columns(dq_acc[turn.queries] * scale, dq_ref)

    def finish_keys():
        dk_ref[...] = _columns(dk_acc[...] * scale, dk_ref)
        dv_ref[...] = _columns(dv_acc[...], dv_ref)

    before = [(turn.first_keys, start_queries), (turn.first, start_keys)]
    after = [(turn.last_keys, finish_queries), (turn.last, finish_keys)]
    return before, [(True, step, False)], after
