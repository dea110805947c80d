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
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import target_platform
from pallas_kernels.grouped_matmul import gradients, groups, stack, tuning
from pallas_kernels.grouped_matmul.quantized import (
    BLOCK,
    PACKED,
    Quantized,
    decoded,
    fine_operands,
    operand,
)
from pallas_kernels.number_formats import to_float32
from pallas_kernels.online_softmax import dot
from pallas_kernels.varying import like

LANES = 128
SUBLANES = 16  # rows that bfloat16 packs into a register
VMEM_MARGIN = 8 << 20  # room for the compiler beside the blocks


def matmul(lhs, rhs, group_sizes, *, transpose=False, layer=None):
    """`[M, F]`, or with `transpose` `[M, D]` from `[M, F]` and `[E, D, F]`."""
    (out,) = _products(
        "mosaic_matmul", lhs, (rhs,), group_sizes, 1, _first, transpose=transpose, layer=layer
    )
    return out


def swiglu(lhs, gate, up, group_sizes, clamp, *, preactivations, layer=None):
    """`(out, g, u)`; g and u only with `preactivations`."""
    outs = 3 if preactivations else 1
    finish = functools.partial(_gated, clamp=clamp)
    return _products("mosaic_swiglu", lhs, (gate, up), group_sizes, outs, finish, layer=layer)


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
        out_shape=like(lhs, (e, tall, wide), dtype),
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


def _products(op, lhs, weights, group_sizes, outs, finish, *, transpose=False, layer=None):
    """`finish` of the products of `lhs` with each of the weights, one kernel."""
    weights, layer = _unpadded(weights, layer)
    m, (e,), n = lhs.shape[0], group_sizes.shape, weights[0].shape[1 if transpose else 2]
    if m == 0:
        return [_zeros(lhs, (0, n), lhs.dtype)] * outs
    block, interpret = _blocks(op, lhs, e, n)
    if isinstance(weights[0], Quantized) and weights[0].is_fine:
        assert not transpose, "gradients.py refuses it"
        return _fine_products(op, lhs, weights, group_sizes, outs, finish, block, layer)
    operands = [operand(w, transpose=transpose) for w in weights]
    # a row each: Mosaic picks one of them at run time along a major axis only
    scales = [_whole(s, 1)[:, :, None] for _, s in operands if s is not None]
    lhs, weights = _whole(lhs, block.m), [_whole(w, LANES) for w, _ in operands]
    (rows, k), wide = lhs.shape, weights[0].shape[1 if transpose else 2]
    tall = scales[0].shape[1] if scales else 1
    if tall > 1 and tall * BLOCK != k:
        raise ValueError(f"{op}: {tall} blocks of {BLOCK} scales for {k} summed entries")
    visits = groups.visits(group_sizes, rows, block.m, every_group=False)
    plan = _Plan(
        block=block, groups=e, steps=k // block.k, weights=len(weights), outs=outs, finish=finish,
        transpose=transpose, scale_rows=tall if scales else 0,
    )  # fmt: skip
    out = pl.pallas_call(
        functools.partial(_products_kernel, plan=plan),
        grid_spec=_grid(
            block, (wide, visits.total, k // block.k), weights, scales, outs, transpose
        ),
        out_shape=[like(lhs, (rows, wide), lhs.dtype)] * outs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(pltpu.PARALLEL, pltpu.ARBITRARY, pltpu.ARBITRARY),
            vmem_limit_bytes=_vmem(block, lhs.dtype.itemsize, weights, outs, tall),
        ),
        interpret=interpret,
        name=f"grouped_matmul_{op.removeprefix('mosaic_')}{'_transposed' * transpose}",
    )(*_prefetched(visits, e, layer), lhs, *weights, *scales)
    return [x[:m, :n] for x in out]


