# SPDX-License-Identifier: Apache-2.0
"""Flash attention for TPUs, through Pallas and Mosaic.

Everything inside a kernel is transposed, keys x queries: a query is a lane, so its maximum, sum,
lse and delta are rows of one sublane and reductions run down the sublanes. Heads lie side by side
in the minor axis, `[B, T, N * H]` with H padded to whole lanes; nothing is transposed outside.
The innermost grid axis walks the other side's blocks and accumulates in VMEM; a block with nothing
to see is neither fetched nor multiplied. Interpreted on CPU; inside `shard_map` the interpreter
needs the caller's `check_vma=False`.

The compiler overlaps matrix and vector work only where it finds both side by side with nothing
between them. A block is therefore cut into pieces, and the code of one piece's softmax stands
between the first product of the piece after it and the last product of the piece before it.
"""

import functools
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


def forward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, *, mask, soft_cap, scale, carry, out_dtype):
    tiles.unsupported("mosaic_tpu", q, v)
    b, t, n, _ = q.shape
    call = _Call("mosaic_forward", q, k, v, mask, q_pos, kv_pos, q_seg, kv_seg, queries_inner=False)
    before = [] if carry is None else [call.outs(carry[0]), call.rows(carry[1])]
    out, lse = call(
        functools.partial(_forward_kernel, soft_cap=soft_cap, scale=scale),
        [call.queries(q), call.keys(k), call.values(v), *before],
        [
            ((b, call.t, n * call.hv), out_dtype, call.out_spec),
            ((b, n, 1, call.t), None, call.row_spec),
        ],
        [(call.hv, call.q), (1, call.q), (1, call.q)],
    )
    return _apart(out, n, t, v.shape[3]), lse[:, :, 0, :t].swapaxes(1, 2)


def backward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, lse, dout, delta, *, mask, soft_cap, scale):
    tiles.unsupported("mosaic_tpu", q, v)
    (b, t, n, h), (_, s, kv_heads, _) = q.shape, k.shape
    lse, delta = online_softmax.backward_rows(lse, delta)
    dout = dout.astype(q.dtype)

    def run(op, kernel, queries_inner, outs, scratch):
        call = _Call(op, q, k, v, mask, q_pos, kv_pos, q_seg, kv_seg, queries_inner=queries_inner)
        kernel = functools.partial(kernel, soft_cap=soft_cap, scale=scale)
        inputs = [call.queries(q), call.keys(k), call.values(v), call.outs(dout)]
        return call(kernel, [*inputs, call.rows(lse), call.rows(delta)], outs(call), scratch(call))

    (dq,) = run(
        "mosaic_dq",
        _dq_kernel,
        False,
        lambda call: [((b, call.t, n * call.h), None, call.q_spec)],
        lambda call: [(call.h, call.q)],
    )
    dk, dv = run(
        "mosaic_dkv",
        _dkv_kernel,
        True,
        lambda call: [
            ((b, call.s, kv_heads * call.h), None, call.kv_spec),
            ((b, call.s, kv_heads * call.hv), None, call.v_spec),
        ],
        lambda call: [(call.kv, call.h), (call.kv, call.hv)],
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
        self.sub, self.strip = min(tuned.sub, self.kv), min(tuned.strip, self.q)
        self.nq, self.nk = pl.cdiv(t, self.q), pl.cdiv(s, self.kv)
        self.h, self.hv = _lanes(h), _lanes(v.shape[3])
        self.t, self.s = self.nq * self.q, self.nk * self.kv
        self.mask, self.segmented, self.queries_inner = mask, q_seg is not None, queries_inner
        self.q_ids = tiles.token_ids(q_pos, q_seg, self.t, NO_POSITION)
        self.kv_ids = tiles.token_ids(kv_pos, kv_seg, self.s, PAD_POSITION)
        self.scalars = [  # flat: an SMEM array's minor axis would be padded
            jnp.stack(tiles.block_bounds(ids, block, pad), axis=1).reshape(-1)
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
            shape, lambda *index: where(self.at(index[:-2], index[-2:], fetch=True))
        )

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
        some, every = self.visibility(scalars, b, i, j)
        if fetch and self.queries_inner:
            i = jnp.where(some, i, self.nq - 1)  # causal: the last query block sees the most keys
        elif fetch:
            j = jnp.where(some, j, 0)
        return _At(b, head, kv_head, i, j, some, every)

    def visibility(self, scalars, b, i, j):
        rows = range(len(tiles.Bounds._fields))

        def block_of(ref, blocks, block):
            return tiles.Bounds(*(ref[(b * len(rows) + row) * blocks + block] for row in rows))

        q, kv = block_of(scalars[0], self.nq, i), block_of(scalars[1], self.nk, j)
        return tiles.visibility(self.mask, q, kv, self.segmented)

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
                num_scalar_prefetch=2,
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
                dimension_semantics=(pltpu.PARALLEL,) * 3
                + (pltpu.ARBITRARY,) * (len(self.grid) - 3)
            ),
            interpret=self.interpret,
            name=f"flash_attention{kernel.func.__name__.removesuffix('_kernel')}",
        )(*self.scalars, *arrays)


