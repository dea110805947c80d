# SPDX-License-Identifier: Apache-2.0
"""Compressed blocks over shards, against the definition in float64."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxcp import Contiguous, Striped, Zigzag
from jaxcp.attention.blocks import compress
from jaxcp.attention.places import PagedSlots
from jaxcp.attention.slots import block_slots
from jaxcp.context_parallel.shards import on_shards
from pallas_kernels import PAD_POSITION

B, D = 2, 3
TOKENS = P("data", "seq")


@functools.cache
def rows(length, halves):
    rng = np.random.default_rng(length)
    return rng.normal(size=(B, length, halves * D)), 3 * rng.normal(size=(B, length, halves * D))


def softmax_sum(values, gates):
    weights = np.exp(gates - gates.max(1, keepdims=True))
    return (weights * values).sum(1) / weights.sum(1)


def expected(values, gates, ratio, overlap):
    """Entry by entry, as the definition says."""
    out = []
    for w in range(values.shape[1] // ratio):
        now, before = (slice(max(i, 0) * ratio, (i + 1) * ratio) for i in (w, w - 1))
        parts = [(values[:, now, -D:], gates[:, now, -D:])]
        parts += [(values[:, before, :D], gates[:, before, :D])] if overlap and w else []
        out.append(softmax_sum(*(np.concatenate(x, 1) for x in zip(*parts, strict=True))))
    return np.stack(out, 1)


@functools.partial(jax.jit, static_argnames=("ratio", "overlap", "layout"))
def jitted(values, gates, positions, ratio, overlap, layout):
    return compress(values, gates, positions, ratio=ratio, overlap=overlap, layout=layout)


def laid_out(length, halves, layout, shards, mesh_of):
    values, gates = rows(length, halves)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (B, length))
    there = {"v": values.astype(np.float32), "g": gates.astype(np.float32), "positions": positions}
    there = layout.permute(there, shards)
    if shards > 1:
        mesh_of(seq=shards)
        there = jax.device_put(there, TOKENS)
    return there["v"], there["g"], there["positions"]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "length, ratio, layout, shards",
    [
        (37, 8, Zigzag(), 1),
        (37, 8, Zigzag(), 4),  # pieces of 5 tokens: a block lies on three of them
        (64, 4, Zigzag(), 8),  # aligned
        (9, 4, Contiguous(), 8),  # shards of pads alone
    ],
)  # fmt: skip
def test_entries_are_those_of_the_definition(length, ratio, overlap, layout, shards, mesh_of):
    arrays = laid_out(length, 2 if overlap else 1, layout, shards, mesh_of)
    entries, blocks = map(np.asarray, jitted(*arrays, ratio, overlap, layout))
    count = length // ratio
    wanted = expected(*rows(length, 2 if overlap else 1), ratio, overlap)
    for row in range(B):
        order = np.argsort(blocks[row], kind="stable")
        assert blocks[row, order[:count]].tolist() == list(range(count))
        assert (blocks[row, order[count:]] == PAD_POSITION).all()
        np.testing.assert_allclose(entries[row, order[:count]], wanted[row], atol=2e-6, rtol=0)


def test_tokens_in_another_order_than_the_layouts_give_nan(mesh_of):
    mesh_of(seq=4)
    values, gates = (x.astype(np.float32) for x in rows(64, 1))
    positions = np.broadcast_to(np.arange(64, dtype=np.int32), (B, 64))
    there = Striped().permute({"v": values, "g": gates, "positions": positions}, 4)
    there = jax.device_put(there, TOKENS)
    entries, blocks = jitted(there["v"], there["g"], there["positions"], 8, False, Zigzag())
    owned = np.asarray(blocks) != PAD_POSITION
    assert owned.any() and np.isnan(np.asarray(entries)[owned]).all()
    with pytest.raises(NotImplementedError, match=r"Striped\(\) over 4 shards has 16; use Zigzag"):
        jitted(there["v"], there["g"], there["positions"], 8, False, Striped())


def slots_of(lengths, pages, page, ratio, shards):
    """`{(row, block): (page of the pool, slot)}` of all complete blocks, counted one by one."""
    listed, found = pages.shape[1] // shards, {}
    for row, length in enumerate(lengths):
        ends = [w * ratio + ratio - 1 for w in range(length // ratio)]
        for w, end in enumerate(ends):
            place = end // page
            number = pages[row, place % shards * listed + place // shards]
            slot = sum(other // page == place for other in ends[:w])
            found[row, w] = (place % shards) * pages.size // shards + number, slot
    return found


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "page, ratio", [(32, 4), (32, 128), (64, 128), (256, 128), (32, 12), (8, 8), (7, 3), (3, 7)]
)
def test_entries_lie_in_the_pages_of_their_last_tokens(page, ratio, shards, mesh_of):
    """Written in two parts, into pages that hold other entries, and read again in order."""
    rng, count = np.random.default_rng(0), 5  # pages a shard
    lengths = np.asarray([count * shards * page, count * shards * page - page - 1], np.int32)
    tables = [rng.permutation(2 * count).reshape(2, count) for _ in range(shards)]
    pages = np.concatenate(tables, axis=1).astype(np.int32)
    number = np.arange(lengths[0] // ratio, dtype=np.int32)
    number = np.where(number < lengths[:, None] // ratio, number, PAD_POSITION)
    new = rng.normal(size=(*number.shape, D)).astype(np.float32)
    shape = 1, 2 * count * shards, block_slots(page, ratio), D
    before = rng.normal(size=shape).astype(np.float32)
    if shards > 1:
        mesh_of(seq=shards)

    def local(kept, lengths, place):
        for part in (number % 2 == 0, number % 2 == 1):
            blocks = np.where(part, number, PAD_POSITION)
            kept = place.write_blocks(kept, 0, new, blocks, ratio)
        return kept, *place.read_blocks(kept, 0, lengths, ratio)

    place = PagedSlots(np.zeros((2, 1), np.int32), pages, None, page=page, sharded=False)
    stack, rows = jax.P(*PagedSlots.block_stack), jax.P("data", "seq")
    run = jax.jit(on_shards(local, (stack, jax.P("data"), place.specs), (stack, rows, rows)))
    kept, entries, blocks = map(np.asarray, run(before, lengths, place))
    wanted, expected_slots = before.copy(), slots_of(lengths, pages, page, ratio, shards)
    for block, slot in expected_slots.items():
        wanted[(0, *slot)] = new[block]
    np.testing.assert_array_equal(kept, wanted)
    for row in range(2):
        real = blocks[row] != PAD_POSITION
        assert sorted(blocks[row][real]) == list(range(lengths[row] // ratio))
        np.testing.assert_array_equal(entries[row][real], new[row, blocks[row][real]])
        for own, there in zip(np.split(blocks[row], shards), np.split(real, shards), strict=True):
            assert (np.diff(own[there]) > 0).all()
