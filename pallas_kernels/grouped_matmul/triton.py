# SPDX-License-Identifier: Apache-2.0
"""Grouped matmul for NVIDIA GPUs, through Pallas and XLA's Triton.

A tile of rows belongs to one group and starts where the group's rows do, so no row is multiplied
twice; there are as many programs as any group sizes can need, and those left over do nothing.
Programs run column after column of a tile, which keeps a group's weights in L2. No atomics: a run
repeats bit by bit. Weights of 8 bits become the type of the rows on their way into the product.
Interpreted on CPU; inside `shard_map` the interpreter needs the caller's `check_vma=False`.
"""

import dataclasses
import functools
import math
import operator
import warnings

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dispatch import target_platform
from pallas_kernels.grouped_matmul import gradients, groups, stack, tuning
from pallas_kernels.grouped_matmul.quantized import (
    BLOCK,
    Quantized,
    decoded,
    fine_operands,
    operand,
)
from pallas_kernels.number_formats import from_ue8m0
from pallas_kernels.online_softmax import dot
from pallas_kernels.varying import like

# 2026-11: jax 0.11 and later warn about Pallas-Triton whenever a program is lowered. That is after
# the pallas_call has returned, so it cannot be silenced around the call. It works through jax 0.12.
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)

LEAST = 16  # size of a Triton dot in every dimension, at least
MADE = 32  # rows of 4 bits that are made whole together, at most: more exceed shared memory


def matmul(lhs, rhs, group_sizes, *, transpose=False, layer=None):
    """`[M, F]`, or with `transpose` `[M, D]` from `[M, F]` and `[E, D, F]`."""
    (out,) = _products(
        "triton_matmul", lhs, (rhs,), group_sizes, 1, _first, transpose=transpose, layer=layer
    )
    return out


def swiglu(lhs, gate, up, group_sizes, clamp, *, preactivations, layer=None):
    """`(out, g, u)`; g and u only with `preactivations`."""
    outs = 3 if preactivations else 1
    finish = functools.partial(_gated, clamp=clamp)
    return _products("triton_swiglu", lhs, (gate, up), group_sizes, outs, finish, layer=layer)


