# SPDX-License-Identifier: Apache-2.0
"""Flash attention for NVIDIA GPUs, through Pallas and XLA's Triton.

One program takes a block of queries (keys, in `_dkv_kernel`) and walks the list of blocks it
needs: first those that need no mask, then those under one. No atomics: a run repeats bit by bit.
Interpreted on CPU; inside `shard_map` the interpreter needs the caller's `check_vma=False`.

Knows nothing of TMA, warp specialisation and fp8: Pallas' Triton offers none.
"""

import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import online_softmax
from pallas_kernels.dispatch import target_platform
from pallas_kernels.flash_attention import blocks as tiles
from pallas_kernels.flash_attention import tuning
from pallas_kernels.flash_attention.mask import NO_POSITION, PAD_POSITION
from pallas_kernels.online_softmax import LOG2E, dot

# 2026-11: jax 0.11 and later warn about Pallas-Triton whenever a program is lowered. That is after
# the pallas_call has returned, so it cannot be silenced around the call. It works through jax 0.12.
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)

WIDEST = 128  # columns of a tile: more takes more registers for its addresses
# The running maximum before the first visible key. It lies below every real score, and is finite:
# exp2(-inf - LEAST) is 0, where exp2(-inf - -inf) would be NaN and need a test in the hot loop.
LEAST = -(2.0**100)


def _check(q, v):
    # float32 at 512: the backward's tiles of 16 tokens take more than a block's shared memory
    widest = 256 if q.dtype.name == "float32" else 512
    dtypes = ("float32", "bfloat16", "float16")
    tiles.unsupported("triton", q, v, dtypes=dtypes, head_dim=widest)


def forward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, *, mask, soft_cap, scale, carry, out_dtype):
    _check(q, v)
    b, t, n, _ = q.shape
    call = _Call("triton_forward", q, k, v, mask, q_pos, kv_pos, q_seg, kv_seg, along="kv")
    before = [] if carry is None else [call.outs(carry[0]), call.rows(carry[1])]
    out, lse = call(
        functools.partial(_forward_kernel, soft_cap=soft_cap, scale=scale),
        [call.queries(q), call.keys(k), call.values(v), *before],
        [
            ((b, call.t, n, call.hv), out_dtype, call.specs.outs),
            ((b, n, call.t), None, call.specs.rows),
        ],
    )
    return out[:, :t, :, : v.shape[3]], lse[:, :, :t].swapaxes(1, 2)


def backward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, lse, dout, delta, *, mask, soft_cap, scale):
    _check(q, v)
    (b, t, n, h), (_, s, kv_heads, _) = q.shape, k.shape
    lse, delta = online_softmax.backward_rows(lse, delta)
    dout = dout.astype(q.dtype)

    def run(op, kernel, along, outs):
        call = _Call(op, q, k, v, mask, q_pos, kv_pos, q_seg, kv_seg, along=along)
        kernel = functools.partial(kernel, soft_cap=soft_cap, scale=scale)
        inputs = [call.queries(q), call.keys(k), call.values(v), call.outs(dout)]
        return call(kernel, [*inputs, call.rows(lse), call.rows(delta)], outs(call))

    (dq,) = run(
        "triton_dq",
        _dq_kernel,
        "kv",
        lambda call: [((b, call.t, n, call.h), None, call.specs.queries)],
    )
    dk, dv = run(
        "triton_dkv",
        _dkv_kernel,
        "q",
        lambda call: [
            ((b, call.s, kv_heads, call.h), None, call.specs.keys),
            ((b, call.s, kv_heads, call.hv), None, call.specs.values),
        ],
    )
    return dq[:, :t, :, :h], dk[:, :s, :, :h], dv[:, :s, :, : v.shape[3]]


