# SPDX-License-Identifier: Apache-2.0
"""Decode attention for NVIDIA GPUs, through Pallas and XLA's Triton.

One program takes the queries that share a KV head and an even share of the blocks of slots they
need; the partial results are merged outside. No atomics: a run repeats bit by bit. Interpreted on
CPU; inside `shard_map` the interpreter needs the caller's `check_vma=False`.
"""

import functools
import math
import warnings

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import devices, online_softmax
from pallas_kernels.decode_attention import rows, tuning
from pallas_kernels.dispatch import device_kind, target_platform
from pallas_kernels.flash_attention import blocks as tiles
from pallas_kernels.flash_attention.mask import NO_POSITION, PAD_POSITION
from pallas_kernels.online_softmax import dot

# 2026-11: jax 0.11 and later warn about Pallas-Triton whenever a program is lowered. That is after
# the pallas_call has returned, so it cannot be silenced around the call. It works through jax 0.12.
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)

CORES = 128
"""The number of multiprocessors assumed for a GPU that `devices` does not list."""


def forward(q, cache, layer, pages, q_pos, kv_pos, *, mask, soft_cap, scale):
    tuning.unsupported("triton", q, cache[1])
    interpret = target_platform() == "cpu"
    b, t = q.shape[:2]
    cache = rows.lines(cache, layer, pages, _readable if pages is None else _readable_pages)
    _addressable(cache.k, cache.v)
    kv_heads, hv = cache.k.shape[2], cache.v.shape[3]
    tuned = tuning.blocks("triton", max(cache.k.shape[3], hv), q.dtype, interpret=interpret)
    there = max(cache.k.shape[1], 16)  # slots of a line
    block = min(tuned.rows, 1 << (there.bit_length() - 1))  # no block is longer
    if cache.pages is not None:
        block = math.gcd(block, there)
    slots = max(cache.slots, 16)
    keys_values = [tiles.pad_axis(_whole(x), there, 1) for x in (cache.k, cache.v)]
    scales = [tiles.pad_axis(x, there, 2) for x in (cache.k_scale, cache.v_scale) if x is not None]
    kv_pos = tiles.pad_axis(kv_pos, slots, 1, PAD_POSITION)
    order, counts = rows.block_list(mask, q_pos, kv_pos, block)
    splits = min(order.shape[1], tuned.splits or _splits(b * kv_heads))

    queries = rows.together(_whole(q), kv_heads)
    real = queries.shape[2]
    size = max(16, pl.next_power_of_2(real))
    warps = tuned.warps if size <= 32 else 2 * tuned.warps  # 128 rows in 4 warps spill
    queries = tiles.pad_axis(queries, size, 2)
    row_pos = tiles.pad_axis(rows.positions(q_pos, real // t), size, 1, NO_POSITION)
    # The whole cache is one block to Pallas, which on a GPU is a pointer and no copy.
    line = pl.BlockSpec((cache.k.shape[0], None, there), lambda i, n, b: (0, n, 0))
    plan = [
        *((x, _sequence(x)) for x in (row_pos, kv_pos, order, counts, _lines(cache, b))),
        (queries, _heads(size, queries.shape[3])),
        *((x, _slots(*x.shape)) for x in keys_values),
        *((x, line) for x in scales),
    ]
    arrays, in_specs = zip(*plan, strict=True)
    varies = jax.typeof(q).manual_axis_type  # inside shard_map, as the inputs vary
    results = (size, keys_values[1].shape[3]), (size,)
    kernel = functools.partial(
        _kernel, block=block, there=there, splits=splits, mask=mask, soft_cap=soft_cap, scale=scale,
        paged=cache.pages is not None,
    )  # fmt: skip
    out, lse = pl.pallas_call(
        kernel,
        grid=(splits, kv_heads, b),
        in_specs=in_specs,
        out_specs=[_result(*x) for x in results],
        out_shape=[
            jax.ShapeDtypeStruct((splits, b, kv_heads, *x), jnp.float32, manual_axis_type=varies)
            for x in results
        ],
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=tuned.stages),
        interpret=interpret,
        name="decode_attention",
    )(*arrays)
    out, lse = online_softmax.merge_stacked(out[..., :real, :hv], lse[..., :real])
    return rows.apart(out, t), rows.apart(lse, t)


def _lines(cache, batch):
    """`[B, lines]` of each sequence: an index map of Pallas-Triton sees no array."""
    pages = jnp.arange(batch, dtype=jnp.int32)[:, None] if cache.pages is None else cache.pages
    return cache.first + pages


def _sequence(x):
    return pl.BlockSpec((None, x.shape[1]), lambda i, n, b: (b, 0))


def _result(*shape):
    zeros = [0] * len(shape)
    return pl.BlockSpec((None, None, None, *shape), lambda i, n, b: (i, b, n, *zeros))


def _addressable(*cache):
    for x in cache:
        if _out_of_reach(x):
            raise NotImplementedError(
                f"decode_attention triton: an 8-bit cache of 2^31 to 2^32 entries, {x.shape}, is "
                "out of reach of Pallas' 32-bit offsets; use implementation='xla', or fewer "
                "sequences at a time"
            )


def _out_of_reach(x):
    """Pallas counts elements in 32 bits until an array has more than 2^32 bytes."""
    return x.dtype.itemsize == 1 and 2**31 < math.prod(x.shape) <= 2**32


def _readable(x):
    """Tell whether the kernel reads the cache as it lies."""
    return x.shape[-3] >= 16 and x.shape[-1] == _width(x) and not _out_of_reach(x)


def _readable_pages(x):
    return _readable(x) and x.shape[-3] % 16 == 0


def _width(x):
    return max(16, pl.next_power_of_2(x.shape[-1]))


def _whole(x):
    """Head dim grown to a power of two, at least 16."""
    return tiles.pad_axis(x, _width(x), 3)


def _splits(programs):
    """The workers for a sequence and KV head that fill the GPU twice."""
    chip = devices.find(device_kind())
    cores = chip.nvidia.cores if chip is not None and chip.nvidia is not None else CORES
    return pl.cdiv(2 * cores, programs)


def _heads(size, width):
    return pl.BlockSpec((None, None, size, width), lambda i, n, b: (b, n, 0, 0))


def _slots(every, slots, _, width):
    return pl.BlockSpec((every, slots, None, width), lambda i, n, b: (0, 0, n, 0))


def _kernel(
    q_pos_ref, kv_pos_ref, order_ref, counts_ref, lines_ref, q_ref, k_ref, v_ref, *refs,
    block, there, splits, mask, soft_cap, scale, paged,
):  # fmt: skip
    *scales, out_ref, lse_ref = refs
    q = q_ref[...]
    size, width = out_ref.shape
    q_pos = q_pos_ref[...][:, None]
    full, count = counts_ref[0], counts_ref[1]
    share = pl.cdiv(count, splits)
    begin = jnp.minimum(pl.program_id(0) * share, count)
    end = jnp.minimum(begin + share, count)
    turn = jnp.clip(full, begin, end)

    def step(masked):
        def body(index, carry):
            acc, m, total = carry
            first = order_ref[index] * block
            begin = first
            if masked and not paged:  # blocks divide pages
                # the last block ends where the cache does: some of its slots were another's
                begin = jnp.minimum(first, there - block)
            line = lines_ref[begin // there] if paged else lines_ref[0]
            at = pl.ds(begin % there if paged else begin, block)
            s = dot(q, k_ref[line, at, :].astype(q.dtype), (1, 1))
            if scales:
                s *= scales[0][line, at].astype(jnp.float32)[None, :]
            s, _ = online_softmax.scores(s, scale, soft_cap)
            if masked:
                pos = kv_pos_ref[pl.ds(begin, block)]
                pos = jnp.where(begin + jnp.arange(block) >= first, pos, PAD_POSITION)
                s = jnp.where(tiles.visible(mask, [q_pos], [pos[None, :]]), s, -jnp.inf)
            p, alpha, m, total = online_softmax.update(s, m, total, axis=1)
            if scales:
                p *= scales[1][line, at].astype(jnp.float32)[None, :]
            values = v_ref[line, at, :].astype(q.dtype)
            return acc * alpha + dot(p.astype(q.dtype), values, (1, 0)), m, total

        return body

    zeros = jnp.zeros((size, 1), jnp.float32)
    carry = jnp.zeros((size, width), jnp.float32), jnp.full_like(zeros, -jnp.inf), zeros
    carry = jax.lax.fori_loop(begin, turn, step(False), carry)
    acc, m, total = jax.lax.fori_loop(turn, end, step(True), carry)
    inverse, lse = online_softmax.finish(m, total)
    out_ref[...] = acc * inverse
    lse_ref[...] = lse.reshape(size)
