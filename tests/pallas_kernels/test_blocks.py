# SPDX-License-Identifier: Apache-2.0
"""The block plan drops no visible pair, and skips what it can."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import NO_POSITION, PAD_POSITION, Mask, blocks, tuning

QUERIES, KEYS = 16, 8  # a block


def plan(mask, q, kv, q_seg=None, kv_seg=None, *, along):
    """`(full, partial)` sets of (query block, key block) that the lists name."""
    q, kv = jnp.where(q == PAD_POSITION, NO_POSITION, q)[None], kv[None]
    q_seg, kv_seg = (None if x is None else x[None] for x in (q_seg, kv_seg))
    q_bounds = blocks.block_bounds(
        blocks.token_ids(q, q_seg, q.shape[1], NO_POSITION), QUERIES, NO_POSITION
    )
    kv_bounds = blocks.block_bounds(
        blocks.token_ids(kv, kv_seg, kv.shape[1], PAD_POSITION), KEYS, PAD_POSITION
    )
    order, counts = blocks.block_lists(mask, q_bounds, kv_bounds, q_seg is not None, along=along)
    full, partial = set(), set()
    for row, (columns, (first, last)) in enumerate(zip(order[0], counts[0], strict=True)):
        assert sorted(columns.tolist()) == list(range(len(columns)))
        for group, names in ((full, columns[:first]), (partial, columns[first:last])):
            group |= {(row, int(c)) if along == "kv" else (int(c), row) for c in names}
    return full, partial


@pytest.mark.parametrize("along", ["q", "kv"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("documents", [1, 3])
def test_against_every_pair(along, causal, window, documents):
    rng = np.random.default_rng(0)
    mask = Mask(causal=causal, window=window)
    for trial in range(6):
        positions = np.arange(96) if trial % 2 else rng.permutation(96)
        q, kv = positions[:64].astype(np.int32), positions.astype(np.int32)
        segments = np.sort(rng.integers(0, documents, 96)).astype(np.int32)
        if trial > 3:
            q[rng.integers(0, 64, 20)] = PAD_POSITION
            kv[rng.integers(0, 96, 40)] = kv[:KEYS] = PAD_POSITION
        ids = () if documents == 1 else (jnp.asarray(segments[:64]), jnp.asarray(segments))
        full, partial = plan(mask, jnp.asarray(q), jnp.asarray(kv), *ids, along=along)
        hidden = np.where(q == PAD_POSITION, NO_POSITION, q)
        seen = np.asarray(mask.visible(jnp.asarray(hidden), jnp.asarray(kv), *ids))
        tiles = seen.reshape(64 // QUERIES, QUERIES, 96 // KEYS, KEYS).swapaxes(1, 2)
        for i, j in np.ndindex(tiles.shape[:2]):
            if (i, j) in full:
                assert tiles[i, j].all()
            elif (i, j) not in partial:
                assert not tiles[i, j].any()
        assert not full & partial


def test_a_causal_ring_in_zigzag_visits_what_holds_a_pair():
    """And masks what a diagonal crosses: of each pair of shards, no block more."""
    early_and_late = np.arange(8 * 64, dtype=np.int32).reshape(16, 32)
    shards = [np.concatenate([early_and_late[r], early_and_late[15 - r]]) for r in range(8)]
    for q, kv in itertools.product(shards, shards):
        full, partial = plan(Mask(), jnp.asarray(q), jnp.asarray(kv), along="kv")
        visible = (kv <= q[:, None]).reshape(64 // QUERIES, QUERIES, 64 // KEYS, KEYS)
        some, every = visible.any((1, 3)), visible.all((1, 3))
        assert full == {*zip(*np.nonzero(every), strict=True)}
        assert partial == {*zip(*np.nonzero(some & ~every), strict=True)}


@pytest.mark.parametrize("along", ["q", "kv"])
def test_rows_that_take_turns_get_the_same_lists(along, monkeypatch):
    lines = np.tile(np.arange(96, dtype=np.int32), (3, 1))
    positions = jnp.asarray(np.random.default_rng(0).permuted(lines, axis=1))
    bounds = [
        blocks.block_bounds(blocks.token_ids(positions, None, 96, pad), size, pad)
        for size, pad in ((QUERIES, NO_POSITION), (KEYS, PAD_POSITION))
    ]
    order, counts = blocks.block_lists(Mask(window=60), *bounds, False, along=along)
    for at_once in (1, 5):  # rows: 6 or 12, so that the last turn is not full
        width = order.shape[2]
        monkeypatch.setattr(blocks, "MOST_PAIRS", at_once * 3 * width)
        again = blocks.block_lists(Mask(window=60), *bounds, False, along=along)
        assert again[0].dtype == jnp.int16
        np.testing.assert_array_equal(order, again[0])
        np.testing.assert_array_equal(counts, again[1])


def test_work_is_what_the_mask_leaves():
    """Causal over n blocks of queries: the blocks on the diagonal are partial, none is wasted."""
    line = jnp.arange(128, dtype=jnp.int32)
    full, partial = plan(Mask(), line, line, along="kv")
    assert (len(full), len(partial)) == (2 * (0 + 1 + 2 + 3 + 4 + 5 + 6 + 7), 2 * 8)
    full, partial = plan(Mask(window=1), line, line, along="q")
    assert (len(full), len(partial)) == (0, 2 * 8)
    documents = line // 32  # each is two blocks of queries, four of keys
    full, partial = plan(Mask(causal=False), line, line, documents, documents, along="kv")
    assert (len(full), len(partial)) == (4 * 2 * 4, 0)


def test_a_row_of_the_table_is_found_for_all_that_is_supported():
    for op in ("triton_forward", "triton_dq", "triton_dkv"):
        for head_dim in (16, 64, 65, 128, 256):
            for dtype in (jnp.bfloat16, jnp.float32):
                found = tuning.blocks(op, head_dim, dtype, interpret=False)
                assert found.q >= 16 and found.kv >= 16
    with pytest.raises(NotImplementedError, match="head_dim=512"):
        tuning.blocks("triton_dq", 512, jnp.float32, interpret=False)
