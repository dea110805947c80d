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
from pallas_kernels.online_softmax import dot

# 2026-11: jax 0.11 and later warn about Pallas-Triton whenever a program is lowered. That is after
# the pallas_call has returned, so it cannot be silenced around the call. It works through jax 0.12.
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)


def forward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, *, mask, soft_cap, scale, out_dtype):
    tiles.unsupported("triton", q)
    b, t, n, h = q.shape
    call = _Call("triton_forward", q, k, mask, q_pos, kv_pos, q_seg, kv_seg, along="kv")
    out, lse = call(
        functools.partial(_forward_kernel, soft_cap=soft_cap, scale=scale),
        [call.queries(q), call.keys(k), call.keys(v)],
        [((b, call.t, n, call.h), out_dtype, call.q_spec), ((b, n, call.t), None, call.row_spec)],
    )
    return out[:, :t, :, :h], lse[:, :, :t].swapaxes(1, 2)


def backward(q, k, v, q_pos, kv_pos, q_seg, kv_seg, lse, dout, delta, *, mask, soft_cap, scale):
    tiles.unsupported("triton", q)
    (b, t, n, h), (_, s, kv_heads, _) = q.shape, k.shape
    lse, delta = online_softmax.backward_rows(lse, delta)
    dout = dout.astype(q.dtype)

    def run(op, kernel, along, outs):
        call = _Call(op, q, k, mask, q_pos, kv_pos, q_seg, kv_seg, along=along)
        kernel = functools.partial(kernel, soft_cap=soft_cap, scale=scale)
        inputs = [call.queries(q), call.keys(k), call.keys(v), call.queries(dout)]
        return call(kernel, [*inputs, call.rows(lse), call.rows(delta)], outs(call))

    (dq,) = run(
        "triton_dq",
        _dq_kernel,
        "kv",
        lambda call: [((b, call.t, n, call.h), None, call.q_spec)],
    )
    dk, dv = run(
        "triton_dkv",
        _dkv_kernel,
        "q",
        lambda call: [((b, call.s, kv_heads, call.h), None, call.kv_spec)] * 2,
    )
    return dq[:, :t, :, :h], dk[:, :s, :, :h], dv[:, :s, :, :h]