class _At(NamedTuple):
    """One grid step: batch, heads, blocks, and whether any or every pair in it is visible."""

    b: jax.Array
    head: jax.Array
    kv_head: jax.Array
    i: jax.Array
    j: jax.Array
    some: jax.Array
    every: jax.Array


def _lanes(size):
    return pl.cdiv(size, LANES) * LANES


def _side_by_side(x, tokens, h):
    x = tiles.pad_axis(tiles.pad_axis(x, tokens, 1), h, 3)
    return x.reshape(x.shape[0], tokens, -1)


def _apart(x, heads, tokens, h):
    return x.reshape(*x.shape[:2], heads, -1)[:, :tokens, :, :h]


def _entry(q_scalars, kv_scalars, q_ids_ref, kv_ids_ref, *refs, call, kernel):
    """Start the accumulators, work on the block with or without its mask, write them at the end."""
    index = [pl.program_id(axis) for axis in range(len(call.grid))]
    at = call.at(index, (q_scalars, kv_scalars))
    inner = list(zip(index[3:], call.grid[3:], strict=True))
    *refs, columns_ref = refs
    start, step, finish = kernel(*refs)

    def unmasked(s, queries, keys):
        return s

    def masked(s, queries, keys):
        lanes = min(LANES, queries.size)
        q = [q_ids_ref[row : row + 1, queries] for row in range(q_ids_ref.shape[0])]
        kv = [
            jnp.concatenate([columns_ref[row, keys, :lanes]] * (queries.size // lanes), axis=1)
            for row in range(q_ids_ref.shape[0])
        ]
        return jnp.where(tiles.visible(call.mask, q, kv), s, -jnp.inf)

    def work(mask):
        if mask is masked:  # a key's ids in every lane, once a block: turning them is slow
            for row in range(kv_ids_ref.shape[0]):
                ids = kv_ids_ref[row : row + 1, :].T
                columns_ref[row] = jnp.broadcast_to(ids, columns_ref.shape[1:])
        step(_cut(call.q, call.strip), _cut(call.kv, call.sub), mask)

    pl.when(functools.reduce(jnp.logical_and, [i == 0 for i, _ in inner]))(start)
    pl.when(at.every)(lambda: work(unmasked))
    pl.when(at.some & ~at.every)(lambda: work(masked))
    pl.when(functools.reduce(jnp.logical_and, [i == size - 1 for i, size in inner]))(finish)


def _cut(size, most):
    return [pl.ds(begin, min(most, size - begin)) for begin in range(0, size, most)]


# A kernel gives what to do first, with a block cut into strips of queries and keys (`mask(scores,
# queries, keys)` hides what is not to be seen; scores are keys x queries), and last.


def _forward_kernel(q_ref, k_ref, v_ref, *refs, soft_cap, scale):
    *before, out_ref, lse_ref, acc_ref, m_ref, total_ref = refs

    def start():
        if before:
            out, lse = before[0][...].astype(jnp.float32).T, before[1][...]
            acc_ref[...], m_ref[...], total_ref[...] = online_softmax.carried(out, lse)
            return
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)
        m_ref[...] = jnp.full(m_ref.shape, -jnp.inf, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)

    def scores(queries, keys, mask):
        qk = dot(k_ref[keys, :], q_ref[queries, :], (1, 1))
        return mask(online_softmax.scores(qk, scale, soft_cap)[0], queries, keys)

    def values(queries, keys, p, alpha):
        taken = dot(v_ref[keys, :], p, (0, 0))
        acc_ref[:, queries] = acc_ref[:, queries] * alpha + taken

    def step(strips, subs, mask):
        pieces = [(queries, keys) for queries in strips for keys in subs]
        coming, done = scores(*pieces[0], mask), None
        for piece, after in zip(pieces, [*pieces[1:], None], strict=True):
            queries, keys = piece
            s, coming = coming, None if after is None else scores(*after, mask)
            if done is not None:
                values(*done)
            if keys is subs[0]:
                m, total = m_ref[:, queries], total_ref[:, queries]
            p, alpha, m, total = online_softmax.update(s, m, total, axis=0)
            if keys is subs[-1]:
                m_ref[:, queries], total_ref[:, queries] = m, total
            done = queries, keys, p.astype(v_ref.dtype), alpha
        values(*done)

    def finish():
        inverse, lse_ref[...] = online_softmax.finish(m_ref[...], total_ref[...])
        out_ref[...] = (acc_ref[...] * inverse).T.astype(out_ref.dtype)

    return start, step, finish


def _gradients(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, keys, mask, soft_cap, scale):
    """Issue the products of some keys; what comes back finishes `(p, ds)`, keys x queries.

    `ds` still lacks the scale.
    """
    qk = dot(k_ref[keys, :], q_ref[...], (1, 1))
    dp = dot(v_ref[keys, :], dout_ref[...], (1, 1))

    def rest():
        s, slope = online_softmax.scores(qk, scale, soft_cap)
        p = jnp.exp2(mask(s, pl.ds(0, q_ref.shape[0]), keys) - lse_ref[...])
        ds = p * (dp - delta_ref[...])
        if slope is not None:
            ds *= slope
        return p.astype(q_ref.dtype), ds.astype(q_ref.dtype)

    return rest


def _in_turn(subs, gradients, add):
    """`add(keys, p, ds)` for all keys, behind the products of the keys that come next."""
    coming, done = gradients(subs[0]), None
    for keys, after in zip(subs, [*subs[1:], None], strict=True):
        here, coming = coming, None if after is None else gradients(after)
        if done is not None:
            add(*done)
        done = keys, *here()
    add(*done)


def _dq_kernel(
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dq_ref, acc_ref, *, soft_cap, scale
):
    def start():
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    def add(keys, _, ds):
        acc_ref[...] += dot(k_ref[keys, :], ds, (0, 0))

    def step(_, subs, mask):
        arrays = q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref
        _in_turn(subs, lambda keys: _gradients(*arrays, keys, mask, soft_cap, scale), add)

    def finish():
        dq_ref[...] = (acc_ref[...] * scale).T

    return start, step, finish


def _dkv_kernel(
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dk_ref, dv_ref, dk_acc, dv_acc, *,
    soft_cap, scale,
):  # fmt: skip
    def start():
        dk_acc[...] = jnp.zeros(dk_acc.shape, jnp.float32)
        dv_acc[...] = jnp.zeros(dv_acc.shape, jnp.float32)

    def add(keys, p, ds):
        dv_acc[keys, :] += dot(p, dout_ref[...], (1, 0))
        dk_acc[keys, :] += dot(ds, q_ref[...], (1, 0))

    def step(_, subs, mask):
        arrays = q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref
        _in_turn(subs, lambda keys: _gradients(*arrays, keys, mask, soft_cap, scale), add)

    def finish():
        dk_ref[...] = dk_acc[...] * scale
        dv_ref[...] = dv_acc[...]

    return start, step, finish