class _Specs(NamedTuple):
    """The grid, and the block that a program has of each array.

    queries, keys, values, outs   [B, tokens, heads, width]
    rows                          [B, heads, tokens]
    q_ids, kv_ids                 [B, 1 or 2, tokens]
    """

    grid: tuple
    queries: pl.BlockSpec
    keys: pl.BlockSpec
    values: pl.BlockSpec
    outs: pl.BlockSpec
    rows: pl.BlockSpec
    q_ids: pl.BlockSpec
    kv_ids: pl.BlockSpec


class _Call:
    """One kernel on one set of shapes: block sizes, padding, block lists and index maps.

    The grid is `(block, head, batch)`: query blocks and query heads where a program walks `along`
    the keys, key blocks and KV heads where it walks along the queries. What is walked along is
    one block to Pallas, which on a GPU is a pointer and no copy.
    """

    def __init__(self, op, q, k, v, mask, q_pos, kv_pos, q_seg, kv_seg, *, along):
        self.interpret = target_platform() == "cpu"
        widest = max(q.shape[3], v.shape[3])
        tuned = tuning.blocks(op, widest, q.dtype, interpret=self.interpret)
        (self.batch, tokens, self.heads, h), (_, keys, self.kv_heads, _) = q.shape, k.shape
        self.q = min(tuned.q, max(16, pl.next_power_of_2(tokens)))
        self.kv = min(tuned.kv, max(16, pl.next_power_of_2(keys)))
        self.t, self.s = pl.cdiv(tokens, self.q) * self.q, pl.cdiv(keys, self.kv) * self.kv
        self.h, self.hv = (max(16, pl.next_power_of_2(width)) for width in (h, v.shape[3]))
        self.group, self.mask = self.heads // self.kv_heads, mask
        self.exact = q.dtype.itemsize > 2
        self.params = plgpu.CompilerParams(num_warps=tuned.warps, num_stages=tuned.stages)
        # inside shard_map an output varies over the axes that the inputs vary over
        self.varies = jax.typeof(q).manual_axis_type
        q_ids = tiles.token_ids(q_pos, q_seg, self.t, NO_POSITION)
        kv_ids = tiles.token_ids(kv_pos, kv_seg, self.s, PAD_POSITION)
        q_bounds = tiles.block_bounds(q_ids, self.q, NO_POSITION)
        kv_bounds = tiles.block_bounds(kv_ids, self.kv, PAD_POSITION)
        segmented = q_seg is not None
        order, counts = tiles.block_lists(mask, q_bounds, kv_bounds, segmented, along=along)
        specs = self._along_keys if along == "kv" else self._along_queries
        self.specs = specs(ids=q_ids.shape[1])
        self.plan = [
            (q_ids, self.specs.q_ids),
            (kv_ids, self.specs.kv_ids),
            *[
                (x, pl.BlockSpec((None, None, x.shape[2]), lambda block, n, b: (b, block, 0)))
                for x in (order, counts)
            ],
        ]

    def _along_keys(self, ids):
        """A program has block `i` of the queries of head `n`, and all keys of its KV head."""
        spec, group = pl.BlockSpec, self.group

        def block_of_queries(width):
            return spec((None, self.q, None, width), lambda i, n, b: (b, i, n, 0))

        def all_keys(width):
            return spec((None, self.s, None, width), lambda i, n, b: (b, 0, n // group, 0))

        return _Specs(
            grid=(self.t // self.q, self.heads, self.batch),
            queries=block_of_queries(self.h),
            keys=all_keys(self.h),
            values=all_keys(self.hv),
            outs=block_of_queries(self.hv),
            rows=spec((None, None, self.q), lambda i, n, b: (b, n, i)),
            q_ids=spec((None, ids, self.q), lambda i, n, b: (b, 0, i)),
            kv_ids=spec((None, ids, self.s), lambda i, n, b: (b, 0, 0)),
        )

    def _along_queries(self, ids):
        """A program has block `j` of the keys of KV head `n`, and all queries of its group."""
        spec, group = pl.BlockSpec, self.group

        def all_queries(width):
            return spec((None, self.t, group, width), lambda j, n, b: (b, 0, n, 0))

        def block_of_keys(width):
            return spec((None, self.kv, None, width), lambda j, n, b: (b, j, n, 0))

        return _Specs(
            grid=(self.s // self.kv, self.kv_heads, self.batch),
            queries=all_queries(self.h),
            keys=block_of_keys(self.h),
            values=block_of_keys(self.hv),
            outs=all_queries(self.hv),
            rows=spec((None, group, self.t), lambda j, n, b: (b, n, 0)),
            q_ids=spec((None, ids, self.t), lambda j, n, b: (b, 0, 0)),
            kv_ids=spec((None, ids, self.kv), lambda j, n, b: (b, 0, j)),
        )

    def queries(self, x):
        return tiles.pad_axis(tiles.pad_axis(x, self.t, 1), self.h, 3), self.specs.queries

    def keys(self, x):
        return tiles.pad_axis(tiles.pad_axis(x, self.s, 1), self.h, 3), self.specs.keys

    def values(self, x):
        return tiles.pad_axis(tiles.pad_axis(x, self.s, 1), self.hv, 3), self.specs.values

    def outs(self, x):
        return tiles.pad_axis(tiles.pad_axis(x, self.t, 1), self.hv, 3), self.specs.outs

    def rows(self, x):
        return tiles.pad_axis(x.swapaxes(1, 2), self.t, 2), self.specs.rows

    def columns(self, rows, width):
        return _columns(rows, width, self.params.num_warps)

    def __call__(self, kernel, inputs, outs):
        """Run the kernel; `outs`: shape, dtype (None is float32) and block of each result."""
        arrays, in_specs = zip(*self.plan, *inputs, strict=True)
        return pl.pallas_call(
            functools.partial(kernel, call=self),
            grid=self.specs.grid,
            in_specs=in_specs,
            out_specs=[block for _, _, block in outs],
            out_shape=[
                jax.ShapeDtypeStruct(shape, dtype or jnp.float32, manual_axis_type=self.varies)
                for shape, dtype, _ in outs
            ],
            compiler_params=self.params,
            interpret=self.interpret,
            name=f"flash_attention{kernel.func.__name__.removesuffix('_kernel')}",
        )(*arrays)


GREATEST_CAP = 1024.0  # above it the differences that `_scores` forms would show


def _scores(qk, scale, soft_cap, call):
    """Return `(s, unit, slope)`: scores in log2 units are `s * unit + _offset()`, `unit` positive.

    Without a soft cap `s` is `qk`: the factor costs nothing where it meets a subtraction. With one
    and 16-bit inputs `s` is `-1 / (1 + exp(2 x))`, of which `tanh(x)` is `1 + 2 s`: four
    instructions instead of eight, off by 2**-22 or so.
    """
    if _offset(soft_cap, call):
        s = _half_tanh(qk, 2 * LOG2E * scale / soft_cap, call.interpret)
        return s, 2 * soft_cap * LOG2E, -4 * s * (1 + s)
    if soft_cap is None and scale > 0:
        return qk, scale * LOG2E, None
    s, slope = online_softmax.scores(qk, scale, soft_cap)
    return s, 1.0, slope


def _offset(soft_cap, call):
    return 0.0 if soft_cap is None or call.exact or soft_cap > GREATEST_CAP else soft_cap * LOG2E


def _half_tanh(x, factor, interpret):
    """Compute `-1 / (1 + exp2(x * factor))`."""
    if interpret:
        return -1 / (1 + jnp.exp2(x * factor))
    bits = np.float32(factor).view(np.uint32)
    (s,) = plgpu.elementwise_inline_asm(
        f"{{ .reg .f32 e; mul.f32 e, $1, 0f{bits:08X}; ex2.approx.ftz.f32 e, e; "
        "sub.f32 e, 0fBF800000, e; rcp.approx.ftz.f32 $0, e; }",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return s


def _exp2(s, unit, shift, interpret):
    """Compute `exp2(s * unit - shift)` in two instructions an entry; below 2**-126 it is 0.

    `jnp.exp2` becomes CUDA's, which brackets the instruction with a range check and two products,
    and XLA's Triton does not fuse the product with the subtraction by itself.
    """
    if interpret:
        return jnp.exp2(s * unit - shift)
    bits = np.float32(unit).view(np.uint32)
    (p,) = plgpu.elementwise_inline_asm(
        f"{{ .reg .f32 x; fma.rn.f32 x, $1, 0f{bits:08X}, $2; ex2.approx.ftz.f32 $0, x; }}",
        args=[s, jnp.broadcast_to(-shift, s.shape)],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(s.shape, jnp.float32)],
    )
    return p


def _ids(ref, at, expand):
    return [expand(ref[row, at]) for row in range(ref.shape[0])]


def _column(x):
    return x[:, None]


def _row(x):
    return x[None, :]


def _columns(rows, width, warps):
    """Cut `width` columns into parts no wider than `rows`, if the rows are enough for the warps.

    Triton lays the warps of a program along the longer side of one of its products and has the
    others follow. Softmax wants them along the rows: a row in one warp needs no shared memory.
    With fewer than 16 rows a warp they have to share columns, or they would repeat each other.
    """
    size = min(rows, width, WIDEST) if rows >= 16 * warps else width
    return [pl.ds(start, size) for start in range(0, width, size)]


def _parts(ref, columns, *at):
    return [ref[(*at, part) if at else (slice(None), part)] for part in columns]


def _product(a, b):
    """Multiply `a @ b.T`, both lists of parts that are cut at the same columns."""
    return sum(dot(x, y, (1, 1)) for x, y in zip(a, b, strict=True))


def _add_products(accs, x, parts):
    return [acc + dot(x, part, (1, 0)) for acc, part in zip(accs, parts, strict=True)]


def _block(order_ref, index, size):
    return pl.ds(order_ref[index].astype(jnp.int32) * size, size)


def _walk(counts_ref, step, carry):
    """Run `step(masked)(index, carry)` over the blocks that need no mask, then over the others."""
    full, some = counts_ref[0], counts_ref[1]
    carry = jax.lax.fori_loop(0, full, step(False), carry)
    return jax.lax.fori_loop(full, some, step(True), carry)


def _forward_kernel(
    q_ids_ref, kv_ids_ref, order_ref, counts_ref, q_ref, k_ref, v_ref, *refs, call, soft_cap, scale
):  # fmt: skip
    *before, out_ref, lse_ref = refs
    depth, columns = _columns(WIDEST, call.h, 1), call.columns(call.q, call.hv)
    q = _parts(q_ref, depth)
    q_ids = _ids(q_ids_ref, slice(None), _column)

    def step(masked):
        def body(index, carry):
            accs, m, total = carry
            at = _block(order_ref, index, call.kv)
            k = _parts(k_ref, depth, at)
            s, unit, _ = _scores(_product(q, k), scale, soft_cap, call)
            if masked:
                seen = tiles.visible(call.mask, q_ids, _ids(kv_ids_ref, at, _row))
                s = jnp.where(seen, s, -jnp.inf)
            m_new = jnp.maximum(m, jnp.max(s, axis=1, keepdims=True) * unit)
            p = _exp2(s, unit, m_new, call.interpret)
            alpha = _exp2(m, 1.0, m_new, call.interpret)
            total = total * alpha + jnp.sum(p, axis=1, keepdims=True)
            p = p.astype(v_ref.dtype)
            v = _parts(v_ref, columns, at)
            return _add_products([acc * alpha for acc in accs], p, v), m_new, total

        return body

    total = jnp.zeros((call.q, 1), jnp.float32)
    m = jnp.full_like(total, LEAST)
    accs = [jnp.zeros((call.q, part.size), jnp.float32) for part in columns]
    offset = _offset(soft_cap, call)  # cancels in the loop, which takes differences of scores
    if before:
        out, lse = before[0], _column(before[1][...])
        for i, part in enumerate(columns):
            carried = online_softmax.carried(out[:, part].astype(jnp.float32), lse)
            accs[i], m, total = carried
        m = jnp.maximum(m - offset, LEAST)
    accs, m, total = _walk(counts_ref, step, (accs, m, total))
    inverse, lse = online_softmax.finish(m + offset, total)
    for acc, part in zip(accs, columns, strict=True):
        out_ref[:, part] = (acc * inverse).astype(out_ref.dtype)
    lse_ref[...] = lse.reshape(call.q)


def _dq_kernel(
    q_ids_ref, kv_ids_ref, order_ref, counts_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref,
    dq_ref, *, call, soft_cap, scale,
):  # fmt: skip
    columns, v_columns = call.columns(call.q, call.h), call.columns(call.q, call.hv)
    q, dout = _parts(q_ref, columns), _parts(dout_ref, v_columns)
    lse, delta = _column(lse_ref[...] - _offset(soft_cap, call)), _column(delta_ref[...])
    q_ids = _ids(q_ids_ref, slice(None), _column)

    def step(masked):
        def body(index, dqs):
            at = _block(order_ref, index, call.kv)
            k = _parts(k_ref, columns, at)
            s, unit, slope = _scores(_product(q, k), scale, soft_cap, call)
            if masked:
                seen = tiles.visible(call.mask, q_ids, _ids(kv_ids_ref, at, _row))
                s = jnp.where(seen, s, -jnp.inf)
            p = _exp2(s, unit, lse, call.interpret)
            ds = p * (_product(dout, _parts(v_ref, v_columns, at)) - delta)
            if slope is not None:
                ds *= slope
            return _add_products(dqs, ds.astype(k_ref.dtype), k)

        return body

    zeros = [jnp.zeros((call.q, part.size), jnp.float32) for part in columns]
    for dq, part in zip(_walk(counts_ref, step, zeros), columns, strict=True):
        dq_ref[:, part] = dq * scale


def _dkv_kernel(
    q_ids_ref, kv_ids_ref, order_ref, counts_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref,
    dk_ref, dv_ref, *, call, soft_cap, scale,
):  # fmt: skip
    columns, v_columns = call.columns(call.kv, call.h), call.columns(call.kv, call.hv)
    k, v = _parts(k_ref, columns), _parts(v_ref, v_columns)
    kv_ids = _ids(kv_ids_ref, slice(None), _column)
    offset = _offset(soft_cap, call)

    def head(g, carry):
        def step(masked):
            def body(index, carry):
                dks, dvs = carry
                at = _block(order_ref, index, call.q)
                # everything here is transposed, keys x queries
                q, dout = _parts(q_ref, columns, at, g), _parts(dout_ref, v_columns, at, g)
                s, unit, slope = _scores(_product(k, q), scale, soft_cap, call)
                if masked:
                    seen = tiles.visible(call.mask, _ids(q_ids_ref, at, _row), kv_ids)
                    s = jnp.where(seen, s, -jnp.inf)
                p = _exp2(s, unit, _row(lse_ref[g, at]) - offset, call.interpret)
                dvs = _add_products(dvs, p.astype(dout_ref.dtype), dout)
                ds = p * (_product(v, dout) - _row(delta_ref[g, at]))
                if slope is not None:
                    ds *= slope
                return _add_products(dks, ds.astype(q_ref.dtype), q), dvs

            return body

        return _walk(counts_ref, step, carry)

    zeros = tuple(
        [jnp.zeros((call.kv, part.size), jnp.float32) for part in parts]
        for parts in (columns, v_columns)
    )
    dks, dvs = jax.lax.fori_loop(0, call.group, head, zeros)
    for dk, part in zip(dks, columns, strict=True):
        dk_ref[:, part] = dk * scale
    for dv, part in zip(dvs, v_columns, strict=True):
        dv_ref[:, part] = dv
