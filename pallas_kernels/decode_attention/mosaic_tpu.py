# SPDX-License-Identifier: Apache-2.0
"""Decode attention for TPUs, through Pallas and Mosaic.

A block of the cache is used as it lies in memory: one matrix of `tokens * KV heads` rows, `[R, H]`.
One product scores every query head against every row; of its K bands of rows only that is kept
which belongs to a column's KV head, so that the scores of all heads fill one dense array
`[rows, R]` in which lane `l` is of head `l % K`. A maximum or sum per head is one over lanes that
are K apart: a few rotations. On the way back the weights are spread over K bands, zero elsewhere,
and one product with the values yields every head. The matrix unit multiplies K times what it must
and has the time: a decode step waits for memory.

The grid is `(batch, worker, step)`: workers share the list of blocks that are needed, the rest is
not fetched. Interpreted on CPU; inside `shard_map` the interpreter needs the caller's
`check_vma=False`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import online_softmax
from pallas_kernels.decode_attention import rows, tuning
from pallas_kernels.dispatch import target_platform
from pallas_kernels.flash_attention import blocks as tiles
from pallas_kernels.flash_attention.mask import NO_POSITION, PAD_POSITION
from pallas_kernels.online_softmax import dot

LANES = 128
SUBLANES = 8
CHUNK = 512
"""Rows of the cache in one product: more scores than these spill."""
VMEM_BYTES = 48 << 20


def forward(q, k, v, k_scale, v_scale, q_pos, kv_pos, *, mask, soft_cap, scale):
    tuning.unsupported("mosaic_tpu", q, v)
    kv_heads = k.shape[2]
    if LANES % kv_heads:
        raise NotImplementedError(
            f"decode_attention mosaic_tpu: a number of KV heads that divides {LANES}; got "
            f"{kv_heads}; use implementation='xla' or 'reference'"
        )
    t = q.shape[1]
    call = _Call(q, k, v, q_pos, kv_pos, mask)
    queries = rows.together(q, kv_heads)
    real = queries.shape[2]
    row_pos = tiles.pad_axis(rows.positions(q_pos, real // t), call.rows, 1, NO_POSITION)
    scales = (
        []
        if k_scale is None
        else [call.tokens(tiles.pad_axis(x, call.slots_there, 2)) for x in (k_scale, v_scale)]
    )
    kernel = functools.partial(_kernel, call=call, mask=mask, soft_cap=soft_cap, scale=scale)
    out, lse = call(
        kernel,
        [
            (row_pos[..., None], pl.BlockSpec((None, call.rows, 1), lambda b, *_: (b, 0, 0))),
            call.tokens(tiles.pad_axis(kv_pos, call.blocks * call.width, 1, PAD_POSITION)[:, None]),
            call.queries(queries),
            call.slots(k),
            call.slots(v),
            *scales,
        ],
    )
    # [workers, B, K, rows, V] and [workers, B, K, rows]
    out = out.reshape(*out.shape[:2], kv_heads, call.rows, -1)[..., :real, :]
    lse = lse[..., :kv_heads].swapaxes(2, 3)[..., :real]
    out, lse = online_softmax.merge_stacked(out, lse)
    return rows.apart(out, t), rows.apart(lse, t)


class _Call:
    """The kernel on one set of shapes: block sizes, padding, index maps and the list of blocks.

    `rows` are queries of one KV head; `width` tokens are `block` rows of the cache, `sub` of them
    those of a loop's body.
    """

    def __init__(self, q, k, v, q_pos, kv_pos, mask):
        self.interpret = target_platform() == "cpu"
        self.batch, slots, self.kv_heads, h = k.shape
        self.hv = v.shape[3]
        tuned = tuning.blocks("mosaic", max(h, self.hv), q.dtype, interpret=self.interpret)
        # the cache is never padded, unless it is shorter than the shortest block
        self.slots_there = max(slots, LANES)
        most = max(LANES, tuned.rows // self.kv_heads // LANES * LANES)
        self.width = tokens = min(most, self.slots_there // LANES * LANES)
        self.block = tokens * self.kv_heads
        self.sub = math.gcd(tuned.sub, self.block)
        self.chunk = math.gcd(CHUNK, self.sub)
        self.blocks = pl.cdiv(self.slots_there, tokens)
        self.ragged = self.slots_there % tokens * self.kv_heads  # rows of the last block, or 0
        group_rows = q.shape[1] * (q.shape[2] // self.kv_heads)
        # bands of whole tiles: 8 rows, and of bfloat16 16 over all bands
        least = SUBLANES if self.kv_heads > 1 else 2 * SUBLANES
        self.rows = pl.cdiv(group_rows, least) * least
        self.order, self.counts = rows.block_list(mask, q_pos, kv_pos, tokens)
        self.workers = min(tuned.splits, self.blocks)
        # the longest list, dealt evenly; at least one step, which writes the results
        self.steps = jnp.maximum(1, pl.cdiv(self.counts[:, 1].max(), self.workers))
        self.varies = jax.typeof(q).manual_axis_type  # inside shard_map, as the inputs vary

    def fetched(self, b, worker, step, order, counts):
        """The block to have at hand: beyond the list its last one, which is there."""
        at = jnp.clip(worker * counts[2 * self.batch] + step, 0, counts[2 * b + 1] - 1)
        return order[b * self.blocks + jnp.maximum(at, 0)]

    def each_part(self, part, carry):
        """`part(begin, carry)` over the block; a loop keeps the program and its compiling small."""
        parts = self.block // self.sub
        if parts == 1:
            return part(0, carry)
        return jax.lax.fori_loop(0, parts, lambda i, carry: part(i * self.sub, carry), carry)

    def tokens(self, x):
        """`[B, 1 or K, S]`, a number a token."""
        return x, pl.BlockSpec(
            (None, x.shape[1], self.width), lambda *at: (at[0], 0, self.fetched(*at))
        )

    def slots(self, x):
        """The cache as it lies: this reshape moves nothing on a TPU."""
        x = tiles.pad_axis(x, self.slots_there, 1)
        x = x.reshape(self.batch, -1, x.shape[3])
        return x, pl.BlockSpec(
            (1, self.block, x.shape[2]), lambda *at: (at[0], self.fetched(*at), 0)
        )

    def queries(self, x):
        """`[B, K, rows, H]` as K bands of rows."""
        x = tiles.pad_axis(x, self.rows, 2).reshape(self.batch, -1, x.shape[3])
        return x, pl.BlockSpec((None, *x.shape[1:]), lambda b, *_: (b, 0, 0))

    def __call__(self, kernel, inputs):
        arrays, in_specs = zip(*inputs, strict=True)
        bands = self.kv_heads * self.rows
        shapes = (bands, self.hv), (self.rows, LANES)
        lanes = self.block // LANES, LANES
        scales = [pltpu.VMEM(lanes, jnp.float32)] * (len(inputs) - 5)
        counts = jnp.append(self.counts.reshape(-1), self.steps)
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(self.batch, self.workers, self.steps),
                in_specs=in_specs,
                out_specs=[
                    pl.BlockSpec((None, None, *shape), lambda b, worker, *_: (worker, b, 0, 0))
                    for shape in shapes
                ],
                scratch_shapes=[
                    *(
                        pltpu.VMEM(shape, jnp.float32)
                        for shape in (shapes[0], shapes[1], shapes[1], (self.rows, self.block))
                    ),
                    pltpu.VMEM(lanes, jnp.int32),
                    *scales,
                ],
            ),
            out_shape=[
                jax.ShapeDtypeStruct(
                    (self.workers, self.batch, *shape), jnp.float32, manual_axis_type=self.varies
                )
                for shape in shapes
            ],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=(pltpu.PARALLEL, pltpu.PARALLEL, pltpu.ARBITRARY),
                vmem_limit_bytes=VMEM_BYTES,
            ),
            interpret=self.interpret,
            name="decode_attention",
        )(self.order.reshape(-1), counts, *arrays)


def _kernel(order, counts, q_pos, kv_pos, q, k, v, *refs, call, mask, soft_cap, scale):
    scaled = len(refs) > 7
    scales, (out, lse, acc, high, total, s_ref, pos_lanes, *scale_lanes) = (
        (refs[:2], refs[2:]) if scaled else ((), refs)
    )
    b, worker, step = (pl.program_id(axis) for axis in range(3))
    at = worker * counts[2 * call.batch] + step
    some = at < counts[2 * b + 1]
    every = at < counts[2 * b]

    def lanes_of(ref, begin):
        """`[1, 128]` from `begin` on of what was laid out along lanes."""
        return ref[pl.ds(begin // LANES, 1), :]

    def along(refs, begin):
        return jnp.concatenate([lanes_of(refs, begin + x) for x in range(0, call.chunk, LANES)], 1)

    @pl.when(step == 0)
    def start():
        acc[...] = jnp.zeros(acc.shape, jnp.float32)
        high[...] = jnp.full(high.shape, -jnp.inf, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)

    def score(masked):
        def part(begin, least):
            for offset in range(0, call.sub, call.chunk):
                lanes = pl.ds(pl.multiple_of(begin + offset, call.chunk), call.chunk)
                s = dot(q[...], _rows(k, lanes, q.dtype), (1, 1))
                s = _own_bands(s, call)
                if scaled:
                    s *= along(scale_lanes[0], begin + offset)
                s, _ = online_softmax.scores(s, scale, soft_cap)
                if masked:
                    seen = tiles.visible(mask, [q_pos[...]], [along(pos_lanes, begin + offset)])
                    s = jnp.where(seen, s, -jnp.inf)
                s_ref[:, lanes] = s
                least = functools.reduce(jnp.maximum, _tiles(s), least)
            return least

        return part

    def weigh(masked, shift):
        def part(begin, carry):
            sums, added = carry
            for offset in range(0, call.sub, call.chunk):
                lanes = pl.ds(pl.multiple_of(begin + offset, call.chunk), call.chunk)
                parts = [jnp.exp2(tile - shift) for tile in _tiles(s_ref[:, lanes])]
                sums = functools.reduce(jnp.add, parts, sums)
                p = jnp.concatenate(parts, axis=1)
                if scaled:
                    scales_there = along(scale_lanes[1], begin + offset)
                    p = jnp.where(p > 0, p * scales_there, 0.0) if masked else p * scales_there
                values = _rows(v, lanes, q.dtype)
                if masked and call.ragged:  # what lies behind the cache may be NaN
                    row = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) + begin + offset
                    last = order[b * call.blocks + at] == call.blocks - 1
                    values = jnp.where((row < call.ragged) | ~last, values, jnp.zeros_like(values))
                added += dot(_spread(p, call, q.dtype), values, (1, 0))
            return sums, added

        return part

    def work(masked):
        _spread_tokens([*scales, *[kv_pos] * masked], [*scale_lanes, *[pos_lanes] * masked], call)
        m = _over_heads(call.each_part(score(masked), high[...]), jnp.maximum, call.kv_heads)
        shift = jnp.where(m == -jnp.inf, 0.0, m)
        alpha = jnp.exp2(high[...] - shift)
        high[...] = m
        start = total[...] * alpha, acc[...] * _bands(alpha, call)
        total[...], acc[...] = call.each_part(weigh(masked, shift), start)

    pl.when(every)(lambda: work(False))
    pl.when(some & ~every)(lambda: work(True))

    @pl.when(step == pl.num_programs(2) - 1)
    def finish():
        whole = _over_heads(total[...], jnp.add, call.kv_heads)
        inverse, lse[...] = online_softmax.finish(high[...], whole)
        out[...] = acc[...] * _bands(inverse, call)


def _rows(ref, rows, dtype):
    """Rows of the cache in `dtype`; `rows` begin at a multiple of their number."""
    if ref.dtype.itemsize > 1:
        return ref[0, rows, :].astype(dtype)
    # 2026-11: loads of 8-bit rows fetch a quarter of a register each on v6e and tpu7x
    size = rows.size // 4
    words = ref.bitcast(jnp.int32)[0, pl.ds(pl.multiple_of(rows.start // 4, size), size), :]
    return pltpu.bitcast(words, ref.dtype).astype(dtype)


def _spread_tokens(sources, targets, call):
    """Lay `[1 or K, tokens]` out as the rows of the cache lie, 128 of them a line."""
    k = call.kv_heads

    def group(i, _):
        at = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
        for source, target in zip(sources, targets, strict=True):
            x = source[:, at].astype(target.dtype)
            if k > 1:
                x = jnp.concatenate([x] * (max(k, SUBLANES) // x.shape[0]), axis=0)
                x = _repeat(x, k) if source.shape[0] == 1 else _interleave(x, k)
            target[pl.ds(i * k, k), :] = x[:k]

    groups = call.width // LANES
    jax.lax.fori_loop(0, groups, group, None, unroll=groups <= 16)


def _repeat(x, k):
    """Line `j` of `k`: each of the tokens `[j * 128 / k, ...)` of 128, k times."""
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))
    return _gather(x, LANES // k * (row % k) + lane // k)


def _interleave(x, k):
    """`[K, 128]` of 128 tokens as `K` lines of tokens by heads: `[j, l]` is `x[l % K, ...]`.

    A permutation of the entries: within rows, then within columns, then within rows.
    """
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))
    token, turn = lane // k, lane % k
    x = _gather(x, LANES // k * ((row - turn) % k) + token)
    distance = 1
    while distance < k:  # up by `turn` rows
        x = jnp.where(turn & distance > 0, pltpu.roll(x, x.shape[0] - distance, 0), x)
        distance *= 2
    return _gather(x, token * k + (turn - row) % k)


def _gather(x, index):
    return jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")


def _tiles(x):
    return [x[:, begin : begin + LANES] for begin in range(0, x.shape[1], LANES)]


def _head(shape, kv_heads):
    """The KV head of each lane."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1) & (kv_heads - 1)


