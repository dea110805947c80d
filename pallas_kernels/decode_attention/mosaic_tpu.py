# SPDX-License-Identifier: Apache-2.0
"""Decode attention for TPUs, through Pallas and Mosaic.

A block of the cache is used as it lies in memory, `[tokens * KV heads, H]`. Registers hold words of
32 bits, rows side by side: loads of every n-th word bring the rows of a group of heads, two of
bfloat16, four of 8 bits. One product scores a group's query heads against its rows; of its K bands
(K: heads of the group) only that is kept which belongs to a column's KV head, so that the scores
fill one dense array `[rows, R]` in which lane `l` is of head `l % K`. A maximum or sum per head is
one over lanes that are K apart: a few rotations. On the way back the weights are spread over K
bands, zero elsewhere, and one product with the values yields every head. The matrix unit
multiplies K times what it must and has the time: a decode step waits for memory. For K = 2 heads h
with a query each, and two tokens t:

    rows of the cache              t0h0 t0h1 t1h0 t1h1
    product         band of h0      a    .    c    .
                    band of h1      .    b    .    d
    `_own_bands`                    a    b    c    d       one row; lane l is of head l % 2
    `_spread`       band of h0      a    0    c    0
                    band of h1      0    b    0    d

Positions and scales, a number a token, are laid out along the same lanes at the start of a step.

The grid is `(batch, worker, step)`: workers share the list of blocks that are needed, the rest is
not fetched. Interpreted on CPU; inside `shard_map` the interpreter needs the caller's
`check_vma=False`.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

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
"""Rows of the cache in one product; the scores of more rows would spill."""
MASKED = 2048
"""Rows of the cache in the body of a loop with a mask, which few blocks need."""
SCORES_BYTES = 8 << 20
VMEM_BYTES = 48 << 20


def forward(q, cache, layer, pages, q_pos, kv_pos, *, mask, soft_cap, scale):
    tuning.unsupported("mosaic_tpu", q, cache[1])
    kv_heads = cache[0].shape[-2]
    if LANES % kv_heads:
        raise NotImplementedError(
            f"decode_attention mosaic_tpu: a number of KV heads that divides {LANES}; got "
            f"{kv_heads}; use implementation='xla' or 'reference'"
        )
    t = q.shape[1]
    cache = rows.lines(cache, layer, pages, _readable if pages is None else _readable_pages)
    call = _Call(q, cache, q_pos, kv_pos, mask)
    queries = rows.together(q, kv_heads)
    real = queries.shape[2]
    row_pos = tiles.pad_axis(rows.positions(q_pos, real // t), call.rows, 1, NO_POSITION)
    kernel = functools.partial(_kernel, call=call, mask=mask, soft_cap=soft_cap, scale=scale)
    out, lse = call(
        kernel,
        [
            (row_pos[..., None], pl.BlockSpec((None, call.rows, 1), lambda b, *_: (b, 0, 0))),
            call.tokens(tiles.pad_axis(kv_pos, call.blocks * call.width, 1, PAD_POSITION)[:, None]),
            call.queries(queries),
            *call.slots(cache.k),
            *call.slots(cache.v),
            *call.scales(cache.k_scale),
            *call.scales(cache.v_scale),
        ],
    )
    # [workers, B, K, rows, V] and [workers, B, K, rows]
    out = out.reshape(*out.shape[:2], kv_heads, call.rows, -1)
    lse = lse.reshape(*lse.shape[:2], call.groups, call.rows, -1)[..., : call.heads]
    lse = lse.swapaxes(3, 4).reshape(*out.shape[:4])[..., :real]
    out, lse = online_softmax.merge_stacked(out[..., :real, :], lse)
    return rows.apart(out, t), rows.apart(lse, t)


def _readable(x):
    """Tell whether the kernel reads the cache as it lies: the reshape in `_Call.slots` is free."""
    slots, kv_heads, width = x.shape[-3:]
    whole_words = kv_heads == 1 or kv_heads * x.dtype.itemsize % 4 == 0
    return slots >= LANES and width % LANES == 0 and whole_words


def _readable_pages(x):
    return _readable(x) and x.shape[-3] % LANES == 0


class _Chunk(NamedTuple):
    """Rows of a group of heads that one product takes."""

    part: int
    """The part of the block that they are in: a page, or the whole block."""
    rows: pl.Slice
    """Their place in the part."""
    lanes: pl.Slice
    """Their place in the block."""


class _Call:
    """The kernel on one set of shapes: block sizes, padding, index maps and the list of blocks.

    `rows` are queries of one KV head; `width` tokens are `block` rows of the cache. `sub`: rows of
    a group of heads in the body of a loop, without and with a mask. A block comes in `parts`: its
    pages, each of which Pallas fetches from where it lies; without pages it is one.
    """

    def __init__(self, q, cache, q_pos, kv_pos, mask):
        self.interpret = target_platform() == "cpu"
        k, slots, self.cache = cache.k, cache.slots, cache
        self.batch: int = q.shape[0]
        self.kv_heads: int = k.shape[2]
        self.hv = cache.v.shape[3]
        tuned = tuning.blocks("mosaic", max(k.shape[3], self.hv), q.dtype, interpret=self.interpret)
        # the cache is never padded, unless it is shorter than the shortest block
        self.slots_there = max(slots, LANES)
        group_rows = q.shape[1] * (q.shape[2] // self.kv_heads)
        # A register's words hold rows that lie side by side. Loads of every n-th word bring a few
        # heads of all tokens: fewer bands.
        words = 4 // k.dtype.itemsize
        self.heads = words if self.kv_heads % words == 0 else self.kv_heads
        self.groups = self.kv_heads // self.heads
        # bands of whole tiles: 8 rows, and of bfloat16 16 over all bands
        least = SUBLANES if self.heads > 1 else 2 * SUBLANES
        self.rows = pl.cdiv(group_rows, least) * least
        self.bands = self.heads * self.rows
        most = min(tuned.rows, SCORES_BYTES // (4 * self.rows)) // self.kv_heads
        most = max(LANES, most // LANES * LANES)
        tokens = min(most, self.slots_there // LANES * LANES)
        self.parts = 1
        if cache.pages is not None:
            self.parts = min(max(1, tokens // k.shape[1]), cache.pages.shape[1])
            tokens = self.parts * k.shape[1]
        self.width, self.block = tokens, tokens * self.heads
        # straight-line code overlaps best and takes long to compile: under a mask, and for many
        # rows, a loop
        whole = pl.next_power_of_2(max(LANES, tuned.sub * SUBLANES // self.rows))
        part = self.block // self.parts
        self.sub = tuple(math.gcd(n, part) for n in (whole, min(whole, MASKED)))
        self.blocks = pl.cdiv(self.slots_there, tokens)
        # rows of the last block where it ends before its width; pages that are none are others
        self.ragged = 0 if cache.pages is not None else self.slots_there % tokens * self.heads
        self.scaled = cache.k_scale is not None
        self.order, self.counts = rows.block_list(mask, q_pos, kv_pos, tokens)
        self.workers = min(tuned.splits, self.blocks)
        # the longest list, dealt evenly; at least one step, which writes the results
        self.steps = jnp.maximum(1, pl.cdiv(self.counts[:, 1].max(), self.workers))
        self.varies = jax.typeof(q).manual_axis_type  # inside shard_map, as the inputs vary

    def fetched(self, b, worker, step, order, counts, pages):
        """The block to fetch; beyond the list its last one, which is loaded already."""
        at = jnp.clip(worker * counts[2 * self.batch] + step, 0, counts[2 * b + 1] - 1)
        return order[b * self.blocks + jnp.maximum(at, 0)]

    def place(self, part):
        """The index map of a part of a block: `(line of the cache, its place in the line)`."""

        def of_sequence(b, *at):
            counts = at[3]
            return counts[2 * self.batch + 1] + b, self.fetched(b, *at)

        def of_page(b, *at):
            counts, pages = at[3:]
            count = self.cache.pages.shape[1]
            number = jnp.minimum(self.fetched(b, *at) * self.parts + part, count - 1)
            return counts[2 * self.batch + 1] + pages[b * count + number], 0

        return of_sequence if self.cache.pages is None else of_page

    def each_chunk(self, chunk, carry, masked):
        """Run `chunk(_Chunk, carry)` over a group's rows of the block."""
        sub = self.sub[masked]
        size = math.gcd(CHUNK, sub)
        there = self.block // self.parts

        def turn(i, carry, part):
            for offset in range(0, sub, size):
                begin = i * sub + offset
                lanes = _at(part * there + begin, size)
                carry = chunk(_Chunk(part, _at(begin, size), lanes), carry)
            return carry

        for part in range(self.parts):
            step = functools.partial(turn, part=part)
            turns = there // sub
            carry = step(0, carry) if turns == 1 else jax.lax.fori_loop(0, turns, step, carry)
        return carry

    def tokens(self, x):
        """`[B, 1, S]`, a number a token; with its block spec."""
        return x, pl.BlockSpec(
            (None, x.shape[1], self.width), lambda b, *at: (b, 0, self.fetched(b, *at))
        )

    def scales(self, x):
        """`[lines, K, S]`, with the block spec of each part; nothing where there are none."""
        if x is None:
            return []
        if self.cache.pages is None:
            x = tiles.pad_axis(x, self.slots_there, 2)
        shape = None, x.shape[1], self.width // self.parts

        def spec(part):
            place = self.place(part)

            def index(*at):
                line, where = place(*at)
                return line, 0, where

            return pl.BlockSpec(shape, index)

        return [(x, spec(part)) for part in range(self.parts)]

    def slots(self, x):
        """Reshape the cache to rows, which moves nothing on a TPU; with the specs of its parts."""
        if self.cache.pages is None:
            x = tiles.pad_axis(x, self.slots_there, 1)
        x = x.reshape(x.shape[0], -1, x.shape[3])
        shape = 1, self.width // self.parts * self.kv_heads, x.shape[2]
        places = [self.place(part) for part in range(self.parts)]
        return [
            (x, pl.BlockSpec(shape, lambda *at, place=place: (*place(*at), 0))) for place in places
        ]

    def rows_of(self, parts, g, chunk, dtype):
        """Load a chunk's rows of group `g` from the parts of a block, in `dtype`."""
        ref, rows = parts[chunk.part], chunk.rows
        if self.groups == 1 and ref.dtype.itemsize > 1:
            return ref[0, rows, :].astype(dtype)
        stored = ref.dtype
        # 2026-11: loads of 8-bit rows fetch a quarter of a register each on v6e and tpu7x
        words = 4 // ref.dtype.itemsize
        size = rows.size // words
        there = _at(rows.start // words * self.groups, size * self.groups)
        ref = ref.bitcast(jnp.int32).at[0, there]
        found = ref[...] if self.groups == 1 else ref[pl.ds(g, size, self.groups), :]
        return pltpu.bitcast(found, stored).astype(dtype)

    def queries(self, x):
        """Reshape `[B, K, rows, H]` to K bands of rows; with its block spec."""
        x = tiles.pad_axis(x, self.rows, 2).reshape(self.batch, -1, x.shape[3])
        return x, pl.BlockSpec((None, *x.shape[1:]), lambda b, *_: (b, 0, 0))

    def __call__(self, kernel, inputs):
        arrays, in_specs = zip(*inputs, strict=True)
        shapes = (self.groups * self.bands, self.hv), (self.groups * self.rows, LANES)
        lines = self.block // LANES, LANES
        counts = jnp.append(self.counts.reshape(-1), jnp.stack([self.steps, self.cache.first]))
        pages = jnp.zeros(1, jnp.int32) if self.cache.pages is None else self.cache.pages
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=(self.batch, self.workers, self.steps),
                in_specs=in_specs,
                out_specs=[
                    pl.BlockSpec((None, None, *shape), lambda b, worker, *_: (worker, b, 0, 0))
                    for shape in shapes
                ],
                scratch_shapes=[
                    *(
                        pltpu.VMEM(shape, jnp.float32)
                        for shape in (*shapes, shapes[1], (shapes[1][0], self.block))
                    ),
                    pltpu.VMEM((1, *lines), jnp.int32),
                    *[pltpu.VMEM((self.groups, *lines), jnp.float32)] * 2 * self.scaled,
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
        )(self.order.reshape(-1), counts, pages.reshape(-1), *arrays)


class _Refs(NamedTuple):
    """The kernel's arguments in their order: scalars, inputs, results, scratch.

    Those of the cache are a tuple of a block's parts. `k_scale`, `v_scale`, `k_lanes` and `v_lanes`
    are None where the cache has no scales. What ends in `lanes` holds a number a token as
    `_lay_out` puts it.
    """

    order: jax.Ref
    counts: jax.Ref
    pages: jax.Ref
    q_pos: jax.Ref
    kv_pos: jax.Ref
    q: jax.Ref
    k: tuple[jax.Ref, ...]
    v: tuple[jax.Ref, ...]
    k_scale: tuple[jax.Ref, ...] | None
    v_scale: tuple[jax.Ref, ...] | None
    out: jax.Ref
    lse: jax.Ref
    acc: jax.Ref
    high: jax.Ref
    total: jax.Ref
    scores: jax.Ref
    pos_lanes: jax.Ref
    k_lanes: jax.Ref | None
    v_lanes: jax.Ref | None

    @classmethod
    def of(cls, refs, call):
        of_scales = ("k_scale", "v_scale", "k_lanes", "v_lanes")
        left = iter(refs)
        fields: dict[str, Any] = {}
        for name in cls._fields:
            if name in of_scales and not call.scaled:
                fields[name] = None
            elif name in ("k", "v", "k_scale", "v_scale"):
                fields[name] = tuple(itertools.islice(left, call.parts))
            else:
                fields[name] = next(left)
        return cls(**fields)


def _kernel(*refs, call, mask, soft_cap, scale):
    r = _Refs.of(refs, call)
    b, worker, step = (pl.program_id(axis) for axis in range(3))
    number = worker * r.counts[2 * call.batch] + step
    some = number < r.counts[2 * b + 1]
    every = number < r.counts[2 * b]
    # the rows of a group of heads in what holds a number a head, and those of its bands
    stats = [pl.ds(g * call.rows, call.rows) for g in range(call.groups)]
    bands = [pl.ds(g * call.bands, call.bands) for g in range(call.groups)]

    @pl.when(step == 0)
    def start():
        r.acc[...] = jnp.zeros(r.acc.shape, jnp.float32)
        r.high[...] = jnp.full(r.high.shape, -jnp.inf, jnp.float32)
        r.total[...] = jnp.zeros(r.total.shape, jnp.float32)

    def score(g, masked):
        def chunk(at, most):
            lanes = at.lanes
            s = dot(r.q[bands[g], :], call.rows_of(r.k, g, at, r.q.dtype), (1, 1))
            s = _own_bands(s, call)
            if call.scaled:
                s *= _line(r.k_lanes, g, lanes)
            s, _ = online_softmax.scores(s, scale, soft_cap)
            if masked:
                seen = tiles.visible(mask, [r.q_pos[...]], [_line(r.pos_lanes, 0, lanes)])
                s = jnp.where(seen, s, -jnp.inf)
            r.scores[stats[g], lanes] = s
            return functools.reduce(jnp.maximum, _tiles(s), most)

        most = call.each_chunk(chunk, r.high[stats[g], :], masked)
        return _over_heads(most, jnp.maximum, call.heads)

    def weigh(g, masked, shift, carry):
        def chunk(at, carry):
            (sums, added), lanes = carry, at.lanes
            parts = [jnp.exp2(tile - shift) for tile in _tiles(r.scores[stats[g], lanes])]
            sums = functools.reduce(jnp.add, parts, sums)
            p = jnp.concatenate(parts, axis=1)
            if call.scaled:
                weighed = p * _line(r.v_lanes, g, lanes)
                # what lies behind the cache may be NaN, here and below
                p = jnp.where(p > 0, weighed, 0.0) if masked else weighed
            values = call.rows_of(r.v, g, at, r.q.dtype)
            if masked and call.ragged:
                row = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) + lanes.start
                last = r.order[b * call.blocks + number] == call.blocks - 1
                values = jnp.where((row < call.ragged) | ~last, values, jnp.zeros_like(values))
            return sums, added + dot(_spread(p, call, r.q.dtype), values, (1, 0))

        return call.each_chunk(chunk, carry, masked)

    def work(masked):
        if call.scaled:
            scales, lanes = (r.k_scale, r.v_scale), (r.k_lanes, r.v_lanes)
            _lay_out(scales, lanes, call, unroll=not masked)
        if masked:
            _lay_out([(r.kv_pos,)], [r.pos_lanes], call, unroll=False)
        ahead = score(0, masked)
        for g in range(call.groups):
            m = ahead
            if g + 1 < call.groups:  # the matrix unit has the next scores to do meanwhile
                ahead = score(g + 1, masked)
            shift = jnp.where(m == -jnp.inf, 0.0, m)
            alpha = jnp.exp2(r.high[stats[g], :] - shift)
            r.high[stats[g], :] = m
            carry = r.total[stats[g], :] * alpha, r.acc[bands[g], :] * _bands(alpha, call)
            r.total[stats[g], :], r.acc[bands[g], :] = weigh(g, masked, shift, carry)

    pl.when(every)(lambda: work(False))
    pl.when(some & ~every)(lambda: work(True))

    @pl.when(step == pl.num_programs(2) - 1)
    def finish():
        for g in range(call.groups):
            whole = _over_heads(r.total[stats[g], :], jnp.add, call.heads)
            inverse, r.lse[stats[g], :] = online_softmax.finish(r.high[stats[g], :], whole)
            r.out[bands[g], :] = r.acc[bands[g], :] * _bands(inverse, call)


