# SPDX-License-Identifier: Apache-2.0
"""Ring attention for TPUs in one kernel a pass: keys and values go from device to device by remote
DMA while the kernel attends to those that are there.

A shard's keys are cut into chunks, and every chunk goes round on a ring of its own (`_Stream`),
every other one in the opposite direction if asked. Two slots in HBM take what arrives; positions
and what says which blocks to skip are small and gathered before. At step s, for each chunk: wait
for it, pass it on to the neighbour's other slot, attend to it with a pipeline from HBM, and tell
the neighbour before that the slot is free.

Backward, the gradients of keys and values travel in float32 one step behind: a chunk's begin at its
first foreign host, leave each host when that has added its part, while the next chunk is worked on,
and need one hop home. What a host adds to its own keys waits there.

No deadlock, whatever the number of devices: order the parts of the program by (step, chunk) and
within one by free, wait, send, work, pass on gradients. Whatever a device waits for, its neighbours
do in an earlier part. Every semaphore is 0 again at the end: there are as many credits as sends
that need one.

Nothing is aliased, and every sum has a fixed order.
"""

import functools

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

MOST_CHUNKS = 4
SLOTS = 2
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
        found: list = []
        for name in reversed(self.axes):
            found.insert(0, index % lax.axis_size(name))
            index = index // lax.axis_size(name)
        return found

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
        """Where `chunk` goes, or comes from."""
        axes = len(self.axes)
        up, down = ([ring_ref[1 + i + side * axes] for i in range(axes)] for side in (0, 1))
        if not ahead:
            up, down = down, up
        if self.bidirectional:
            up = [jnp.where(chunk % 2 == 0, a, b) for a, b in zip(up, down, strict=True)]
        return dict(zip(self.axes, up, strict=True))

    def owner(self, ring_ref, step, chunk):
        """Whose keys `chunk` holds at `step`."""
        back = self.size - step
        if self.bidirectional:
            back = jnp.where(chunk % 2 == 0, back, step)
        return lax.rem(ring_ref[0] + back, jnp.int32(self.size))

    def seen(self, blocks_ref, owner, b, i, j):
        """As `visibility`: query block `i`, and block `j` of the owner's keys."""
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
    """What `visibility` says of all blocks, CODES of them in an int32."""
    flags = [x for x in seen if x is not None]
    code = sum(x.astype(jnp.int32) << i for i, x in enumerate(flags)).reshape(-1)
    code = tiles.pad_axis(code, pl.cdiv(code.size, CODES) * CODES, 0).reshape(-1, CODES)
    return (code << (BITS * jnp.arange(CODES, dtype=jnp.int32))).sum(1, dtype=jnp.int32)


class _Stream:
    """Arrays `[slots, B, S, width]` whose chunks travel from slot to slot, a ring for each chunk.

    A credit says that the neighbour ahead has read the slot that is written next and sent it on.
    """

    def __init__(self, ring, ring_ref, arrays, sent, arrived, credit):
        self.ring, self.ring_ref, self.arrays = ring, ring_ref, arrays
        self._sent, self._arrived, self._credit = sent, arrived, credit

    def part(self, ref, chunk):
        return ref.at[:, pl.ds(chunk * self.ring.chunk, self.ring.chunk), :]

    def fill(self, slot, chunk, sources):
        """Begin to copy `[B, S, width]` of this device; `wait` for it as for what arrives."""
        for i, (source, ref) in enumerate(zip(sources, self.arrays, strict=True)):
            parts = self.part(source, chunk), self.part(ref.at[slot], chunk)
            pltpu.make_async_copy(*parts, self._arrived.at[i, slot, chunk]).start()

    def wait(self, slot, chunk):
        for i, ref in enumerate(self.arrays):
            part = self.part(ref.at[slot], chunk)
            pltpu.make_async_copy(part, part, self._arrived.at[i, slot, chunk]).wait()

    def _copies(self, source, chunk):
        target = 1 - source
        device = self.ring.neighbour(self.ring_ref, chunk, ahead=True)
        for i, ref in enumerate(self.arrays):
            yield pltpu.make_async_remote_copy(
                self.part(ref.at[source], chunk),
                self.part(ref.at[target], chunk),
                self._sent.at[i, chunk],
                self._arrived.at[i, target, chunk],
                device_id=device,
            )

    def send(self, source, chunk):
        for copy in self._copies(source, chunk):
            copy.start()

    def sent(self, source, chunk):
        for copy in self._copies(source, chunk):
            copy.wait_send()

    def grant(self, chunk):
        device = self.ring.neighbour(self.ring_ref, chunk, ahead=False)
        pl.semaphore_signal(self._credit.at[chunk], 1, device_id=device)

    def take(self, chunk):
        pl.semaphore_wait(self._credit.at[chunk], 1)


