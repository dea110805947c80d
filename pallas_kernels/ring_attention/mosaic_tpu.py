# SPDX-License-Identifier: Apache-2.0
"""Ring attention for TPUs in one kernel a pass: keys and values go from device to device by remote
DMA while the kernel attends to those that are there.

A shard's keys are cut into chunks, and every chunk goes round on a ring of its own (`Stream`),
every other one in the opposite direction if asked. Two slots in HBM take what arrives; positions
and what says which blocks to skip are small and gathered before. At step s, for each chunk: wait
for it, pass it on to the neighbour's other slot, attend to it with a pipeline from HBM, and tell
the neighbour before that the slot is free.

Backward, the gradients of keys and values travel in float32 one step behind: a chunk's begin at its
first foreign host, leave each host when that has added its part, while the next chunk is worked on,
and need one hop home. What a host adds to its own keys waits there. On device 0 of three:

    step                      0           1            2            after the last
    K, V in slot              0, own      1, of dev 2  0, of dev 1
    dK, dV in slot            HOME, own   1, of dev 2  0, of dev 1  1, own: add to HOME
    which were                begun here  begun here   from dev 2   from dev 2

No deadlock, whatever the number of devices: order the parts of the program by (step, chunk) and
within one by free, wait, send, work, pass on gradients. Whatever a device waits for, its neighbours
do in an earlier part. Every semaphore is 0 again at the end: there are as many credits as sends
that need one.

Nothing is aliased, and every sum has a fixed order.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import online_softmax
from pallas_kernels.dispatch import target_platform
from pallas_kernels.flash_attention import blocks as tiles
from pallas_kernels.flash_attention import mosaic_tpu_tile as tile
from pallas_kernels.flash_attention.mask import NO_POSITION, PAD_POSITION
from pallas_kernels.flash_attention.mosaic_tpu_tile import apart, exactly, lanes, side_by_side
from pallas_kernels.ring_attention.mosaic_tpu_stream import SLOTS, Stream, arrive, leave

MOST_CHUNKS = 4
HOME = SLOTS  # where the gradients of a device's own keys wait for those from elsewhere
DQ_BYTES = 24 << 20  # of VMEM for the queries' gradient; the smallest chip has 64 MiB
VMEM_BYTES = 56 << 20
BITS, CODES = 3, 10  # of what a block shows, and how many of those in an int32
COLLECTIVE_IDS = {"forward": 21, "backward": 22}
INTERPRETED = pltpu.InterpretParams()


def forward(
    q, k, v, q_pos, kv_pos, q_seg, kv_seg, *, axis_name, bidirectional, mask, soft_cap, scale
):
    """`(out, lse)`, both float32."""
    q, k, v = exactly(q, k, v)
    b, t, n, _ = q.shape
    ring = _Ring(
        "mosaic_forward", q, k, v, q_pos, kv_pos, q_seg, kv_seg,
        axis_name=axis_name, bidirectional=bidirectional, mask=mask, queries_inner=False,
    )  # fmt: skip
    keys = lax.pmax(tile.longest(k, kv_pos == PAD_POSITION), axis_name)
    safe = tile.safe(tile.longest(q, q_pos == NO_POSITION), keys, None, soft_cap, scale)
    acc, m, total, *_ = ring.call(
        functools.partial(_forward_kernel, ring=ring, soft_cap=soft_cap, scale=scale),
        [safe.reshape(-1)],
        [ring.queries(q), ring.keys(k), ring.values(v)],
        [
            ((b, n, ring.rows_v, ring.t), jnp.float32),
            *[((b, n, 1, ring.t), jnp.float32)] * 2,
            *ring.slots(SLOTS, k.dtype),
        ],
        [],
        streams=1,
        name="forward",
    )
    inverse, lse = online_softmax.finish(m, total)
    out = (acc * inverse).transpose(0, 3, 1, 2)
    return out[:, :t, :, : v.shape[3]], lse[:, :, 0, :t].swapaxes(1, 2)


def backward(
    q, k, v, q_pos, kv_pos, q_seg, kv_seg, lse, dout, delta, *,
    axis_name, bidirectional, mask, soft_cap, scale,
):  # fmt: skip
    """`(dq, dk, dv)` in float32; `lse` of the whole row, `delta` as for flash attention."""
    dtype = jnp.float32 if q.dtype == jnp.float16 else q.dtype
    q, k, v = exactly(q, k, v)
    (b, t, n, h), (_, s, kv_heads, _) = q.shape, k.shape
    ring = _Ring(
        "mosaic_backward", q, k, v, q_pos, kv_pos, q_seg, kv_seg,
        axis_name=axis_name, bidirectional=bidirectional, mask=mask, queries_inner=True,
    )  # fmt: skip
    lse, delta = online_softmax.backward_rows(lse, delta)
    inputs = [ring.queries(q), ring.keys(k), ring.values(v), ring.outs(dout.astype(dtype))]
    dq, dk, dv, *_ = ring.call(
        functools.partial(_backward_kernel, ring=ring, soft_cap=soft_cap, scale=scale),
        [],
        [*inputs, ring.rows(lse), ring.rows(delta)],
        [
            ((b, ring.t, n * ring.h), jnp.float32),
            *ring.slots(SLOTS + 1, jnp.float32),
            *ring.slots(SLOTS, k.dtype),
        ],
        [
            (ring.group * ring.cut_blocks, ring.rows_h, ring.q),
            (ring.rows_h, ring.kv),
            (ring.rows_v, ring.kv),
        ],
        streams=2,
        name="backward",
    )
    last = ring.size % SLOTS
    dk, dv = (x[HOME] + x[last] for x in (dk, dv))
    return apart(dq, n, t, h), apart(dk, kv_heads, s, h), apart(dv, kv_heads, s, v.shape[3])


class _Ring(tile.Tile):
    """One kernel on one set of shapes: blocks, chunks, neighbours, and which blocks to skip."""

    def __init__(
        self, op, q, k, v, q_pos, kv_pos, q_seg, kv_seg, *,
        axis_name, bidirectional, mask, queries_inner,
    ):  # fmt: skip
        self.interpret = INTERPRETED if target_platform() == "cpu" else False
        segmented = q_seg is not None
        super().__init__(
            op, q, k, v, mask,
            segmented=segmented, queries_inner=queries_inner, interpret=bool(self.interpret),
        )  # fmt: skip
        # without a tiling a pipeline asks which TPU it is for, which the interpreter cannot say
        self.tiling = pltpu.Tiling.SPARSE_CORE if self.interpret else None
        t, s = q.shape[1], k.shape[1]
        # at least two chunks, if there are the tokens
        self.kv = min(self.kv, lanes(pl.cdiv(s, 2)))
        self.sub = min(self.sub, self.kv)
        nk, nq = pl.cdiv(s, self.kv), pl.cdiv(t, self.q)
        # a chunk reads and writes what it adds to: not for one block, if there are more
        self.chunk_blocks = pl.cdiv(nk, min(max(nk // 2, 2), MOST_CHUNKS))
        self.chunks = pl.cdiv(nk, self.chunk_blocks)
        self.chunk = self.chunk_blocks * self.kv
        self.nk, self.s = self.chunks * self.chunk_blocks, self.chunks * self.chunk
        # how often the queries are cut for their gradient to fit into VMEM
        most = max(DQ_BYTES // (self.group * self.q * self.h * 4), 1) if queries_inner else nq
        self.cuts = pl.cdiv(nq, most)
        self.cut_blocks = pl.cdiv(nq, self.cuts)
        self.nq = self.cuts * self.cut_blocks
        self.t = self.nq * self.q
        self.size, self.bidirectional = lax.axis_size(axis_name), bidirectional
        self.axes = axis_name if isinstance(axis_name, tuple) else (axis_name,)
        self._ids(axis_name, q_pos, kv_pos, q_seg, kv_seg)

    def _ids(self, axis_name, q_pos, kv_pos, q_seg, kv_seg):
        """Ids of the queries and of all keys, `[n * B, 1 or 2, S]`, and what kernels read first."""
        self.q_ids = tiles.token_ids(q_pos, q_seg, self.t, NO_POSITION)
        kv_ids = tiles.token_ids(kv_pos, kv_seg, self.s, PAD_POSITION)
        self.kv_ids = lax.all_gather(kv_ids, axis_name, tiled=True)
        q = tile.block_scalars(self.q_ids, self.q, NO_POSITION)
        kv = tile.block_scalars(self.kv_ids, self.kv, PAD_POSITION)
        seen = self.visibility(
            [x[None, :, :, None] for x in q],
            [x.reshape(self.size, self.batch, 1, self.nk) for x in kv],
        )
        some = seen[0].reshape(self.size, self.batch * self.nq, self.chunks, self.chunk_blocks)
        me = lax.axis_index(axis_name)
        ends = [self._coordinates((me + hop) % self.size) for hop in (1, self.size - 1)]
        self.scalars = [
            jnp.stack([me, *ends[0], *ends[1]]).astype(jnp.int32),
            some.any((1, 3)).astype(jnp.int32).reshape(-1),
            _packed(seen),
        ]

    def _coordinates(self, index):
        coordinates: list = []
        for name in reversed(self.axes):
            coordinates.insert(0, index % lax.axis_size(name))
            index = index // lax.axis_size(name)
        return coordinates

    def queries(self, x):
        return side_by_side(x, self.t, self.h)

    def outs(self, x):
        return side_by_side(x, self.t, self.hv)

    def keys(self, x):
        return side_by_side(x, self.s, self.h)

    def values(self, x):
        return side_by_side(x, self.s, self.hv)

    def rows(self, x):
        return tiles.pad_axis(x.swapaxes(1, 2), self.t, 2)[:, :, None]

    def slots(self, count, dtype):
        """Shapes that hold keys and values, or their gradients, `count` times."""
        widths = self.kv_heads * self.h, self.kv_heads * self.hv
        return [((count, self.batch, self.s, width), dtype) for width in widths]

    def call(self, kernel, scalars, inputs, outs, scratch, *, streams, name):
        inputs = [self.q_ids, self.kv_ids, *inputs]
        if not self.interpret:
            # what XLA would put into VMEM for the kernel's sake
            inputs = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in inputs]
        in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
        scalars = [*self.scalars, *scalars]
        semaphores = [
            pltpu.SemaphoreType.DMA((2, self.chunks)),
            pltpu.SemaphoreType.DMA((2, SLOTS, self.chunks)),
            pltpu.SemaphoreType.REGULAR((self.chunks,)),
        ]
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(),
                in_specs=[in_hbm] * len(inputs),
                out_specs=[in_hbm] * len(outs),
                scratch_shapes=[
                    *(pltpu.VMEM(shape, jnp.float32) for shape in scratch),
                    pltpu.VMEM(self.columns(), jnp.int32),
                    *semaphores * streams,
                ],
            ),
            out_shape=[pltpu.HBM(shape, dtype) for shape, dtype in outs],
            compiler_params=pltpu.CompilerParams(
                collective_id=COLLECTIVE_IDS[name],
                has_side_effects=True,
                vmem_limit_bytes=VMEM_BYTES,
            ),
            interpret=self.interpret,
            name=f"ring_attention_{name}",
        )(*scalars, *inputs)

    def neighbour(self, ring_ref, chunk, *, ahead):
        """Name the device to which `chunk` goes, or from which it comes."""
        axes = len(self.axes)
        up, down = ([ring_ref[1 + i + side * axes] for i in range(axes)] for side in (0, 1))
        if not ahead:
            up, down = down, up
        if self.bidirectional:
            up = [jnp.where(chunk % 2 == 0, a, b) for a, b in zip(up, down, strict=True)]
        return dict(zip(self.axes, up, strict=True))

    def owner(self, ring_ref, step, chunk):
        """Name the device whose keys `chunk` holds at `step`."""
        back = self.size - step
        if self.bidirectional:
            back = jnp.where(chunk % 2 == 0, back, step)
        return lax.rem(ring_ref[0] + back, jnp.int32(self.size))

    def seen(self, blocks_ref, owner, b, i, j):
        """Look up `visibility`: query block `i`, and block `j` of the owner's keys."""
        at = ((owner * self.batch + b) * self.nq + i) * self.nk + j
        bits = blocks_ref[lax.div(at, jnp.int32(CODES))] >> (lax.rem(at, jnp.int32(CODES)) * BITS)
        some, every, diagonal = (bits & (1 << k) != 0 for k in range(BITS))
        return some, every, diagonal if self.mask.causal and self.q == self.kv else None

    def barrier(self, ring_ref):
        """Nobody writes to a neighbour that has not begun."""
        semaphore = pltpu.get_barrier_semaphore()
        axes = len(self.axes)
        for side in (0, 1):
            device = {name: ring_ref[1 + side * axes + i] for i, name in enumerate(self.axes)}
            pl.semaphore_signal(semaphore, 1, device_id=device)
        pl.semaphore_wait(semaphore, 2)

    def each(self, do):
        """`do(step, chunk)` in order."""

        @pl.loop(0, self.size)
        def _(step):
            pl.loop(0, self.chunks)(functools.partial(do, step))