def _at(first, size):
    """The slice from `first` on, a multiple of `size`."""
    return pl.ds(first if isinstance(first, int) else pl.multiple_of(first, size), size)


def _line(ref, g, lanes):
    """Read `[1, lanes]` of group `g` from the lines of `_lay_out`."""
    first = lanes.start // LANES
    lines = [ref[g, pl.ds(first + i, 1), :] for i in range(lanes.size // LANES)]
    return jnp.concatenate(lines, axis=1)


def _lay_out(sources, targets, call, unroll):
    """Lay out numbers of tokens, `[1 or K, tokens]` in parts, like rows of the cache, 128 a line.

    `[1, lines, 128]`, or `[groups, lines, 128]` where every head has its own.
    """
    n = call.heads

    parts = len(sources[0])
    turns = call.width // LANES // parts

    def turn(i, _, part):
        at = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
        for source, target in zip(sources, targets, strict=True):
            own = source[part].shape[0] > 1
            for g in range(call.groups if own else 1):
                heads = pl.ds(g * n if own else 0, n if own else 1)
                x = source[part][heads, at].astype(target.dtype)
                if n > 1:
                    x = jnp.concatenate([x] * (max(n, SUBLANES) // x.shape[0]), axis=0)
                    x = _interleave(x, n) if own else _repeat(x, n)
                target[g, pl.ds((part * turns + i) * n, n), :] = x[:n]

    for part in range(parts):
        step = functools.partial(turn, part=part)
        jax.lax.fori_loop(0, turns, step, None, unroll=unroll and parts * turns <= 16)


def _repeat(x, k):
    """Repeat each of 128 tokens k times, over k lines: line `j` begins at token `j * 128 / k`."""
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))
    return _gather(x, LANES // k * (row % k) + lane // k)


def _interleave(x, k):
    """Turn `[K, 128]` of 128 tokens into `K` lines, token by token: `[j, l]` is `x[l % K, ...]`.

    Permutes the entries within rows, then within columns, then within rows.
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
    """Take from each column the band of its own head: `[K * rows, R] -> [rows, R]`."""
    head = _head((call.rows, LANES), call.heads)
    kept = []
    for tile in _tiles(s):  # tile by tile: every one has the same masks
        own = tile[: call.rows]
        for i in range(1, call.heads):
            own = jnp.where(head == i, tile[i * call.rows : (i + 1) * call.rows], own)
        kept.append(own)
    return jnp.concatenate(kept, axis=1)


def _spread(p, call, dtype):
    """Undo `_own_bands`, with zeros elsewhere, in `dtype`.

    Masks words of two bfloat16 rows: one pack and one AND, where a select needs three.
    """
    if call.heads == 1:
        return p.astype(dtype)
    packed = 4 // jnp.dtype(dtype).itemsize
    shape = call.heads * call.rows // packed, LANES
    band = jax.lax.broadcasted_iota(jnp.int32, shape, 0) // (call.rows // packed)
    own = jnp.where(_head(shape, call.heads) == band, -1, 0)
    spread = []
    for tile in _tiles(p):
        every = jnp.concatenate([tile] * call.heads, axis=0).astype(dtype)
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
    """Turn `[rows, 128]`, one number a head, into a column of K bands: `[K * rows, 1]`."""
    return jnp.concatenate([x[:, i : i + 1] for i in range(call.heads)], axis=0)