def _own_bands(s, call):
    """`[K * rows, R] -> [rows, R]`: of each column the band of its own head."""
    head = _head((call.rows, LANES), call.kv_heads)
    kept = []
    for tile in _tiles(s):  # tile by tile: every one has the same masks
        own = tile[: call.rows]
        for i in range(1, call.kv_heads):
            own = jnp.where(head == i, tile[i * call.rows : (i + 1) * call.rows], own)
        kept.append(own)
    return jnp.concatenate(kept, axis=1)


def _spread(p, call, dtype):
    """Undo `_own_bands`, with zeros elsewhere, in `dtype`.

    Masked as words of two bfloat16 rows each: one pack and one AND where a select needs three.
    """
    if call.kv_heads == 1:
        return p.astype(dtype)
    packed = 4 // jnp.dtype(dtype).itemsize
    shape = call.kv_heads * call.rows // packed, LANES
    band = jax.lax.broadcasted_iota(jnp.int32, shape, 0) // (call.rows // packed)
    own = jnp.where(_head(shape, call.kv_heads) == band, -1, 0)
    spread = []
    for tile in _tiles(p):
        every = jnp.concatenate([tile] * call.kv_heads, axis=0).astype(dtype)
        spread.append(pltpu.bitcast(pltpu.bitcast(every, jnp.int32) & own, dtype))
    return jnp.concatenate(spread, axis=1)


def _over_heads(x, combine, kv_heads):
    """Reduce `[rows, 128]` over the lanes of each head; every lane has its head's result."""
    distance = LANES // 2
    while distance >= kv_heads:
        x = combine(x, pltpu.roll(x, distance, 1))
        distance //= 2
    return x


def _bands(x, call):
    """`[rows, 128]`, one number a head, as a column of K bands: `[K * rows, 1]`."""
    return jnp.concatenate([x[:, i : i + 1] for i in range(call.kv_heads)], axis=0)
