# SPDX-License-Identifier: Apache-2.0
"""What the Triton flash attention takes beyond the shared suite, and what it visits."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention
from pallas_kernels.flash_attention import NO_POSITION, PAD_POSITION, Mask, blocks
from pallas_kernels.testing.flash_attention import Case, check


@pytest.mark.parametrize(
    "case",
    [
        Case(dtype="float16", head_dim=64, queries=130, keys=130, heads=4, layout="pads"),
        Case(dtype="bfloat16", head_dim=512, value_dim=320, queries=70, keys=70, heads=4),
        Case(scale=-0.3, layout="pads"),
        Case(scale=0.0),
    ],
    ids=["float16", "head dim 512", "negative scale", "no scale"],
)  # fmt: skip
def test_matches_float64(case):
    check("triton", case)


def test_positions_near_the_end_of_int32():
    """The same attention with every position moved up to the last one before a pad's."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 80, 1, 32)), jnp.float32) for _ in range(3))
    line = jnp.arange(80, dtype=jnp.int32)[None]

    def attend(positions):
        return flash_attention(
            q, k, v, q_positions=positions, kv_positions=positions, window=30,
            implementation="triton",
        )  # fmt: skip

    for near, far in zip(attend(line), attend(line + (PAD_POSITION - 80)), strict=True):
        np.testing.assert_array_equal(near, far)


@pytest.mark.parametrize("along", ["q", "kv"])
def test_a_zigzag_pair_visits_only_blocks_that_hold_something(along):
    """Every step of a causal ring of 8, two chunks a device: counted from positions alone."""
    devices, chunk, q_block, kv_block = 8, 256, 128, 64
    ends = [
        np.r_[d * chunk : (d + 1) * chunk, (15 - d) * chunk : (16 - d) * chunk]
        for d in range(devices)
    ]
    position = jnp.asarray(np.stack(ends), jnp.int32)
    pairs = np.stack(np.meshgrid(range(devices), range(devices))).reshape(2, -1)
    q, kv = position[pairs[0]], position[pairs[1]]
    bounds = [
        blocks.block_bounds(blocks.token_ids(x, None, x.shape[1], pad), size, pad)
        for x, pad, size in ((q, NO_POSITION, q_block), (kv, PAD_POSITION, kv_block))
    ]
    order, counts = blocks.block_lists(Mask(), *bounds, False, along=along)
    seen = np.asarray(q)[:, :, None] >= np.asarray(kv)[:, None, :]
    seen = seen.reshape(len(q), -1, q_block, kv.shape[1] // kv_block, kv_block)
    some, every = seen.any((2, 4)), seen.all((2, 4))
    if along == "q":
        some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
    order, counts = np.asarray(order), np.asarray(counts)
    np.testing.assert_array_equal(counts[..., 0], every.sum(-1))
    np.testing.assert_array_equal(counts[..., 1], some.sum(-1))
    place = np.arange(order.shape[-1])
    for visited, wanted in (
        (place < counts[..., :1], every),
        (place < counts[..., 1:], some),
    ):
        assert np.take_along_axis(wanted, order, -1)[visited].all()
