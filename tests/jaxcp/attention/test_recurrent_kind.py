# SPDX-License-Identifier: Apache-2.0
"""State of a recurrent layer: latest tokens may turn out to be none, and others follow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcp.attention.pool import OverPool, empty_pool
from jaxcp.attention.recurrent import Recurrent
from jaxcp.context_parallel.gated_delta import context_parallel_convolution
from jaxcp.layout import Zigzag
from pallas_kernels import PAD_POSITION
from pallas_kernels.gated_delta import gated_delta

CLOSE = {"atol": 1e-5, "rtol": 0}
HEADS = (2, 6), (2, 6), (4, 8)
TAPS, WIDTH, FEW = 4, 40, 5


def drawn(rng, rows, tokens, by_channel):
    """Inputs of the convolutions, logarithms of decays, and beta, of so many tokens."""
    inputs = tuple(rng.normal(size=(rows, tokens, *heads)).astype("f") for heads in HEADS)
    shape = (rows, tokens, HEADS[2][0], *HEADS[1][1:] * by_channel)
    return (
        inputs,
        -rng.uniform(0.01, 1, shape).astype("f"),
        rng.uniform(0, 1, shape[:3]).astype("f"),
    )


def computed(attend, taps, inputs, log_decay, beta):
    q, k, v = attend.convolved(inputs, taps)
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    return attend.delta(q, k, v, log_decay, beta)


def whole(taps, inputs, log_decay, beta):
    """The same of whole rows, token by token."""
    positions = jnp.broadcast_to(jnp.arange(beta.shape[1]), beta.shape[:2])
    q, k, v = context_parallel_convolution(inputs, taps, positions, layout=Zigzag())
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    return gated_delta(q, k, v, log_decay, beta, implementation="reference")[0]


def pool_of(heads, decay, back=FEW):
    def maker(room):
        return Recurrent.empty(
            room, layers=2, num_heads=4, key_dim=6, value_dim=8, width=TAPS - 1, inputs=heads,
            decay=decay,
        )  # fmt: skip

    return empty_pool({"r": maker}, pages=1, page=32, states=3, dtype=jnp.float32, rolled_back=back)


@jax.jit
def step(pool, taps, arrays, before, added):
    """`(out of the second layer, pool)`; rows lie in the states 2 and 0."""
    places = jnp.arange(arrays[2].shape[1], dtype=jnp.int32)
    positions = jnp.where(places < added[:, None], before[:, None] + places, PAD_POSITION)
    attend = OverPool(
        pool, positions, before, added, pages=jnp.zeros((2, 1), jnp.int32),
        states=jnp.where(added > 0, jnp.asarray([2, 0]), 3), sharded=False,
    )  # fmt: skip
    of_layer = attend.of(attend.kept("r"), jnp.int32(1))
    out = computed(of_layer, taps, *arrays)
    attend.keep("r", of_layer.state)
    return out, attend.pool_after


@pytest.mark.parametrize("by_channel", [False, True])
def test_tokens_that_turn_out_to_be_none_leave_nothing(by_channel):
    """Steps of one to five tokens, of which the next one counts some, beside longer ones."""
    rng = np.random.default_rng(0)
    taps = tuple(rng.normal(size=(TAPS, *heads)).astype("f") for heads in HEADS)
    arrays = drawn(rng, 2, WIDTH, by_channel)
    expected = whole(taps, *arrays)
    pool, before = pool_of(HEADS, (4, 6)[: 1 + by_channel]), np.zeros(2, np.int32)
    while before.min() < WIDTH:
        size = int(rng.choice([1, FEW, 9]))
        added = np.minimum(rng.integers(0, size + 1, 2), WIDTH - before).astype(np.int32)
        wrong = drawn(rng, 2, size, by_channel)
        counted = added if size > FEW else rng.integers(0, added + 1).astype(np.int32)

        def mixed(right, wrong, before=before, counted=counted, size=size):
            rows = [
                np.concatenate([r[b : b + n], w[: size - n]])
                for r, w, b, n in zip(right, wrong, before, counted, strict=True)
            ]
            return jnp.asarray(np.stack(rows))

        out, pool = step(pool, taps, jax.tree.map(mixed, arrays, wrong), before, added)
        for row, (start, count) in enumerate(zip(before, counted, strict=True)):
            truth = expected[row, start : start + count]
            np.testing.assert_allclose(out[row, :count], truth, **CLOSE)
        before = before + counted


def test_a_state_that_went_on_is_no_start():
    """NaN, which engines report, where more is taken back than waits, or is missing."""
    rng = np.random.default_rng(1)
    taps = tuple(rng.normal(size=(TAPS, *heads)).astype("f") for heads in HEADS)
    arrays, pool = jax.tree.map(jnp.asarray, drawn(rng, 2, FEW, False)), pool_of(HEADS, (4,))
    for before in (0, 5):
        of_rows = np.full(2, before, np.int32)
        out, pool = step(pool, taps, arrays, of_rows, np.full(2, FEW, np.int32))
        assert np.isfinite(out).all()
    out, _ = step(pool, taps, arrays, np.array([4, 11], np.int32), np.full(2, FEW, np.int32))
    assert np.isnan(out).all()


def test_what_is_never_taken_back_costs_nothing():
    pool = pool_of(HEADS, (4,), back=0)
    assert not pool.rolls_back and pool_of(HEADS, (4,)).rolls_back
    assert len(jax.tree.leaves(pool.layers)) == 4