class _Call:
    """One kernel on one set of shapes: block sizes, padding, block lists and index maps.

    The grid is `(block, head, batch)`: query blocks and query heads where a program walks `along`
    the keys, key blocks and KV heads where it walks along the queries. What is walked along is
    one block to Pallas, which on a GPU is a pointer and no copy.
    """

    def __init__(self, op, q, k, mask, q_pos, kv_pos, q_seg, kv_seg, *, along):
        self.interpret = target_platform() == "cpu"
        tuned = tuning.blocks(op, q, interpret=self.interpret)
        (batch, tokens, heads, h), (_, keys, kv_heads, _) = q.shape, k.shape
        self.q = min(tuned.q, max(16, pl.next_power_of_2(tokens)))
        self.kv = min(tuned.kv, max(16, pl.next_power_of_2(keys)))
        self.t, self.s = pl.cdiv(tokens, self.q) * self.q, pl.cdiv(keys, self.kv) * self.kv
        self.h, self.group, self.mask = max(16, pl.next_power_of_2(h)), heads // kv_heads, mask
        self.params = plgpu.CompilerParams(num_warps=tuned.warps, num_stages=tuned.stages)
        # inside shard_map an output varies over the axes that the inputs vary over
        self.varies = jax.typeof(q).manual_axis_type

        q_ids = tiles.token_ids(q_pos, q_seg, self.t, NO_POSITION)
        kv_ids = tiles.token_ids(kv_pos, kv_seg, self.s, PAD_POSITION)
        q_bounds = tiles.block_bounds(q_ids, self.q, NO_POSITION)
        kv_bounds = tiles.block_bounds(kv_ids, self.kv, PAD_POSITION)
        segmented = q_seg is not None
        order, counts = tiles.block_lists(mask, q_bounds, kv_bounds, segmented, along=along)
        c, group, spec = q_ids.shape[1], self.group, pl.BlockSpec
        if along == "kv":
            self.grid = (self.t // self.q, heads, batch)
            self.q_spec = spec((None, self.q, None, self.h), lambda i, n, b: (b, i, n, 0))
            self.kv_spec = spec((None, self.s, None, self.h), lambda i, n, b: (b, 0, n // group, 0))
            self.row_spec = spec((None, None, self.q), lambda i, n, b: (b, n, i))
            q_ids_spec = spec((None, c, self.q), lambda i, n, b: (b, 0, i))
            kv_ids_spec = spec((None, c, self.s), lambda i, n, b: (b, 0, 0))
        else:
            self.grid = (self.s // self.kv, kv_heads, batch)
            self.q_spec = spec((None, self.t, group, self.h), lambda j, n, b: (b, 0, n, 0))
            self.kv_spec = spec((None, self.kv, None, self.h), lambda j, n, b: (b, j, n, 0))
            self.row_spec = spec((None, group, self.t), lambda j, n, b: (b, n, 0))
            q_ids_spec = spec((None, c, self.t), lambda j, n, b: (b, 0, 0))
            kv_ids_spec = spec((None, c, self.kv), lambda j, n, b: (b, 0, j))
        self.plan = [
            (q_ids, q_ids_spec),
            (kv_ids, kv_ids_spec),
            (order, spec((None, None, order.shape[2]), lambda block, n, b: (b, block, 0))),
            (counts, spec((None, None, 2), lambda block, n, b: (b, block, 0))),
        ]

    def queries(self, x):
        return tiles.pad_axis(tiles.pad_axis(x, self.t, 1), self.h, 3), self.q_spec

    def keys(self, x):
        return tiles.pad_axis(tiles.pad_axis(x, self.s, 1), self.h, 3), self.kv_spec

    def rows(self, x):
        return tiles.pad_axis(x.swapaxes(1, 2), self.t, 2), self.row_spec

    def __call__(self, kernel, inputs, outs):
        """`outs`: shape, dtype (None is float32) and block of each result."""
        arrays, in_specs = zip(*self.plan, *inputs, strict=True)
        return pl.pallas_call(
            functools.partial(kernel, call=self),
            grid=self.grid,
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
    q_ids_ref, kv_ids_ref, order_ref, counts_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, *,
    call, soft_cap, scale,
):  # fmt: skip
    q = q_ref[...]
    q_ids = _ids(q_ids_ref, slice(None), _column)

    def step(masked):
        def body(index, carry):
            acc, m, total = carry
            at = pl.ds(order_ref[index] * call.kv, call.kv)
            s, _ = online_softmax.scores(dot(q, k_ref[at, :], (1, 1)), scale, soft_cap)
            if masked:
                seen = tiles.visible(call.mask, q_ids, _ids(kv_ids_ref, at, _row))
                s = jnp.where(seen, s, -jnp.inf)
            p, alpha, m, total = online_softmax.update(s, m, total, axis=1)
            return acc * alpha + dot(p.astype(v_ref.dtype), v_ref[at, :], (1, 0)), m, total

        return body

    zeros = jnp.zeros((call.q, 1), jnp.float32)
    start = jnp.zeros(q.shape, jnp.float32), jnp.full_like(zeros, -jnp.inf), zeros
    acc, m, total = _walk(counts_ref, step, start)
    inverse, lse = online_softmax.finish(m, total)
    out_ref[...] = (acc * inverse).astype(out_ref.dtype)
    lse_ref[...] = lse.reshape(call.q)


def _dq_kernel(
    q_ids_ref, kv_ids_ref, order_ref, counts_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref,
    dq_ref, *, call, soft_cap, scale,
):  # fmt: skip
    q, dout = q_ref[...], dout_ref[...]
    lse, delta = _column(lse_ref[...]), _column(delta_ref[...])
    q_ids = _ids(q_ids_ref, slice(None), _column)

    def step(masked):
        def body(index, dq):
            at = pl.ds(order_ref[index] * call.kv, call.kv)
            k = k_ref[at, :]
            s, slope = online_softmax.scores(dot(q, k, (1, 1)), scale, soft_cap)
            if masked:
                seen = tiles.visible(call.mask, q_ids, _ids(kv_ids_ref, at, _row))
                s = jnp.where(seen, s, -jnp.inf)
            ds = jnp.exp2(s - lse) * (dot(dout, v_ref[at, :], (1, 1)) - delta)
            if slope is not None:
                ds *= slope
            return dq + dot(ds.astype(k.dtype), k, (1, 0))

        return body

    dq_ref[...] = _walk(counts_ref, step, jnp.zeros(q.shape, jnp.float32)) * scale


def _dkv_kernel(
    q_ids_ref, kv_ids_ref, order_ref, counts_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref,
    dk_ref, dv_ref, *, call, soft_cap, scale,
):  # fmt: skip
    k, v = k_ref[...], v_ref[...]
    kv_ids = _ids(kv_ids_ref, slice(None), _column)

    def head(g, carry):
        def step(masked):
            def body(index, carry):
                dk, dv = carry
                at = pl.ds(order_ref[index] * call.q, call.q)
                q, dout = q_ref[at, g, :], dout_ref[at, g, :]
                # everything here is transposed, keys x queries
                s, slope = online_softmax.scores(dot(k, q, (1, 1)), scale, soft_cap)
                if masked:
                    seen = tiles.visible(call.mask, _ids(q_ids_ref, at, _row), kv_ids)
                    s = jnp.where(seen, s, -jnp.inf)
                p = jnp.exp2(s - _row(lse_ref[g, at]))
                dv += dot(p.astype(dout.dtype), dout, (1, 0))
                ds = p * (dot(v, dout, (1, 1)) - _row(delta_ref[g, at]))
                if slope is not None:
                    ds *= slope
                return dk + dot(ds.astype(q.dtype), q, (1, 0)), dv

            return body

        return _walk(counts_ref, step, carry)

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(0, call.group, head, (zeros, zeros))
    dk_ref[...] = dk * scale
    dv_ref[...] = dv