def _packed(seen):
    """Pack what `visibility` says of all blocks, CODES of them in an int32."""
    flags = [x for x in seen if x is not None]
    code = sum(x.astype(jnp.int32) << i for i, x in enumerate(flags)).reshape(-1)
    code = tiles.pad_axis(code, pl.cdiv(code.size, CODES) * CODES, 0).reshape(-1, CODES)
    return (code << (BITS * jnp.arange(CODES, dtype=jnp.int32))).sum(1, dtype=jnp.int32)


class _ForwardRefs(NamedTuple):
    """The kernel's arguments in their order: scalars; inputs and results in HBM; scratch."""

    ring: jax.Ref  # scalars: see `_Ring._ids`
    busy: jax.Ref
    blocks: jax.Ref
    safe: jax.Ref
    q_ids: jax.Ref
    kv_ids: jax.Ref
    q: jax.Ref
    k: jax.Ref
    v: jax.Ref
    acc: jax.Ref
    m: jax.Ref
    total: jax.Ref
    k_slots: jax.Ref
    v_slots: jax.Ref
    columns: jax.Ref
    sent: jax.Ref
    arrived: jax.Ref
    credit: jax.Ref


class _ForwardBlocks(NamedTuple):
    """The references that the pipeline brings into VMEM, and, from `acc` on, takes out of it."""

    q_ids: jax.Ref
    kv_ids: jax.Ref
    q: jax.Ref
    k: jax.Ref
    v: jax.Ref
    acc_before: jax.Ref
    m_before: jax.Ref
    total_before: jax.Ref
    acc: jax.Ref
    m: jax.Ref
    total: jax.Ref


