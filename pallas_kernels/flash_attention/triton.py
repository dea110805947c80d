# SPDX-License-Identifier: Apache-2.0
"""Flash attention for NVIDIA GPUs, through Pallas and XLA's Triton.

One program takes a block of queries (keys, in `_dkv_kernel`) and walks the list of blocks it
needs: first those that need no mask, then those under one. No atomics: a run repeats bit by bit.
Interpreted on CPU; inside `shard_map` the interpreter needs the caller's `check_vma=False`.

Knows nothing of TMA, warp specialisation and fp8: Pallas' Triton offers none.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import online_softmax
from pallas_kernels.dispatch import target_platform
from pallas_kernels.flash_attention import blocks as tiles
from pallas_kernels.flash_attention import tuning
from pallas_kernels.flash_attention.mask import NO_POSITION, PAD_POSITION

# 2026-11: jax 0.11 and later warn about Pallas-Triton whenever a program is lowered. That is after
# the pallas_call has returned, so it cannot be silenced around the call. It works through jax 0.12.
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)


def forward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, *, mask, soft_cap, scale, out_dtype):
    tiles.unsupported("triton", q)
    (b, t, n, h), group = q.shape, q.shape[2] // k.shape[2]
    launch = _Launch("triton_forward", q, k)
    q_ids, kv_ids, (order, counts) = launch.ids(mask, q_pos, kv_pos, q_seg, kv_seg, along="kv")
    q, k, v = launch.queries(q), launch.keys(k), launch.keys(v)
    kernel = functools.partial(
        _forward_kernel, mask=mask, soft_cap=soft_cap, scale=scale, size=launch.kv
    )
    out, lse = launch.call(
        kernel,
        (launch.q_blocks, n, b),
        [
            pl.BlockSpec((None, launch.q, None, launch.h), lambda i, n, b: (b, i, n, 0)),
            *[pl.BlockSpec((None, launch.s, None, launch.h), lambda i, n, b: (b, 0, n // group, 0))] * 2,
            pl.BlockSpec((None, q_ids.shape[1], launch.q), lambda i, n, b: (b, 0, i)),
            pl.BlockSpec((None, kv_ids.shape[1], launch.s), lambda i, n, b: (b, 0, 0)),
            pl.BlockSpec((None, None, order.shape[2]), lambda i, n, b: (b, i, 0)),
            pl.BlockSpec((None, None, 2), lambda i, n, b: (b, i, 0)),
        ],
        [
            (q.shape, out_dtype, pl.BlockSpec((None, launch.q, None, launch.h), lambda i, n, b: (b, i, n, 0))),
            ((b, n, launch.t), jnp.float32, pl.BlockSpec((None, None, launch.q), lambda i, n, b: (b, n, i))),
        ],
        q, k, v, q_ids, kv_ids, order, counts,
    )  # fmt: skip
    return out[:, :t, :, :h], lse[:, :, :t].swapaxes(1, 2)


def backward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, lse, dout, delta, *, mask, soft_cap, scale):
    tiles.unsupported("triton", q)
    rows = online_softmax.backward_rows(lse, delta)
    args = (q, k, v, q_pos, kv_pos, q_seg, kv_seg, *rows, dout.astype(q.dtype))
    options = dict(mask=mask, soft_cap=soft_cap, scale=scale)
    return _dq(*args, **options), *_dkv(*args, **options)


def _dq(q, k, v, q_pos, kv_pos, q_seg, kv_seg, lse, delta, dout, *, mask, soft_cap, scale):
    (b, t, n, h), group = q.shape, q.shape[2] // k.shape[2]
    launch = _Launch("triton_dq", q, k)
    q_ids, kv_ids, (order, counts) = launch.ids(mask, q_pos, kv_pos, q_seg, kv_seg, along="kv")
    q, dout, k, v = launch.queries(q), launch.queries(dout), launch.keys(k), launch.keys(v)
    kernel = functools.partial(
        _dq_kernel, mask=mask, soft_cap=soft_cap, scale=scale, size=launch.kv
    )
    queries = pl.BlockSpec((None, launch.q, None, launch.h), lambda i, n, b: (b, i, n, 0))
    row = pl.BlockSpec((None, None, launch.q), lambda i, n, b: (b, n, i))
    (dq,) = launch.call(
        kernel,
        (launch.q_blocks, n, b),
        [
            queries,
            *[pl.BlockSpec((None, launch.s, None, launch.h), lambda i, n, b: (b, 0, n // group, 0))] * 2,
            queries, row, row,
            pl.BlockSpec((None, q_ids.shape[1], launch.q), lambda i, n, b: (b, 0, i)),
            pl.BlockSpec((None, kv_ids.shape[1], launch.s), lambda i, n, b: (b, 0, 0)),
            pl.BlockSpec((None, None, order.shape[2]), lambda i, n, b: (b, i, 0)),
            pl.BlockSpec((None, None, 2), lambda i, n, b: (b, i, 0)),
        ],
        [(q.shape, jnp.float32, queries)],
        q, k, v, dout, launch.rows(lse), launch.rows(delta), q_ids, kv_ids, order, counts,
    )  # fmt: skip
    return dq[:, :t, :, :h]


def _dkv(q, k, v, q_pos, kv_pos, q_seg, kv_seg, lse, delta, dout, *, mask, soft_cap, scale):
    (b, s, kv_heads, h), group = k.shape, q.shape[2] // k.shape[2]
    launch = _Launch("triton_dkv", q, k)
    q_ids, kv_ids, (order, counts) = launch.ids(mask, q_pos, kv_pos, q_seg, kv_seg, along="q")
    q, dout, k, v = launch.queries(q), launch.queries(dout), launch.keys(k), launch.keys(v)
    kernel = functools.partial(
        _dkv_kernel, mask=mask, soft_cap=soft_cap, scale=scale, size=launch.q, group=group
    )
    queries = pl.BlockSpec((None, launch.t, group, launch.h), lambda j, n, b: (b, 0, n, 0))
    keys = pl.BlockSpec((None, launch.kv, None, launch.h), lambda j, n, b: (b, j, n, 0))
    row = pl.BlockSpec((None, group, launch.t), lambda j, n, b: (b, n, 0))
    dk, dv = launch.call(
        kernel,
        (launch.kv_blocks, kv_heads, b),
        [
            queries, keys, keys, queries, row, row,
            pl.BlockSpec((None, q_ids.shape[1], launch.t), lambda j, n, b: (b, 0, 0)),
            pl.BlockSpec((None, kv_ids.shape[1], launch.kv), lambda j, n, b: (b, 0, j)),
            pl.BlockSpec((None, None, order.shape[2]), lambda j, n, b: (b, j, 0)),
            pl.BlockSpec((None, None, 2), lambda j, n, b: (b, j, 0)),
        ],
        [(k.shape, jnp.float32, keys), (k.shape, jnp.float32, keys)],
        q, k, v, dout, launch.rows(lse), launch.rows(delta), q_ids, kv_ids, order, counts,
    )  # fmt: skip
    return dk[:, :s, :, :h], dv[:, :s, :, :h]


class _Launch:
    """Block sizes of one kernel on one set of shapes, and how arrays are padded to them."""

    def __init__(self, op, q, k):
        self.interpret = target_platform() == "cpu"
        tuned = tuning.blocks(op, q, interpret=self.interpret)
        self.q = min(tuned.q, max(16, pl.next_power_of_2(q.shape[1])))
        self.kv = min(tuned.kv, max(16, pl.next_power_of_2(k.shape[1])))
        self.h = max(16, pl.next_power_of_2(q.shape[-1]))
        self.q_blocks, self.kv_blocks = pl.cdiv(q.shape[1], self.q), pl.cdiv(k.shape[1], self.kv)
        self.t, self.s = self.q_blocks * self.q, self.kv_blocks * self.kv
        self.params = plgpu.CompilerParams(num_warps=tuned.warps, num_stages=tuned.stages)
        # inside shard_map an output varies over the axes that the inputs vary over
        self.varies = jax.typeof(q).manual_axis_type

    def queries(self, x):
        return tiles.pad_axis(tiles.pad_axis(x, self.t, 1), self.h, 3)

    def keys(self, x):
        return tiles.pad_axis(tiles.pad_axis(x, self.s, 1), self.h, 3)

    def rows(self, x):
        return tiles.pad_axis(x.swapaxes(1, 2), self.t, 2)

    def ids(self, mask, q_pos, kv_pos, q_seg, kv_seg, *, along):
        q_ids = tiles.token_ids(q_pos, q_seg, self.t, NO_POSITION)
        kv_ids = tiles.token_ids(kv_pos, kv_seg, self.s, PAD_POSITION)
        lists = tiles.block_lists(
            mask,
            tiles.block_bounds(q_ids, self.q, NO_POSITION),
            tiles.block_bounds(kv_ids, self.kv, PAD_POSITION),
            q_seg is not None,
            along=along,
        )
        return q_ids, kv_ids, lists

    def call(self, kernel, grid, in_specs, outs, *args):
        return pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=in_specs,
            out_specs=[spec for _, _, spec in outs],
            out_shape=[
                jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=self.varies)
                for shape, dtype, _ in outs
            ],
            compiler_params=self.params,
            interpret=self.interpret,
            name=f"flash_attention{kernel.func.__name__.removesuffix('_kernel')}",
        )(*args)


def _dot(a, b, contract=(1, 0)):
    # Triton would take TF32 for float32 inputs, unless told
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=(exact, exact),
        preferred_element_type=jnp.float32,
    )


def _ids(ref, at, expand):
    return [expand(ref[row, at]) for row in range(ref.shape[0])]


def _column(x):
    return x[:, None]


def _row(x):
    return x[None, :]


def _walk(counts_ref, step, carry):
    """`step(masked)(index, carry)` over the blocks that need no mask, then over those that do."""
    full, some = counts_ref[0], counts_ref[1]
    carry = jax.lax.fori_loop(0, full, step(False), carry)
    return jax.lax.fori_loop(full, some, step(True), carry)


def _forward_kernel(
    q_ref,
    k_ref,
    v_ref,
    q_ids_ref,
    kv_ids_ref,
    order_ref,
    counts_ref,
    out_ref,
    lse_ref,
    *,
    mask,
    soft_cap,
    scale,
    size,
):
    q = q_ref[...]
    q_ids = _ids(q_ids_ref, slice(None), _column)

    def step(masked):
        def body(index, carry):
            acc, m, l = carry
            at = pl.ds(order_ref[index] * size, size)
            s, _ = online_softmax.scores(_dot(q, k_ref[at, :], (1, 1)), scale, soft_cap)
            if masked:
                s = jnp.where(tiles.visible(mask, q_ids, _ids(kv_ids_ref, at, _row)), s, -jnp.inf)
            p, alpha, m, l = online_softmax.update(s, m, l, axis=1)
            return acc * alpha + _dot(p.astype(v_ref.dtype), v_ref[at, :]), m, l

        return body

    rows = (q.shape[0], 1)
    start = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.full(rows, -jnp.inf, jnp.float32),
        jnp.zeros(rows, jnp.float32),
    )
    acc, m, l = _walk(counts_ref, step, start)
    inverse, lse = online_softmax.finish(m, l)
    out_ref[...] = (acc * inverse).astype(out_ref.dtype)
    lse_ref[...] = lse.reshape(q.shape[0])


def _dq_kernel(
    q_ref,
    k_ref,
    v_ref,
    dout_ref,
    lse_ref,
    delta_ref,
    q_ids_ref,
    kv_ids_ref,
    order_ref,
    counts_ref,
    dq_ref,
    *,
    mask,
    soft_cap,
    scale,
    size,
):
    q, dout = q_ref[...], dout_ref[...]
    lse, delta = _column(lse_ref[...]), _column(delta_ref[...])
    q_ids = _ids(q_ids_ref, slice(None), _column)

    def step(masked):
        def body(index, dq):
            at = pl.ds(order_ref[index] * size, size)
            k = k_ref[at, :]
            s, slope = online_softmax.scores(_dot(q, k, (1, 1)), scale, soft_cap)
            if masked:
                s = jnp.where(tiles.visible(mask, q_ids, _ids(kv_ids_ref, at, _row)), s, -jnp.inf)
            ds = jnp.exp2(s - lse) * (_dot(dout, v_ref[at, :], (1, 1)) - delta)
            if slope is not None:
                ds *= slope
            return dq + _dot(ds.astype(k.dtype), k)

        return body

    dq_ref[...] = _walk(counts_ref, step, jnp.zeros(q.shape, jnp.float32)) * scale


def _dkv_kernel(
    q_ref,
    k_ref,
    v_ref,
    dout_ref,
    lse_ref,
    delta_ref,
    q_ids_ref,
    kv_ids_ref,
    order_ref,
    counts_ref,
    dk_ref,
    dv_ref,
    *,
    mask,
    soft_cap,
    scale,
    size,
    group,
):
    k, v = k_ref[...], v_ref[...]
    kv_ids = _ids(kv_ids_ref, slice(None), _column)

    def head(g, carry):
        def step(masked):
            def body(index, carry):
                dk, dv = carry
                at = pl.ds(order_ref[index] * size, size)
                q, dout = q_ref[at, g, :], dout_ref[at, g, :]
                # everything here is transposed, keys x queries
                s, slope = online_softmax.scores(_dot(k, q, (1, 1)), scale, soft_cap)
                if masked:
                    s = jnp.where(
                        tiles.visible(mask, _ids(q_ids_ref, at, _row), kv_ids), s, -jnp.inf
                    )
                p = jnp.exp2(s - _row(lse_ref[g, at]))
                dv += _dot(p.astype(dout.dtype), dout)
                ds = p * (_dot(v, dout, (1, 1)) - _row(delta_ref[g, at]))
                if slope is not None:
                    ds *= slope
                return dk + _dot(ds.astype(q.dtype), q), dv

            return body

        return _walk(counts_ref, step, carry)

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(0, group, head, (zeros, zeros))
    dk_ref[...] = dk * scale
    dv_ref[...] = dv
