# SPDX-License-Identifier: Apache-2.0
"""Grouped matmul for TPUs, through Pallas and Mosaic.

The grid walks visits: a group and an aligned tile that holds rows of it, group after group, so
that a group's weights are fetched once and a tile stays in VMEM until its last group is done.
Inside a visit only the pieces of the tile that hold rows of the group are multiplied. The number
of visits is known on the device alone and is the grid's bound. Interpreted on CPU; inside
`shard_map` the interpreter needs the caller's `check_vma=False`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import target_platform
from pallas_kernels.grouped_matmul import gradients, groups, tuning
from pallas_kernels.grouped_matmul.narrow import four_times_e2m1, to_float32
from pallas_kernels.grouped_matmul.quantized import (
    BLOCK,
    PACKED,
    Quantized,
    fine_operands,
    operand,
)
from pallas_kernels.online_softmax import dot

LANES = 128
SUBLANES = 16  # rows that bfloat16 packs into a register
VMEM_MARGIN = 8 << 20  # room for the compiler beside the blocks


def matmul(lhs, rhs, group_sizes, *, transpose=False):
    """`[M, F]`, or with `transpose` `[M, D]` from `[M, F]` and `[E, D, F]`."""
    (out,) = _products("mosaic_matmul", lhs, (rhs,), group_sizes, 1, _first, transpose=transpose)
    return out


def swiglu(lhs, gate, up, group_sizes, clamp, *, preactivations):
    """`(out, g, u)`; g and u only with `preactivations`."""
    outs = 3 if preactivations else 1
    finish = functools.partial(_gated, clamp=clamp)
    return _products("mosaic_swiglu", lhs, (gate, up), group_sizes, outs, finish)


def outer(lhs, dout, group_sizes, dtype):
    """`lhs.T @ dout` of each group's rows, `[E, D, F]`; 0 for an empty group."""
    (m, d), f, e = lhs.shape, dout.shape[1], group_sizes.shape[0]
    if m == 0:
        return _zeros(lhs, (e, d, f), dtype)
    block, interpret = _blocks("mosaic_outer", lhs, e, f)
    lhs, dout = _whole(lhs, block.m), _whole(dout.astype(lhs.dtype), block.m)
    tall, wide = lhs.shape[1], dout.shape[1]
    visits = groups.visits(group_sizes, m, block.m, every_group=True)
    itemsize = lhs.dtype.itemsize
    out = pl.pallas_call(
        functools.partial(_outer_kernel, block=block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(tall // block.k, wide // block.n, visits.total),
            in_specs=[
                pl.BlockSpec((block.m, block.k), lambda i, j, v, group, tile, _: (tile[v], i)),
                pl.BlockSpec((block.m, block.n), lambda i, j, v, group, tile, _: (tile[v], j)),
            ],
            out_specs=pl.BlockSpec(
                (None, block.k, block.n), lambda i, j, v, group, tile, _: (group[v], i, j)
            ),
            scratch_shapes=[pltpu.VMEM((block.k, block.n), jnp.float32)],
        ),
        out_shape=_like(lhs, (e, tall, wide), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(pltpu.PARALLEL, pltpu.PARALLEL, pltpu.ARBITRARY),
            vmem_limit_bytes=VMEM_MARGIN
            + 2 * block.m * (block.k + block.n) * itemsize
            + block.k * block.n * (12 + 2 * jnp.dtype(dtype).itemsize),
        ),
        interpret=interpret,
        name="grouped_matmul_outer",
    )(visits.group, visits.tile, visits.offsets, lhs, dout)
    return out[:, :d, :f]


def _products(op, lhs, weights, group_sizes, outs, finish, *, transpose=False):
    """Multiply `lhs` with each of the weights and apply `finish`, in one kernel."""
    m, e, n = lhs.shape[0], weights[0].shape[0], weights[0].shape[1 if transpose else 2]
    if m == 0:
        return [_zeros(lhs, (0, n), lhs.dtype)] * outs
    block, interpret = _blocks(op, lhs, e, n)
    if isinstance(weights[0], Quantized) and weights[0].is_fine:
        assert not transpose, "gradients.py refuses it"
        return _fine_products(op, lhs, weights, group_sizes, outs, finish, block)
    operands = [operand(w, transpose=transpose) for w in weights]
    # a row each: Mosaic picks one of them at run time along a major axis only
    scales = [_whole(s, 1)[:, :, None] for _, s in operands if s is not None]
    lhs, weights = _whole(lhs, block.m), [_whole(w, LANES) for w, _ in operands]
    (rows, k), wide = lhs.shape, weights[0].shape[1 if transpose else 2]
    tall = scales[0].shape[1] if scales else 1
    if tall > 1 and tall * BLOCK != k:
        raise ValueError(f"{op}: {tall} blocks of {BLOCK} scales for {k} summed entries")
    visits = groups.visits(group_sizes, rows, block.m, every_group=False)
    kernel = functools.partial(
        _products_kernel, block=block, count=len(weights), tall=tall, finish=finish,
        transpose=transpose, groups_=e, scaled=bool(scales), steps=k // block.k,
    )  # fmt: skip
    out = pl.pallas_call(
        kernel,
        grid_spec=_grid(
            block, (wide, visits.total, k // block.k), e, weights, scales, outs, transpose
        ),
        out_shape=[_like(lhs, (rows, wide), lhs.dtype)] * outs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(pltpu.PARALLEL, pltpu.ARBITRARY, pltpu.ARBITRARY),
            vmem_limit_bytes=_vmem(block, lhs.dtype.itemsize, weights, outs, tall),
        ),
        interpret=interpret,
        name=f"grouped_matmul_{op.removeprefix('mosaic_')}{'_transposed' * transpose}",
    )(visits.group, visits.tile, visits.offsets, lhs, *weights, *scales)
    return [x[:m, :n] for x in out]


def _fine_products(op, lhs, weights, group_sizes, outs, finish, block):
    """Do `_products` of weights that are widened piece by piece on their way in."""
    m, (e, _, n) = lhs.shape[0], weights[0].shape
    packed, group = weights[0].packed, weights[0].group
    if packed and packed not in (64, 128, PACKED):
        raise NotImplementedError(f"{op}: 64, 128 or {PACKED} rows packed together; got {packed}")
    pieces = 2 if packed else 1
    unit = _unit(group, packed)
    k = _round(lhs.shape[1], unit)
    block = dataclasses.replace(block, k=unit // LANES * _divisor(k * LANES // unit, block.k))
    lhs = _whole(lhs, block.m)
    lhs = jnp.pad(lhs, ((0, 0), (0, k - lhs.shape[1])))
    operands = [fine_operands(w) for w in weights]
    values = [_tall(v, k // pieces) for v, _, _ in operands]
    scales = [_tall(s, k // group) for _, s, _ in operands]
    wholes = [_whole(s, 1)[:, :, None] for *_, s in operands]
    rows, wide = lhs.shape[0], values[0].shape[2]
    visits = groups.visits(group_sizes, rows, block.m, every_group=False)
    kernel = functools.partial(
        _products_kernel, block=block, count=len(weights), tall=1, finish=finish, transpose=False,
        groups_=e, scaled=True, steps=k // block.k, fine=(group, packed),
    )  # fmt: skip
    grid = wide, visits.total, k // block.k
    of_scales = len(weights) * (k // group) * block.n * (4 + 2 * scales[0].dtype.itemsize)
    out = pl.pallas_call(
        kernel,
        grid_spec=_grid(
            block, grid, e, values, wholes, outs, False, fine=(block.k // pieces, k // group)
        ),
        out_shape=[_like(lhs, (rows, wide), lhs.dtype)] * outs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(pltpu.PARALLEL, pltpu.ARBITRARY, pltpu.ARBITRARY),
            vmem_limit_bytes=_vmem(block, lhs.dtype.itemsize, values, outs, 1) + of_scales,
        ),
        interpret=target_platform() == "cpu",
        name=f"grouped_matmul_{op.removeprefix('mosaic_')}_fine",
    )(visits.group, visits.tile, visits.offsets, lhs, *values, *wholes, *scales)
    return [x[:m, :n] for x in out]


def _tall(x, rows):
    """Pad to `rows` rows, and to whole lanes."""
    return _whole(jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0))), 1)


def _grid(block, grid, groups_, weights, scales, outs, transpose, fine=None):
    """Make the grid and its block specs.

    `fine`: rows of values in a step, and of scales, which come last and whole.
    """
    wide, visits, steps = grid

    def of_weights(n, v, k, group, *_):
        g = jnp.minimum(group[v], groups_ - 1)  # rows past the last group use no weights
        return (g, n, k) if transpose else (g, k, n)

    def of_scales(n, v, k, group, *_):
        return jnp.minimum(group[v], groups_ - 1), 0, 0, n

    def of_fine_scales(n, v, k, group, *_):
        return jnp.minimum(group[v], groups_ - 1), 0, n

    tall = fine[0] if fine else block.k
    matrix = (None, block.n, block.k) if transpose else (None, tall, block.n)
    finer = [pl.BlockSpec((None, fine[1], block.n), of_fine_scales)] if fine else []
    lhs = pl.BlockSpec((block.m, block.k), lambda n, v, k, group, tile, _: (tile[v], k))
    out = pl.BlockSpec((block.m, block.n), lambda n, v, k, group, tile, _: (tile[v], n))
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(wide // block.n, visits, steps),
        in_specs=[
            lhs,
            *[pl.BlockSpec(matrix, of_weights) for _ in weights],
            *[pl.BlockSpec((None, s.shape[1], 1, block.n), of_scales) for s in scales],
            *finer * len(weights),
        ],
        out_specs=[out] * outs,
        scratch_shapes=[pltpu.VMEM((fine[1], block.n), jnp.float32) for _ in finer * len(weights)]
        + [pltpu.VMEM((block.m, block.n), jnp.float32)] * (len(weights) if steps > 1 else 0),
    )


def _vmem(block, itemsize, weights, outs, tall):
    """Bytes of VMEM: two of each block, sums, a column of weights in two more types, a margin."""
    matrices = 2 * block.k * block.n * weights[0].dtype.itemsize + block.k * block.columns * 8
    sums = 4 * block.m * block.n + 8 * tall * block.n
    rows = 2 * block.m * (block.k + outs * block.n) * itemsize
    return VMEM_MARGIN + rows + len(weights) * (matrices + sums)


def _blocks(op, lhs, groups_, n):
    """The tuned blocks, none beyond its side, each dividing the side in whole lanes."""
    interpret = target_platform() == "cpu"
    m, k = lhs.shape
    tuned = tuning.blocks(op, m // groups_, lhs.dtype, interpret=interpret)
    rows = min(tuned.rows, _round(m, SUBLANES))
    wide = _divisor(_round(n, LANES), tuned.n)
    fitted = dataclasses.replace(
        tuned,
        m=min(tuned.m, _round(m, rows)),
        n=wide,
        k=_divisor(_round(k, LANES), tuned.k),
        rows=rows,
        columns=_divisor(wide, tuned.columns),
    )
    return fitted, interpret


def _round(size, multiple):
    return pl.cdiv(size, multiple) * multiple


def _divisor(size, most):
    """The largest divisor in whole lanes that is not above `most`; `size` is in whole lanes."""
    lanes = size // LANES
    fitting = [i for i in range(1, max(1, most // LANES) + 1) if lanes % i == 0]
    return LANES * fitting[-1]


def _whole(x, rows):
    """Pad with zeros to whole lanes and a multiple of `rows`: a copy only for odd shapes."""
    *_, m, k = x.shape
    sides = [(0, 0)] * (x.ndim - 2) + [(0, _round(m, rows) - m), (0, _round(k, LANES) - k)]
    return jnp.pad(x, sides) if any(high for _, high in sides) else x


def _like(x, shape, dtype):
    # inside shard_map an output varies over the axes that the inputs vary over
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def _zeros(x, shape, dtype):
    return jnp.zeros(shape, dtype) + jnp.sum(x).astype(dtype) * 0


def _first(product):
    return (product,)


def _gated(g, u, clamp):
    return gradients.activation(g, u, clamp), g, u


def _pieces(offsets_ref, group, tile, block, work):
    """Run `work(rows of the tile, mask of the group's rows)` for the pieces that have any."""
    low = jnp.maximum(offsets_ref[group] - tile * block.m, 0)
    high = jnp.minimum(offsets_ref[group + 1] - tile * block.m, block.m)

    def piece(i, _):
        first = pl.multiple_of(i * block.rows, block.rows)
        row = first + jax.lax.broadcasted_iota(jnp.int32, (block.rows, 1), 0)
        work(pl.ds(first, block.rows), (row >= low) & (row < high))

    jax.lax.fori_loop(low // block.rows, pl.cdiv(high, block.rows), piece, None)


def _products_kernel(
    group_ref, tile_ref, offsets_ref, lhs_ref, *refs, block, count, scaled, steps, tall, finish,
    transpose, groups_, fine=None,
):  # fmt: skip
    by_block, per_step = tall > 1, tall // steps
    weight_refs, scale_refs = refs[:count], refs[count : count * (1 + scaled)]
    sum_refs = refs[len(refs) - count :] if steps > 1 else ()
    given = count * (1 + scaled + bool(fine))
    made_refs = refs[len(refs) - len(sum_refs) - count : len(refs) - len(sum_refs)] if fine else ()
    out_refs = refs[given : len(refs) - len(sum_refs) - len(made_refs)]
    visit, step = pl.program_id(1), pl.program_id(2)
    group, tile = group_ref[visit], tile_ref[visit]

    def product(i, at, columns):
        if fine:
            first = step * (block.k // fine[0])
            total = _fine_product(
                lhs_ref, weight_refs[i], made_refs[i], first, at, columns, block, *fine
            )
            return total * scale_refs[i][0, :, columns]
        if not by_block:
            w = weight_refs[i][columns, :] if transpose else weight_refs[i][:, columns]
            total = dot(lhs_ref[at, :], w.astype(lhs_ref.dtype), (1, 1 if transpose else 0))
            return total * scale_refs[i][0, :, columns] if scaled else total

        def add(j, total):
            k = pl.ds(pl.multiple_of(j * BLOCK, BLOCK), BLOCK)
            w = weight_refs[i][columns, k] if transpose else weight_refs[i][k, columns]
            part = dot(lhs_ref[at, k], w.astype(lhs_ref.dtype), (1, 1 if transpose else 0))
            return total + part * scale_refs[i][step * per_step + j, :, columns]

        zeros = jnp.zeros((block.rows, block.columns), jnp.float32)
        return jax.lax.fori_loop(0, per_step, add, zeros)

    def write(at, columns, mine, sums):
        for ref, x in zip(out_refs, finish(*sums), strict=False):
            ref[at, columns] = jnp.where(mine, x.astype(ref.dtype), ref[at, columns])

    def column(index, _):
        columns = pl.ds(pl.multiple_of(index * block.columns, block.columns), block.columns)

        def work(at, mine):
            sums = [product(i, at, columns) for i in range(count)]
            if steps == 1:
                write(at, columns, mine, sums)
                return
            for ref, part in zip(sum_refs, sums, strict=True):
                ref[at, columns] = jnp.where(step == 0, 0.0, ref[at, columns]) + part

            @pl.when(step == steps - 1)
            def _():
                write(at, columns, mine, [ref[at, columns] for ref in sum_refs])

        _pieces(offsets_ref, group, tile, block, work)

    @pl.when(group < groups_)
    def _():
        for ref, narrow in zip(made_refs, refs[2 * count : 3 * count], strict=False):
            ref[...] = to_float32(narrow[...]) * (0.25 if fine[1] else 1.0)  # four_times_e2m1
        jax.lax.fori_loop(0, block.n // block.columns, column, None)

    @pl.when(group == groups_)  # rows past the last group
    def _():
        def work(at, mine):
            zeros = [jnp.zeros((block.rows, block.n), jnp.float32)] * len(out_refs)
            for ref, x in zip(out_refs, zeros, strict=True):
                ref[at, :] = jnp.where(mine, x.astype(ref.dtype), ref[at, :])

        _pieces(offsets_ref, group, tile, block, work)


def _fine_product(lhs_ref, value_ref, scale_ref, first_scale, at, columns, block, group, packed):
    """Multiply a piece of the rows with a column of weights."""
    unit = _unit(group, packed)
    each, tall = unit // group, unit // 2 if packed else unit

    def add(j, total):
        values = value_ref[pl.ds(pl.multiple_of(j * tall, tall), tall), columns]
        values = _unpacked(values, packed) if packed else values.astype(jnp.float32)
        first = pl.multiple_of(first_scale + j * each, each)
        scales = scale_ref[pl.ds(first, each), columns]
        w = values.reshape(each, group, block.columns) * scales[:, None]
        w = w.reshape(unit, block.columns).astype(lhs_ref.dtype)
        a = lhs_ref[at, pl.ds(pl.multiple_of(j * unit, unit), unit)]
        return total + dot(a, w, (1, 0))

    zeros = jnp.zeros((block.rows, block.columns), jnp.float32)
    return jax.lax.fori_loop(0, block.k // unit, add, zeros)


def _unit(group, packed):
    """Rows that are widened at a time: their values fill lanes, their scales whole tiles of 8."""
    return 2 * LANES if packed or LANES // group < 8 else LANES


def _unpacked(values, packed):
    """Unpack bytes `[R, C]` to 4 times their values, float32 `[2 R, C]`."""
    both, half = values.astype(jnp.int32), packed // 2
    parts = [both[i : i + half] for i in range(0, both.shape[0], half)]
    return jnp.concatenate([four_times_e2m1(x, high=h) for x in parts for h in (False, True)])


def _outer_kernel(group_ref, tile_ref, offsets_ref, lhs_ref, dout_ref, out_ref, sum_ref, *, block):
    visit, last = pl.program_id(2), pl.num_programs(2) - 1
    group, tile = group_ref[visit], tile_ref[visit]

    @pl.when((visit == 0) | (group_ref[jnp.maximum(visit - 1, 0)] != group))
    def _():
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    def work(at, mine):
        a = jnp.where(mine, lhs_ref[at, :], 0)

        def column(index, _):
            columns = pl.ds(pl.multiple_of(index * block.columns, block.columns), block.columns)
            # rows of other groups may hold anything, and 0 * NaN is NaN: both sides are masked
            b = jnp.where(mine, dout_ref[at, columns], 0)
            sum_ref[:, columns] += dot(a, b, (0, 0))

        jax.lax.fori_loop(0, block.n // block.columns, column, None)

    _pieces(offsets_ref, group, tile, block, work)

    @pl.when((visit == last) | (group_ref[jnp.minimum(visit + 1, last)] != group))
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)
