# SPDX-License-Identifier: Apache-2.0
"""Compressed blocks over shards, against the definition in float64."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxcp import Contiguous, Striped, Zigzag
from jaxcp.attention.blocks import compress
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


def on_shards(length, halves, layout, shards, mesh_of):
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
    arrays = on_shards(length, 2 if overlap else 1, layout, shards, mesh_of)
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
