# SPDX-License-Identifier: Apache-2.0
"""Flash attention for TPUs, through Pallas and Mosaic.

The code of a tile is in `mosaic_tpu_tile.py`. The innermost grid axis walks the other side's
blocks and accumulates in VMEM; a block with nothing to see is neither fetched nor multiplied. The
backward pass is one kernel: keys outside, queries inside, with the gradient of all queries in
VMEM. Nothing is transposed outside a kernel. Interpreted on CPU; inside `shard_map` the
interpreter needs the caller's `check_vma=False`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import online_softmax
from pallas_kernels.dispatch import target_platform
from pallas_kernels.flash_attention import blocks as tiles
from pallas_kernels.flash_attention import mosaic_tpu_tile as tile
from pallas_kernels.flash_attention.mask import NO_POSITION, PAD_POSITION
from pallas_kernels.flash_attention.mosaic_tpu_tile import (
    LANES,
    apart,
    exactly,
    lanes,
    side_by_side,
)

DQ_BYTES = 24 << 20  # VMEM for the queries' gradient; the smallest chip has 64 MiB


def forward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, *, mask, soft_cap, scale, carry, out_dtype):
    _check(q, v)
    q, k, v = exactly(q, k, v)
    b, t, n, _ = q.shape
    call = _Call("mosaic_forward", q, k, v, mask, q_pos, kv_pos, q_seg, kv_seg, queries_inner=False)
    lse = None if carry is None else carry[1]
    call.scalars.append(within_bound(q, k, q_pos, kv_pos, lse, soft_cap, scale).reshape(-1))
    before = [] if carry is None else [call.outs(*exactly(carry[0])), call.rows(carry[1])]
    kernel_dtype = jnp.float32 if jnp.dtype(out_dtype) == jnp.float16 else out_dtype
    out, lse = call(
        functools.partial(tile.forward_kernel, soft_cap=soft_cap, scale=scale),
        [call.queries(q), call.keys(k), call.values(v), *before],
        [
            ((b, call.t, n * call.hv), kernel_dtype, call.out_spec),
            ((b, n, 1, call.t), None, call.row_spec),
        ],
        [(call.rows_v, call.q), (1, call.q), (1, call.q)],
    )
    return apart(out, n, t, v.shape[3]).astype(out_dtype), lse[:, :, 0, :t].swapaxes(1, 2)


def _check(q, v):
    tiles.unsupported("mosaic_tpu", q, v, dtypes=("float32", "bfloat16", "float16"), head_dim=512)


def within_bound(q, k, q_pos, kv_pos, lse, soft_cap, scale):
    """Tell for each head whether its scores are so small that no exponential overflows."""
    keys = tile.longest(k, kv_pos == PAD_POSITION)
    return tile.safe(tile.longest(q, q_pos == NO_POSITION), keys, lse, soft_cap, scale)


def backward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, lse, dout, delta, *, mask, soft_cap, scale):
    _check(q, v)
    q, k, v = exactly(q, k, v)
    (_, t, n, h), kv_heads = q.shape, k.shape[2]
    lse, delta = online_softmax.backward_rows(lse, delta)
    options = dict(mask=mask, soft_cap=soft_cap, scale=scale)
    most = max(DQ_BYTES // (n // kv_heads * lanes(h) * 4) // LANES, 1) * LANES
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
        functools.partial(tile.backward_kernel, **options),
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
    return apart(dq, n, t, h), apart(dk, kv_heads, s, h), apart(dv, kv_heads, s, v.shape[3])


class _Call(tile.Tile):
    """One kernel on one set of shapes: block sizes, padding, index maps, and which blocks to skip.

    The grid is `(batch, head, query block, key block)`, or with `queries_inner`
    `(batch, kv head, key block, query head of the group, query block)`.
    """

    def __init__(self, op, q, k, v, mask, q_pos, kv_pos, q_seg, kv_seg, *, queries_inner):
        self.interpret = target_platform() == "cpu"
        segmented = q_seg is not None
        super().__init__(
            op, q, k, v, mask,
            segmented=segmented, queries_inner=queries_inner, interpret=self.interpret,
        )  # fmt: skip
        self.nq, self.nk = pl.cdiv(q.shape[1], self.q), pl.cdiv(k.shape[1], self.kv)
        self.t, self.s = self.nq * self.q, self.nk * self.kv
        self.q_ids = tiles.token_ids(q_pos, q_seg, self.t, NO_POSITION)
        self.kv_ids = tiles.token_ids(kv_pos, kv_seg, self.s, PAD_POSITION)
        self.scalars = [
            # flat: SMEM pads a minor axis
            jnp.stack(tile.block_scalars(ids, block, pad), axis=1).reshape(-1)
            for ids, block, pad in (
                (self.q_ids, self.q, NO_POSITION),
                (self.kv_ids, self.kv, PAD_POSITION),
            )
        ]
        # inside shard_map an output varies over the axes that the inputs vary over
        self.varies = jax.typeof(q).manual_axis_type
        if queries_inner:
            self.grid: tuple[int, ...] = (self.batch, self.kv_heads, self.nk, self.group, self.nq)
        else:
            self.grid = (self.batch, self.heads, self.nq, self.nk)
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
        return side_by_side(x, self.t, self.h), self.q_spec

    def keys(self, x):
        return side_by_side(x, self.s, self.h), self.kv_spec

    def values(self, x):
        return side_by_side(x, self.s, self.hv), self.v_spec

    def outs(self, x):
        return side_by_side(x, self.t, self.hv), self.out_spec

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
        """The index of the queries' block, constant until the last keys: none is written before."""
        last = j == self.nk - 1
        return b, jnp.where(last, i, 0), kv_head * self.group + jnp.where(last, g, 0)

    def at(self, index, scalars, *, fetch=False):
        """Locate a grid step: batch, heads and blocks.

        With `fetch`, a step that is skipped names a block that is loaded already or needed soon.
        """
        if self.queries_inner:
            b, kv_head, j, g, i = index
            head = kv_head * self.group + g
        else:
            b, head, i, j = index
            kv_head = head // self.group
        some, every, diagonal = self.visibility(
            self._block(scalars[0], self.nq, b, i), self._block(scalars[1], self.nk, b, j)
        )
        if fetch and self.queries_inner:
            i = jnp.where(some, i, self.nq - 1)  # causal: the last query block sees the most keys
        elif fetch:
            j = jnp.where(some, j, 0)
        return tile.At(b, head, kv_head, i, j, some, every, diagonal)

    def _block(self, ref, blocks, b, block):
        rows = len(tiles.Bounds._fields) + 1
        return [ref[(b * rows + row) * blocks + block] for row in range(rows)]

    def __call__(self, kernel, inputs, outs, scratch):
        """Run the kernel.

        `outs`: shape, dtype (None is float32) and block of each; `scratch`: float32 shapes.
        """
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
                    pltpu.VMEM(self.columns(), jnp.int32),
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
            name=f"flash_attention_{kernel.func.__name__.removesuffix('_kernel')}",
        )(*self.scalars, *arrays)


def _entry(*refs, call, kernel):
    scalars = refs[: len(call.scalars)]
    q_ids_ref, kv_ids_ref, *blocks, columns_ref = refs[len(call.scalars) :]
    index = [pl.program_id(axis) for axis in range(len(call.grid))]
    at = call.at(index, scalars)
    ends = list(zip(index, call.grid, strict=True))
    turn = tile.Turn(
        first=functools.reduce(jnp.logical_and, [i == 0 for i, _ in ends[3:]]),
        last=functools.reduce(jnp.logical_and, [i == size - 1 for i, size in ends[3:]]),
        first_keys=index[2] == 0,
        last_keys=index[2] == call.grid[2] - 1,
        queries=index[3] * call.grid[-1] + index[-1],
    )

    if call.queries_inner:
        parts = kernel(turn, *blocks)
    else:
        parts = kernel(turn, scalars[2][at.b * call.grid[1] + at.head] == 1, *blocks)
    tile.work(call, at, parts, q_ids_ref, kv_ids_ref, columns_ref)