def outer(lhs, dout, group_sizes, dtype):
    """`lhs.T @ dout` of each group's rows, `[E, D, F]`; 0 for an empty group."""
    (m, d), f, e = lhs.shape, dout.shape[1], group_sizes.shape[0]
    if m == 0:
        return _zeros(lhs, (e, d, f), dtype)
    interpret = target_platform() == "cpu"
    block = _fit(tuning.blocks("triton_outer", m // e, lhs.dtype, interpret=interpret), m, f, d)
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    return pl.pallas_call(
        functools.partial(_outer_kernel, block=block, shape=(d, f)),
        grid=(e * pl.cdiv(d, block.k) * pl.cdiv(f, block.n),),
        out_shape=like(lhs, (e, d, f), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=block.warps, num_stages=block.stages),
        interpret=interpret,
        name="grouped_matmul_outer",
    )(ends - group_sizes.astype(jnp.int32), ends, lhs, dout.astype(lhs.dtype))


def _products(op, lhs, weights, group_sizes, outs, finish, *, transpose=False, layer=None):
    """`finish` of the products of `lhs` with each of the weights, one kernel."""
    weights, layer = _in_reach(weights, layer)
    (m, k), (e,) = lhs.shape, group_sizes.shape
    matrices, n = weights[0].shape[0], weights[0].shape[1 if transpose else 2]
    if isinstance(weights[0], Quantized) and weights[0].is_fine:
        assert not transpose, "gradients.py refuses it"
        return _fine_products(op, lhs, weights, group_sizes, outs, finish, layer)
    weights, scales = zip(*(operand(w, transpose=transpose) for w in weights), strict=True)
    if m == 0:
        return [_zeros(lhs, (0, n), lhs.dtype)] * outs
    interpret = target_platform() == "cpu"
    block = _fit(tuning.blocks(op, m // e, lhs.dtype, interpret=interpret), m, n, k)
    scaled = scales[0] is not None
    if scaled and scales[0].shape[1] > 1 and BLOCK % block.k:
        raise ValueError(f"{op}: blocks of {BLOCK} rows share a scale; tuned for k={block.k}")
    tiles = _tiles(group_sizes, m, block.m, layer, matrices)
    return pl.pallas_call(
        functools.partial(
            _products_kernel, block=block, count=len(weights), scaled=scaled, finish=finish,
            transpose=transpose, shape=(matrices, n, k),
        ),
        grid=(tiles.group.shape[0] * pl.cdiv(n, block.n),),
        out_shape=[like(lhs, (m, n), lhs.dtype)] * outs,
        compiler_params=plgpu.CompilerParams(num_warps=block.warps, num_stages=block.stages),
        interpret=interpret,
        name=f"grouped_matmul_{op.removeprefix('triton_')}{'_transposed' * transpose}",
    )(*tiles, lhs, *weights, *(scales if scaled else ()))  # fmt: skip


def _fine_products(op, lhs, weights, group_sizes, outs, finish, layer):
    """Do `_products` of weights that are made whole tile by tile, exact in bfloat16."""
    (m, k), (e,), (matrices, _, n) = lhs.shape, group_sizes.shape, weights[0].shape
    if m == 0:
        return [_zeros(lhs, (0, n), lhs.dtype)] * outs
    interpret, packed = target_platform() == "cpu", weights[0].packed
    block = _fit(tuning.blocks(op, m // e, lhs.dtype, interpret=interpret), m, n, k)
    if packed:
        if packed < 2 * LEAST:
            raise NotImplementedError(f"{op}: at least {2 * LEAST} rows packed; got {packed}")
        together = min(weights[0].group, packed // 2, MADE)
        block = dataclasses.replace(block, k=max(LEAST, together))
        if block.m > 64:  # every warp makes whole what it multiplies by, and would spill
            block = dataclasses.replace(block, n=min(block.n, 64))
    block = dataclasses.replace(block, k=math.gcd(block.k, k))  # a block ends where rows do
    tiles = _tiles(group_sizes, m, block.m, layer, matrices)
    operands = zip(*(fine_operands(w) for w in weights), strict=True)
    return pl.pallas_call(
        functools.partial(
            _fine_kernel, block=block, count=len(weights), finish=finish, shape=(matrices, n, k),
            packed=packed, group_rows=weights[0].group, has_zeros=weights[0].zeros is not None,
        ),
        grid=(tiles.group.shape[0] * pl.cdiv(n, block.n),),
        out_shape=[like(lhs, (m, n), lhs.dtype)] * outs,
        compiler_params=plgpu.CompilerParams(num_warps=block.warps, num_stages=block.stages),
        interpret=interpret,
        name=f"grouped_matmul_{op.removeprefix('triton_')}_fine",
    )(*tiles, lhs, *(x for xs in operands for x in xs))  # fmt: skip


def _in_reach(weights, layer):
    """`(weights, layer)`: a whole stack as matrices; or a layer's alone, and None."""
    # 2026-11: Pallas-Triton counts elements in 32 bits, with a sign, up to 4 GiB, and in 64 bits
    # above: of bytes it would not reach what lies past 2 GiB.
    parts = [(x.size, x.dtype.itemsize) for x in jax.tree.leaves(weights)]
    if layer is not None and any(1 << 31 < n <= 1 << 32 for n, itemsize in parts if itemsize == 1):
        return stack.one_layer(weights, layer), None
    return [stack.all_matrices(w, layer) for w in weights], layer


def _tiles(group_sizes, rows, tile, layer, matrices):
    """Tiles whose group is that of all matrices; `matrices`: rows past the last group."""
    tiles, (groups_,) = groups.tiles(group_sizes, rows, tile), group_sizes.shape
    if layer is None:
        return tiles
    matrix = stack.matrix_of(tiles.group, groups_, layer)
    return tiles._replace(group=jnp.where(tiles.group < groups_, matrix, matrices))


def _fit(tuned, m, n, k):
    """Limit each block to the power of two that holds its side."""
    sides = {"m": m, "n": n, "k": k}
    whole = {name: max(LEAST, pl.next_power_of_2(size)) for name, size in sides.items()}
    return dataclasses.replace(
        tuned, **{name: min(getattr(tuned, name), size) for name, size in whole.items()}
    )


def _zeros(x, shape, dtype):
    return jnp.zeros(shape, dtype) + jnp.sum(x).astype(dtype) * 0


def _inside(start, block, size):
    """Mask the entries of a block from `start` that exist; None where all blocks are whole."""
    return None if size % block == 0 else start + jnp.arange(block) < size


def _both(rows, columns):
    """Combine the masks of rows and columns; either may be None."""
    rows = None if rows is None else rows[:, None]
    columns = None if columns is None else columns[None, :]
    return rows if columns is None else columns if rows is None else rows & columns


def _read(ref, at, shape, rows, columns, dtype):
    """Load as `dtype`, with 0 for entries that do not exist."""
    mask = _both(rows, columns)
    if mask is None:
        return plgpu.load(ref.at[at]).astype(dtype)
    mask = jnp.broadcast_to(mask, shape)
    if ref.dtype.itemsize > 1:
        return plgpu.load(ref.at[at], mask=mask, other=0).astype(dtype)
    # Pallas-Triton cannot write the 0 of an 8-bit float
    return jnp.where(mask, plgpu.load(ref.at[at], mask=mask).astype(dtype), 0)


def _first(product):
    return (product,)


def _gated(g, u, clamp):
    return gradients.activation(g, u, clamp), g, u


def _place(tile_refs, block, groups_, n):
    """Locate a program: its group, whether that is real, its first row and column, their masks."""
    wide = pl.cdiv(n, block.n)
    tile, column = pl.program_id(0) // wide, pl.program_id(0) % wide * block.n
    group, start, end = (ref[tile] for ref in tile_refs)
    rows = start + jnp.arange(block.m) < end
    columns = _inside(column, block.n, n)
    return jnp.minimum(group, groups_ - 1), group < groups_, start, rows, column, columns


def _products_kernel(*refs, block, count, scaled, finish, transpose, shape):
    tile_refs, lhs_ref, refs = refs[:3], refs[3], refs[4:]
    groups_, n, k = shape
    weight_refs, scale_refs = refs[:count], refs[count : 2 * count] if scaled else ()
    out_refs = refs[count * (1 + scaled) :]
    by_block = scaled and scale_refs[0].shape[1] > 1
    group, real, start, rows, column, columns = _place(tile_refs, block, groups_, n)
    at_columns = pl.ds(column, block.n)

    def scale_of(ref, row):
        at = stack.index(group, ref.shape[0], groups_), pl.ds(row, 1), at_columns
        return _read(ref, at, (1, block.n), None, columns, jnp.float32)

    def step(index, sums):
        at = pl.ds(index * block.k, block.k)
        summed = _inside(index * block.k, block.k, k)
        a = _read(
            lhs_ref, (pl.ds(start, block.m), at), (block.m, block.k), rows, summed, lhs_ref.dtype
        )
        parts = []
        for i, ref in enumerate(weight_refs):
            if transpose:
                where, size = (group, at_columns, at), (block.n, block.k)
                w = _read(ref, where, size, columns, summed, a.dtype)
            else:
                where, size = (group, at, at_columns), (block.k, block.n)
                w = _read(ref, where, size, summed, columns, a.dtype)
            part = dot(a, w, (1, 1 if transpose else 0))
            if by_block:
                part *= scale_of(scale_refs[i], index * block.k // BLOCK)
            parts.append(part)
        return tuple(total + part for total, part in zip(sums, parts, strict=True))

    steps = jnp.where(real, jnp.int32(pl.cdiv(k, block.k)), jnp.int32(0))
    zeros = jnp.zeros((block.m, block.n), jnp.float32)
    sums = jax.lax.fori_loop(0, steps, step, (zeros,) * count)
    if scaled and not by_block:
        sums = [total * scale_of(ref, 0) for total, ref in zip(sums, scale_refs, strict=True)]
    mask = jnp.broadcast_to(_both(rows, columns), zeros.shape)
    for ref, x in zip(out_refs, finish(*sums), strict=False):
        plgpu.store(ref.at[pl.ds(start, block.m), at_columns], x.astype(ref.dtype), mask=mask)


def _fine_kernel(*refs, block, count, finish, shape, packed, group_rows, has_zeros):
    tile_refs, lhs_ref, refs = refs[:3], refs[3], refs[4:]
    groups_, n, k = shape
    in_refs = [refs[i * count : (i + 1) * count] for i in range(3 + has_zeros)]
    out_refs = refs[len(in_refs) * count :]
    value_refs, scale_refs, whole_refs, *zero_refs = in_refs
    group, real, start, rows, column, columns = _place(tile_refs, block, groups_, n)
    at_columns = pl.ds(column, block.n)
    # rows of one scale: a row of scales spreads over them, and nothing is rearranged
    tall = min(group_rows, block.k)
    decode, factor = decoded(value_refs[0].dtype)

    def stored(i, first, dtype):
        where = group, pl.ds(first, tall), at_columns
        return _read(value_refs[i], where, (tall, block.n), None, columns, dtype)

    def product(i, values, first):
        """Multiply by `values`, the rows of a matrix from `first` on."""
        row = jax.lax.div(first, jnp.int32(group_rows))
        where, dtype = (group, pl.ds(row, 1), at_columns), scale_refs[i].dtype
        read_as = jnp.int32 if dtype == jnp.uint8 else jnp.float32
        scales = _read(scale_refs[i], where, (1, block.n), None, columns, read_as)
        scales = from_ue8m0(scales) if dtype == jnp.uint8 else scales
        scales = factor * scales if packed else scales
        for of_zeros in zero_refs:
            zeros = _read(of_zeros[i], where, (1, block.n), None, columns, jnp.int32)
            values = values - zeros.astype(jnp.float32)
        at = pl.ds(start, block.m), pl.ds(first, tall)
        a = _read(lhs_ref, at, (block.m, tall), rows, None, lhs_ref.dtype)
        return dot(a, (values * scales).astype(a.dtype), (1, 0))

    def parts(i, first):
        """Yield products to be added one by one: only so do tensor cores add them."""
        if not packed:
            yield product(i, stored(i, first, jnp.float32), first)
            return
        half = packed // 2
        low = first + jax.lax.div(first, jnp.int32(half)) * half
        both = stored(i, first, jnp.int32)
        yield product(i, decode(both), low)
        yield product(i, decode(both, high=True), low + half)

    def step(index, sums):
        for first in range(0, block.k, tall):
            at = index * block.k + first
            sums = tuple(
                functools.reduce(operator.add, parts(i, at), x) for i, x in enumerate(sums)
            )
        return tuple(sums)

    steps = (k // 2 if packed else k) // block.k
    steps = jnp.where(real, jnp.int32(steps), jnp.int32(0))
    zeros = jnp.zeros((block.m, block.n), jnp.float32)
    sums = jax.lax.fori_loop(0, steps, step, (zeros,) * count)
    at = stack.index(group, whole_refs[0].shape[0], groups_), pl.ds(0, 1), at_columns
    wholes = [_read(ref, at, (1, block.n), None, columns, jnp.float32) for ref in whole_refs]
    sums = [total * x for total, x in zip(sums, wholes, strict=True)]
    mask = jnp.broadcast_to(_both(rows, columns), zeros.shape)
    for ref, x in zip(out_refs, finish(*sums), strict=False):
        plgpu.store(ref.at[pl.ds(start, block.m), at_columns], x.astype(ref.dtype), mask=mask)


def _outer_kernel(start_ref, end_ref, lhs_ref, dout_ref, out_ref, *, block, shape):
    d, f = shape
    wide, tall = pl.cdiv(f, block.n), pl.cdiv(d, block.k)
    index = pl.program_id(0)
    column, row, group = (
        index % wide * block.n,
        index // wide % tall * block.k,
        index // (wide * tall),
    )
    start, end = start_ref[group], end_ref[group]
    at_d, at_f = pl.ds(row, block.k), pl.ds(column, block.n)
    in_d, in_f = _inside(row, block.k, d), _inside(column, block.n, f)

    def step(index, total):
        first = start + index * block.m
        at, rows = pl.ds(first, block.m), first + jnp.arange(block.m) < end
        a = _read(lhs_ref, (at, at_d), (block.m, block.k), rows, in_d, lhs_ref.dtype)
        b = _read(dout_ref, (at, at_f), (block.m, block.n), rows, in_f, lhs_ref.dtype)
        return total + dot(a, b, (0, 0))

    steps = pl.cdiv(end - start, block.m)
    total = jax.lax.fori_loop(0, steps, step, jnp.zeros((block.k, block.n), jnp.float32))
    total, mask = total.astype(out_ref.dtype), _both(in_d, in_f)
    if mask is None:
        plgpu.store(out_ref.at[group, at_d, at_f], total)
    else:
        plgpu.store(out_ref.at[group, at_d, at_f], total, mask=jnp.broadcast_to(mask, total.shape))