def _fine_products(op, lhs, weights, group_sizes, outs, finish, block, layer):
    """Do `_products` of weights that are made whole piece by piece on their way in."""
    m, (e,), n = lhs.shape[0], group_sizes.shape, weights[0].shape[2]
    packed, group = weights[0].packed, weights[0].group
    if packed and packed not in (64, 128, PACKED):
        raise NotImplementedError(f"{op}: 64, 128 or {PACKED} rows packed together; got {packed}")
    pieces = 2 if packed else 1
    fine = _Fine(group, packed, weights[0].zeros is not None)
    unit = fine.unit
    k = _round(lhs.shape[1], unit)
    block = dataclasses.replace(block, k=unit // LANES * _divisor(k * LANES // unit, block.k))
    lhs = _whole(lhs, block.m)
    lhs = jnp.pad(lhs, ((0, 0), (0, k - lhs.shape[1])))
    operands = [fine_operands(w) for w in weights]
    values = [_tall(v, k // pieces) for v, *_ in operands]
    scales = [_tall(s, k // group) for _, s, *_ in operands]
    wholes = [_whole(s, 1)[:, :, None] for _, _, s, *_ in operands]
    zeros = [_tall(z, k // group) for _, _, _, *rest in operands for z in rest]
    rows, wide = lhs.shape[0], values[0].shape[2]
    visits = groups.visits(group_sizes, rows, block.m, every_group=False)
    plan = _Plan(
        block=block, groups=e, steps=k // block.k, weights=len(weights), outs=outs, finish=finish,
        scale_rows=1, fine=fine,
    )  # fmt: skip
    grid = wide, visits.total, k // block.k
    heights, small = (block.k // pieces, k // group, k // fine.rows), scales + zeros
    itemsizes = sum(x.dtype.itemsize for x in small)
    of_scales = block.n * (4 * len(small) * heights[2] + 2 * itemsizes * heights[1])
    out = pl.pallas_call(
        functools.partial(_products_kernel, plan=plan),
        grid_spec=_grid(block, grid, values, wholes, outs, False, fine=heights, small=len(small)),
        out_shape=[like(lhs, (rows, wide), lhs.dtype)] * outs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(pltpu.PARALLEL, pltpu.ARBITRARY, pltpu.ARBITRARY),
            vmem_limit_bytes=_vmem(block, lhs.dtype.itemsize, values, outs, 1) + of_scales,
        ),
        interpret=target_platform() == "cpu",
        name=f"grouped_matmul_{op.removeprefix('mosaic_')}_fine",
    )(*_prefetched(visits, e, layer), lhs, *values, *wholes, *small)
    return [x[:m, :n] for x in out]


def _unpadded(weights, layer):
    """`(weights, layer)`: a whole stack as matrices; or, to be padded, a layer's alone and None."""
    first, (tall, wide) = weights[0], weights[0].shape[-2:]
    fine = isinstance(first, Quantized) and first.is_fine
    unit = _Fine(first.group, first.packed, False).unit if fine else LANES
    if tall % unit or wide % LANES:
        return stack.one_layer(weights, layer), None
    return [stack.all_matrices(w, layer) for w in weights], layer


def _prefetched(visits, groups_, layer):
    matrix = stack.matrix_of(visits.group, groups_, layer)
    return visits.group, visits.tile, visits.offsets, matrix


def _tall(x, rows):
    """Pad to `rows` rows, and to whole lanes."""
    return _whole(jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0))), 1)


def _grid(block, grid, weights, scales, outs, transpose, fine=None, small=0):
    """`fine`: rows of values in a step; of scales and zeros, `small` arrays that come after the
    others and whole, as they are stored and as they are made."""
    wide, visits, steps = grid

    def of_weights(n, v, k, group, tile, offsets, matrix):
        return (matrix[v], n, k) if transpose else (matrix[v], k, n)

    def of_scales(n, v, k, group, tile, offsets, matrix):
        return stack.index(matrix[v], scales[0].shape[0], weights[0].shape[0]), 0, 0, n

    def of_fine_scales(n, v, k, group, tile, offsets, matrix):
        return matrix[v], 0, n

    tall = fine[0] if fine else block.k
    matrix = (None, block.n, block.k) if transpose else (None, tall, block.n)
    finer = [pl.BlockSpec((None, fine[1], block.n), of_fine_scales)] if fine else []
    lhs = pl.BlockSpec((block.m, block.k), lambda n, v, k, group, tile, *_: (tile[v], k))
    out = pl.BlockSpec((block.m, block.n), lambda n, v, k, group, tile, *_: (tile[v], n))
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(wide // block.n, visits, steps),
        in_specs=[
            lhs,
            *[pl.BlockSpec(matrix, of_weights) for _ in weights],
            *[pl.BlockSpec((None, s.shape[1], 1, block.n), of_scales) for s in scales],
            *finer * small,
        ],
        out_specs=[out] * outs,
        scratch_shapes=[pltpu.VMEM((fine[2], block.n), jnp.float32) for _ in range(small)]
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


class _Fine(NamedTuple):
    """Weights with a scale for each `group` rows; of 4 bits, `packed` together, else 0."""

    group: int
    packed: int
    has_zeros: bool

    @property
    def rows(self) -> int:
        """Rows that share a scale once those of a step are made: more would not be whole tiles."""
        return min(self.group, 32)

    @property
    def unit(self) -> int:
        """Rows made whole at a time: their values fill lanes, their scales whole tiles of 8."""
        return 2 * LANES if self.packed or LANES // self.rows < 8 else LANES


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """The facts about a kernel of products that are known when it is traced.

    `steps` parts of the summed dimension are visited one after the other. `scale_rows`: 0 without
    scales, 1 for one a channel, else one for each BLOCK of the summed dimension.
    """

    block: tuning.Blocks
    groups: int
    steps: int
    weights: int
    outs: int
    finish: Callable
    scale_rows: int
    transpose: bool = False
    fine: _Fine | None = None


class _Refs(NamedTuple):
    """The kernel's arguments in their order; each tuple has one for each of the weights, or none.

    `matrix` says which of the weights a visit takes. `scales` are of channels or blocks, `fine` of
    groups as they are stored, and zeros after them. Scratch: `made`, `fine` in float32, and `sums`,
    where a product takes several steps.
    """

    group: jax.Ref
    tile: jax.Ref
    offsets: jax.Ref
    matrix: jax.Ref
    lhs: jax.Ref
    weights: tuple[jax.Ref, ...]
    scales: tuple[jax.Ref, ...]
    fine: tuple[jax.Ref, ...]
    outs: tuple[jax.Ref, ...]
    made: tuple[jax.Ref, ...]
    sums: tuple[jax.Ref, ...]

    @classmethod
    def of(cls, refs, plan):
        n = plan.weights
        fine = 1 + plan.fine.has_zeros if plan.fine else 0
        counts = n, n * (plan.scale_rows > 0), n * fine, plan.outs, n * fine, n * (plan.steps > 1)
        rest = iter(refs[5:])
        parts = [tuple(itertools.islice(rest, count)) for count in counts]
        assert next(rest, None) is None
        return cls(*refs[:5], *parts)


def _products_kernel(*refs, plan):
    r, block = _Refs.of(refs, plan), plan.block
    visit, step = pl.program_id(1), pl.program_id(2)
    group, tile = r.group[visit], r.tile[visit]
    by_block = _product_by_block if plan.scale_rows > 1 else _product
    product = functools.partial(_fine_product if plan.fine else by_block, r, plan, step)

    def write(at, columns, own, sums):
        for ref, x in zip(r.outs, plan.finish(*sums), strict=False):
            ref[at, columns] = jnp.where(own, x.astype(ref.dtype), ref[at, columns])

    def column(index, _):
        columns = pl.ds(pl.multiple_of(index * block.columns, block.columns), block.columns)

        def work(at, own):
            sums = [product(i, at, columns) for i in range(plan.weights)]
            if plan.steps == 1:
                write(at, columns, own, sums)
                return
            for ref, part in zip(r.sums, sums, strict=True):
                ref[at, columns] = jnp.where(step == 0, 0.0, ref[at, columns]) + part

            @pl.when(step == plan.steps - 1)
            def _():
                write(at, columns, own, [ref[at, columns] for ref in r.sums])

        _pieces(r.offsets, group, tile, block, work)

    @pl.when(group < plan.groups)
    def _():
        for i, (ref, stored) in enumerate(zip(r.made, r.fine, strict=True)):
            again = plan.fine.group // plan.fine.rows
            if i < plan.weights:
                factor = decoded(r.weights[0].dtype)[1] if plan.fine.packed else 1.0
                small = to_float32(stored[...]) * factor
            else:
                small = stored[...].astype(jnp.int32).astype(jnp.float32)
            ref[...] = small.repeat(again, 0) if again > 1 else small
        jax.lax.fori_loop(0, block.n // block.columns, column, None)

    @pl.when(group == plan.groups)  # rows past the last group
    def _():
        def work(at, own):
            zeros = [jnp.zeros((block.rows, block.n), jnp.float32)] * len(r.outs)
            for ref, x in zip(r.outs, zeros, strict=True):
                ref[at, :] = jnp.where(own, x.astype(ref.dtype), ref[at, :])

        _pieces(r.offsets, group, tile, block, work)


# Each of these multiplies the rows `at` by some columns of the `i`-th weights.


def _product(r, plan, step, i, at, columns):
    """Weights without scales, or with one a channel."""
    weights, transpose = r.weights[i], plan.transpose
    w = weights[columns, :] if transpose else weights[:, columns]
    total = dot(r.lhs[at, :], w.astype(r.lhs.dtype), (1, 1 if transpose else 0))
    return total * r.scales[i][0, :, columns] if plan.scale_rows else total


def _product_by_block(r, plan, step, i, at, columns):
    """Weights with a scale for each BLOCK that is summed: a product and a factor for each."""
    weights, transpose, block = r.weights[i], plan.transpose, plan.block
    blocks = plan.scale_rows // plan.steps

    def add(j, total):
        k = pl.ds(pl.multiple_of(j * BLOCK, BLOCK), BLOCK)
        w = weights[columns, k] if transpose else weights[k, columns]
        part = dot(r.lhs[at, k], w.astype(r.lhs.dtype), (1, 1 if transpose else 0))
        return total + part * r.scales[i][step * blocks + j, :, columns]

    zeros = jnp.zeros((block.rows, block.columns), jnp.float32)
    return jax.lax.fori_loop(0, blocks, add, zeros)


def _fine_product(r, plan, step, i, at, columns):
    """Weights with a scale for each few rows of a column, made whole a unit of rows at a time.

    Of a step of 512 rows, for groups of 32 with 256 packed together: 2 units of 256 rows, each 128
    rows of bytes and 8 rows of scales; step `s` begins at row 16 s of the scales.
    """
    packed, group, unit, block = plan.fine.packed, plan.fine.rows, plan.fine.unit, plan.block
    scales_a_step, scales_a_unit = block.k // group, unit // group
    stored = unit // 2 if packed else unit
    first_scale = step * scales_a_step

    def add(j, total):
        values = r.weights[i][pl.ds(pl.multiple_of(j * stored, stored), stored), columns]
        values = _unpacked(values, packed) if packed else values.astype(jnp.float32)
        first = pl.multiple_of(first_scale + j * scales_a_unit, scales_a_unit)
        scales, *zeros = (
            x[pl.ds(first, scales_a_unit), columns] for x in r.made[i :: plan.weights]
        )
        w = values.reshape(scales_a_unit, group, block.columns)
        for x in zeros:
            w -= x[:, None]
        w *= scales[:, None]
        w = w.reshape(unit, block.columns).astype(r.lhs.dtype)
        a = r.lhs[at, pl.ds(pl.multiple_of(j * unit, unit), unit)]
        return total + dot(a, w, (1, 0))

    zeros = jnp.zeros((block.rows, block.columns), jnp.float32)
    total = jax.lax.fori_loop(0, block.k // unit, add, zeros)
    return total * r.scales[i][0, :, columns]


def _unpacked(values, packed):
    """Unpack bytes `[R, C]` to their values by a factor (`decoded`), float32 `[2 R, C]`."""
    both, half = values.astype(jnp.int32), packed // 2
    decode, _ = decoded(values.dtype)
    parts = [both[i : i + half] for i in range(0, both.shape[0], half)]
    return jnp.concatenate([decode(x, high=h) for x in parts for h in (False, True)])


def _outer_kernel(group_ref, tile_ref, offsets_ref, lhs_ref, dout_ref, out_ref, sum_ref, *, block):
    visit, last = pl.program_id(2), pl.num_programs(2) - 1
    group, tile = group_ref[visit], tile_ref[visit]

    @pl.when((visit == 0) | (group_ref[jnp.maximum(visit - 1, 0)] != group))
    def _():
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    def work(at, own):
        a = jnp.where(own, lhs_ref[at, :], 0)

        def column(index, _):
            columns = pl.ds(pl.multiple_of(index * block.columns, block.columns), block.columns)
            # rows of other groups may hold anything, and 0 * NaN is NaN: both sides are masked
            b = jnp.where(own, dout_ref[at, columns], 0)
            sum_ref[:, columns] += dot(a, b, (0, 0))

        jax.lax.fori_loop(0, block.n // block.columns, column, None)

    _pieces(offsets_ref, group, tile, block, work)

    @pl.when((visit == last) | (group_ref[jnp.minimum(visit + 1, last)] != group))
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)