def _forward_kernel(
    ring_ref, busy_ref, blocks_ref, safe_ref, q_ids, kv_ids, q, k, v,
    acc, m, total, k_slots, v_slots, columns, *semaphores, ring, soft_cap, scale,
):  # fmt: skip
    keys = _Stream(ring, ring_ref, (k_slots, v_slots), *semaphores)
    for chunk in range(ring.chunks):
        keys.fill(0, chunk, (k, v))
    ring.barrier(ring_ref)

    def attend(step, chunk, owner):
        def keys_of(b, head, i, j):
            j = chunk * ring.chunk_blocks + j
            some, *_ = ring.seen(blocks_ref, owner, b, i, j)
            return jnp.where(some, j, chunk * ring.chunk_blocks)

        def body(q_ids, kv_ids, *blocks):
            q, k, v, *before, acc, m, total = blocks
            b, head, i, j = (pl.program_id(axis) for axis in range(4))
            seen = ring.seen(blocks_ref, owner, b, i, chunk * ring.chunk_blocks + j)
            here = tile.At(b, head, head // ring.group, i, j, *seen)
            safe = safe_ref[b * ring.heads + head] == 1
            fresh = (step == 0) & (chunk == 0)

            def start():
                acc[...] = jnp.zeros(acc.shape, jnp.float32)
                m[...] = jnp.full(m.shape, jnp.where(safe, 0.0, -jnp.inf), jnp.float32)
                total[...] = jnp.zeros(total.shape, jnp.float32)

            def carry_on():
                for ref, old in zip((acc, m, total), before, strict=True):
                    ref[...] = old[...]

            steps = tile.forward_steps(safe, q, k, v, acc, m, total, soft_cap=soft_cap, scale=scale)
            first: list = [((j == 0) & fresh, start), ((j == 0) & ~fresh, carry_on)]
            parts: tuple = first, steps, []
            tile.work(ring, here, parts, q_ids, kv_ids, columns)

        ids = q_ids.shape[1]
        q_spec = pl.BlockSpec((None, ring.q, ring.h), lambda b, head, i, j: (b, i, head))
        k_spec, v_spec = (
            pl.BlockSpec(
                (None, ring.kv, width),
                lambda b, head, i, j: (b, keys_of(b, head, i, j), head // ring.group),
            )
            for width in (ring.h, ring.hv)
        )
        q_ids_spec = pl.BlockSpec((None, ids, ring.q), lambda b, head, i, j: (b, 0, i))
        kv_ids_spec = pl.BlockSpec(
            (None, ids, ring.kv),
            lambda b, head, i, j: (owner * ring.batch + b, 0, keys_of(b, head, i, j)),
        )
        sum_specs = [
            pl.BlockSpec((None, None, rows, ring.q), lambda b, head, i, j: (b, head, 0, i))
            for rows in (ring.rows_v, 1, 1)
        ]
        sums = acc, m, total
        slot = lax.rem(step, SLOTS)
        pltpu.emit_pipeline(
            body,
            grid=(ring.batch, ring.heads, ring.nq, ring.chunk_blocks),
            in_specs=[q_ids_spec, kv_ids_spec, q_spec, k_spec, v_spec, *sum_specs],
            out_specs=sum_specs,
            tiling=ring.tiling,
        )(q_ids, kv_ids, q, k_slots.at[slot], v_slots.at[slot], *sums, *sums)

    def work(step, chunk):
        _arrive(ring, keys, step, chunk)
        owner = ring.owner(ring_ref, step, chunk)
        busy = busy_ref[owner * ring.chunks + chunk] == 1
        first = (step == 0) & (chunk == 0)
        pl.when(busy | first)(lambda: attend(step, chunk, owner))
        _leave(ring, keys, step, chunk)

    ring.each(work)


def _arrive(ring, keys, step, chunk):
    """Wait for the chunk of this step and pass it on."""
    slot = lax.rem(step, SLOTS)
    keys.wait(slot, chunk)

    @pl.when(step < ring.size - 1)
    def _():
        pl.when(step > 0)(lambda: keys.take(chunk))
        keys.send(slot, chunk)


def _leave(ring, keys, step, chunk):
    """Give the slot free, once it is read and sent on."""
    pl.when(step < ring.size - 1)(lambda: keys.sent(lax.rem(step, SLOTS), chunk))
    pl.when(step < ring.size - 2)(lambda: keys.grant(chunk))


def _backward_kernel(
    ring_ref, busy_ref, blocks_ref, q_ids, kv_ids, q, k, v, dout, lse, delta,
    dq, dk, dv, k_slots, v_slots, dq_acc, dk_acc, dv_acc, columns, *semaphores,
    ring, soft_cap, scale,
):  # fmt: skip
    keys = _Stream(ring, ring_ref, (k_slots, v_slots), *semaphores[:3])
    gradients = _Stream(ring, ring_ref, (dk, dv), *semaphores[3:])
    for chunk in range(ring.chunks):
        keys.fill(0, chunk, (k, v))
    ring.barrier(ring_ref)

    def attend(step, chunk, owner, cut):
        """Some queries and a chunk; their gradients grow in HBM, each block read and written once.

        Where the block of an input or output is not to change, it stands still.
        """
        first_chunk, first_cut = chunk * ring.chunk_blocks, cut * ring.cut_blocks

        def queries_of(b, kv_head, j, g, i):
            some, *_ = ring.seen(blocks_ref, owner, b, first_cut + i, first_chunk + j)
            return first_cut + jnp.where(some, i, ring.cut_blocks - 1)

        def body(q_ids, kv_ids, *blocks):
            b, kv_head, j, g, i = (pl.program_id(axis) for axis in range(5))
            seen = ring.seen(blocks_ref, owner, b, first_cut + i, first_chunk + j)
            here = tile.At(b, kv_head * ring.group + g, kv_head, i, j, *seen)
            turn = tile.Turn(
                first=(g == 0) & (i == 0),
                last=(g == ring.group - 1) & (i == ring.cut_blocks - 1),
                first_keys=j == 0,
                last_keys=j == ring.chunk_blocks - 1,
                queries=g * ring.cut_blocks + i,
            )
            fresh = (step == 0) & (chunk == 0), (step <= 1) & (cut == 0)
            parts = tile.backward_kernel(
                turn, *blocks, dq_acc, dk_acc, dv_acc,
                soft_cap=soft_cap, scale=scale, fresh=fresh,
            )  # fmt: skip
            tile.work(ring, here, parts, q_ids, kv_ids, columns)

        slot = lax.rem(step, SLOTS)
        part = jnp.where(step == 0, HOME, slot)
        sums = dk.at[part], dv.at[part]
        in_specs, out_specs = _backward_specs(ring, queries_of, owner, first_chunk, first_cut)
        pltpu.emit_pipeline(
            body,
            grid=(ring.batch, ring.kv_heads, ring.chunk_blocks, ring.group, ring.cut_blocks),
            in_specs=in_specs,
            out_specs=out_specs,
            tiling=ring.tiling,
        )(
            q_ids, kv_ids, q, k_slots.at[slot], v_slots.at[slot], dout, lse, delta,
            dq, *sums, dq, *sums,
        )  # fmt: skip

    def work(step, chunk):
        slot = lax.rem(step, SLOTS)

        @pl.when(step > 1)
        def _():
            gradients.sent(1 - slot, chunk)
            gradients.grant(chunk)

        _arrive(ring, keys, step, chunk)
        pl.when(step > 1)(lambda: gradients.wait(slot, chunk))
        owner = ring.owner(ring_ref, step, chunk)
        busy = busy_ref[owner * ring.chunks + chunk] == 1

        @pl.when(busy | (step <= 1))
        def _():
            pl.loop(0, ring.cuts)(functools.partial(attend, step, chunk, owner))

        _leave(ring, keys, step, chunk)

        @pl.when(step > 0)
        def _():
            pl.when(step > 1)(lambda: gradients.take(chunk))
            gradients.send(slot, chunk)

    ring.each(work)

    @pl.loop(0, ring.chunks)
    def _(chunk):
        gradients.sent((ring.size - 1) % SLOTS, chunk)
        gradients.wait(ring.size % SLOTS, chunk)


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