def _forward_kernel(*refs, ring, soft_cap, scale):
    r = _ForwardRefs(*refs)
    keys = Stream(ring, r.ring, (r.k_slots, r.v_slots), r.sent, r.arrived, r.credit)
    for chunk in range(ring.chunks):
        keys.fill(0, chunk, (r.k, r.v))
    ring.barrier(r.ring)

    def work(step, chunk):
        arrive(ring, keys, step, chunk)
        owner = ring.owner(r.ring, step, chunk)
        busy = r.busy[owner * ring.chunks + chunk] == 1
        first = (step == 0) & (chunk == 0)
        pl.when(busy | first)(
            lambda: _attend(ring, r, step, chunk, owner, soft_cap=soft_cap, scale=scale)
        )
        leave(ring, keys, step, chunk)

    ring.each(work)


def _attend(ring, r, step, chunk, owner, *, soft_cap, scale):
    """All queries to a chunk; sums grow in HBM, each block read and written once."""

    def body(*blocks):
        here = _ForwardBlocks(*blocks)
        b, head, i, j = (pl.program_id(axis) for axis in range(4))
        seen = ring.seen(r.blocks, owner, b, i, chunk * ring.chunk_blocks + j)
        at = tile.At(b, head, head // ring.group, i, j, *seen)
        safe = r.safe[b * ring.heads + head] == 1
        fresh = (step == 0) & (chunk == 0)
        sums = here.acc, here.m, here.total

        def start():
            here.acc[...] = jnp.zeros(here.acc.shape, jnp.float32)
            here.m[...] = jnp.full(here.m.shape, jnp.where(safe, 0.0, -jnp.inf), jnp.float32)
            here.total[...] = jnp.zeros(here.total.shape, jnp.float32)

        def carry_on():
            before = here.acc_before, here.m_before, here.total_before
            for ref, old in zip(sums, before, strict=True):
                ref[...] = old[...]

        steps = tile.forward_steps(
            safe, here.q, here.k, here.v, *sums, soft_cap=soft_cap, scale=scale
        )
        first: list = [((j == 0) & fresh, start), ((j == 0) & ~fresh, carry_on)]
        parts: tuple = first, steps, []
        tile.work(ring, at, parts, here.q_ids, here.kv_ids, r.columns)

    slot = lax.rem(step, SLOTS)
    sums = r.acc, r.m, r.total
    in_specs, out_specs = _forward_specs(ring, r.blocks, owner, chunk)
    pltpu.emit_pipeline(
        body,
        grid=(ring.batch, ring.heads, ring.nq, ring.chunk_blocks),
        in_specs=in_specs,
        out_specs=out_specs,
        tiling=ring.tiling,
    )(r.q_ids, r.kv_ids, r.q, r.k_slots.at[slot], r.v_slots.at[slot], *sums, *sums)


def _forward_specs(ring, blocks_ref, owner, chunk):
    """The blocks of a grid `(batch, head, query block, key block of the chunk)`."""

    def keys_of(b, head, i, j):
        """A block of which nothing is visible is not fetched: the chunk's first one stands in."""
        j = chunk * ring.chunk_blocks + j
        some, *_ = ring.seen(blocks_ref, owner, b, i, j)
        return jnp.where(some, j, chunk * ring.chunk_blocks)

    ids = 1 + ring.segmented
    k_spec, v_spec = (
        pl.BlockSpec(
            (None, ring.kv, width),
            lambda b, head, i, j: (b, keys_of(b, head, i, j), head // ring.group),
        )
        for width in (ring.h, ring.hv)
    )
    sum_specs = [
        pl.BlockSpec((None, None, rows, ring.q), lambda b, head, i, j: (b, head, 0, i))
        for rows in (ring.rows_v, 1, 1)
    ]
    in_specs = [
        pl.BlockSpec((None, ids, ring.q), lambda b, head, i, j: (b, 0, i)),
        pl.BlockSpec(
            (None, ids, ring.kv),
            lambda b, head, i, j: (owner * ring.batch + b, 0, keys_of(b, head, i, j)),
        ),
        pl.BlockSpec((None, ring.q, ring.h), lambda b, head, i, j: (b, i, head)),
        *(k_spec, v_spec, *sum_specs),
    ]
    return in_specs, sum_specs


class _BackwardRefs(NamedTuple):
    """The kernel's arguments in their order, as of `_ForwardRefs`."""

    ring: jax.Ref
    busy: jax.Ref
    blocks: jax.Ref
    q_ids: jax.Ref
    kv_ids: jax.Ref
    q: jax.Ref
    k: jax.Ref
    v: jax.Ref
    dout: jax.Ref
    lse: jax.Ref
    delta: jax.Ref
    dq: jax.Ref
    dk: jax.Ref
    dv: jax.Ref
    k_slots: jax.Ref
    v_slots: jax.Ref
    dq_acc: jax.Ref
    dk_acc: jax.Ref
    dv_acc: jax.Ref
    columns: jax.Ref
    keys_sent: jax.Ref
    keys_arrived: jax.Ref
    keys_credit: jax.Ref
    gradients_sent: jax.Ref
    gradients_arrived: jax.Ref
    gradients_credit: jax.Ref


def _backward_kernel(*refs, ring, soft_cap, scale):
    r = _BackwardRefs(*refs)
    semaphores = r.keys_sent, r.keys_arrived, r.keys_credit
    keys = Stream(ring, r.ring, (r.k_slots, r.v_slots), *semaphores)
    semaphores = r.gradients_sent, r.gradients_arrived, r.gradients_credit
    gradients = Stream(ring, r.ring, (r.dk, r.dv), *semaphores)
    for chunk in range(ring.chunks):
        keys.fill(0, chunk, (r.k, r.v))
    ring.barrier(r.ring)

    def work(step, chunk):
        slot = lax.rem(step, SLOTS)

        @pl.when(step > 1)
        def _():
            gradients.sent(1 - slot, chunk)
            gradients.grant(chunk)

        arrive(ring, keys, step, chunk)
        pl.when(step > 1)(lambda: gradients.wait(slot, chunk))
        owner = ring.owner(r.ring, step, chunk)
        busy = r.busy[owner * ring.chunks + chunk] == 1

        @pl.when(busy | (step <= 1))
        def _():
            pull = functools.partial(_pull, ring, r, step, chunk, owner)
            pl.loop(0, ring.cuts)(functools.partial(pull, soft_cap=soft_cap, scale=scale))

        leave(ring, keys, step, chunk)

        @pl.when(step > 0)
        def _():
            pl.when(step > 1)(lambda: gradients.take(chunk))
            gradients.send(slot, chunk)

    ring.each(work)

    @pl.loop(0, ring.chunks)
    def _(chunk):
        gradients.sent((ring.size - 1) % SLOTS, chunk)
        gradients.wait(ring.size % SLOTS, chunk)


def _pull(ring, r, step, chunk, owner, cut, *, soft_cap, scale):
    """Some queries and a chunk; their gradients grow in HBM, each block read and written once.

    Where the block of an input or output is not to change, it stands still.
    """
    first_chunk, first_cut = chunk * ring.chunk_blocks, cut * ring.cut_blocks

    def queries_of(b, kv_head, j, g, i):
        some, *_ = ring.seen(r.blocks, owner, b, first_cut + i, first_chunk + j)
        return first_cut + jnp.where(some, i, ring.cut_blocks - 1)

    def body(q_ids, kv_ids, *blocks):
        b, kv_head, j, g, i = (pl.program_id(axis) for axis in range(5))
        seen = ring.seen(r.blocks, owner, b, first_cut + i, first_chunk + j)
        at = tile.At(b, kv_head * ring.group + g, kv_head, i, j, *seen)
        turn = tile.Turn(
            first=(g == 0) & (i == 0),
            last=(g == ring.group - 1) & (i == ring.cut_blocks - 1),
            first_keys=j == 0,
            last_keys=j == ring.chunk_blocks - 1,
            queries=g * ring.cut_blocks + i,
        )
        fresh = (step == 0) & (chunk == 0), (step <= 1) & (cut == 0)
        parts = tile.backward_kernel(
            turn, *blocks, r.dq_acc, r.dk_acc, r.dv_acc,
            soft_cap=soft_cap, scale=scale, fresh=fresh,
        )  # fmt: skip
        tile.work(ring, at, parts, q_ids, kv_ids, r.columns)

    slot = lax.rem(step, SLOTS)
    part = jnp.where(step == 0, HOME, slot)
    sums = r.dq, r.dk.at[part], r.dv.at[part]
    in_specs, out_specs = _backward_specs(ring, queries_of, owner, first_chunk, first_cut)
    pltpu.emit_pipeline(
        body,
        grid=(ring.batch, ring.kv_heads, ring.chunk_blocks, ring.group, ring.cut_blocks),
        in_specs=in_specs,
        out_specs=out_specs,
        tiling=ring.tiling,
    )(
        r.q_ids, r.kv_ids, r.q, r.k_slots.at[slot], r.v_slots.at[slot], r.dout, r.lse, r.delta,
        *sums, *sums,
    )  # fmt: skip


def _backward_specs(ring, queries_of, owner, first_chunk, first_cut):
    """The blocks of a grid `(batch, kv head, key block, query head of the group, query block)`."""

    def head_of(kv_head, g):
        return kv_head * ring.group + g

    def of_queries(shape, where):
        return pl.BlockSpec(
            shape,
            lambda b, kv_head, j, g, i: where(
                b, head_of(kv_head, g), queries_of(b, kv_head, j, g, i)
            ),
        )

    def of_dq(b, kv_head, j, g, i):
        """Queries' gradients are read, added to and written in the last turn of the keys alone."""
        is_last = j == ring.chunk_blocks - 1
        i, g = (jnp.where(is_last, x, 0) for x in (i, g))
        return b, first_cut + i, head_of(kv_head, g)

    ids = 1 + ring.segmented
    q_spec, out_spec = (
        of_queries((None, ring.q, width), lambda b, head, i: (b, i, head))
        for width in (ring.h, ring.hv)
    )
    row_spec = of_queries((None, None, 1, ring.q), lambda b, head, i: (b, head, 0, i))
    k_spec, v_spec = (
        pl.BlockSpec(
            (None, ring.kv, width), lambda b, kv_head, j, *_: (b, first_chunk + j, kv_head)
        )
        for width in (ring.h, ring.hv)
    )
    dq_spec = pl.BlockSpec((None, ring.q, ring.h), of_dq)
    in_specs = [
        of_queries((None, ids, ring.q), lambda b, head, i: (b, 0, i)),
        pl.BlockSpec(
            (None, ids, ring.kv),
            lambda b, kv_head, j, *_: (owner * ring.batch + b, 0, first_chunk + j),
        ),
        *(q_spec, k_spec, v_spec, out_spec, row_spec, row_spec),
        *(dq_spec, k_spec, v_spec),
    ]
    return in_specs, [dq_spec, k_spec, v_spec]
