# SPDX-License-Identifier: Apache-2.0
"""Infinities that attention allows reach no result as NaN, and no gradient.

That sinks of -inf give what float64 gives, forward and backward, is a part of the shared suites.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PAD_POSITION, decode_attention, flash_attention
from pallas_kernels.flash_attention import apply_sinks
from pallas_kernels.flash_attention.api import IMPLEMENTATIONS

QUICK = {"xla_backend_optimization_level": 0}
NOTHING = -np.inf
SINKS = np.array([NOTHING, 0.5, np.inf, np.nan], np.float32)


def test_a_sink_of_every_kind():
    """A row that sees one key of score 0, and one that sees nothing: values and gradients."""
    lse = jnp.tile(jnp.array([0.0, NOTHING])[:, None], (1, 4))
    out = jnp.where(jnp.isneginf(lse), 0.0, 3.0)[..., None]
    (got, total), pull = jax.vjp(apply_sinks, out, lse, jnp.asarray(SINKS))
    kept = 1 / (1 + np.exp(0.5))
    nan = np.nan
    np.testing.assert_allclose(got[..., 0], [[3, 3 * kept, 0, nan], [0, 0, 0, nan]], rtol=1e-6)
    wanted = [[0, 0.5 - np.log(1 - kept), np.inf, nan], [NOTHING, 0.5, np.inf, nan]]
    np.testing.assert_allclose(total, wanted, rtol=1e-6)

    dout, dlse, dsinks = pull((jnp.ones_like(got), jnp.ones_like(total)))
    np.testing.assert_allclose(dout[0, :3, 0], [1, kept, 0], rtol=1e-6)
    slope = 3 * kept * (1 - kept)  # of out, along lse and against the sink
    np.testing.assert_allclose(dlse[:, :3], [[1, kept + slope, 0], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(dsinks[:3], [0, 1 - kept - slope + 1, 0], rtol=1e-6)


def arrays():
    """Three tokens, the last one a pad; the second is alone in its document, as the first is."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 3, n, 16)), jnp.float32) for n in (2, 1, 1))
    ids = np.array([[0, 1, PAD_POSITION]], np.int32), np.array([[0, 1, 1]], np.int32)
    return (q, k, v), *map(jnp.asarray, ids)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_gradient_through_a_row_that_sees_nothing(implementation):
    """Even where something comes back through its `lse`, and with nothing carried in."""
    (q, k, v), positions, segments = arrays()
    carry = jnp.zeros_like(q), jnp.full(q.shape[:3], NOTHING)

    def attend(q, k, v, sinks, carry):
        return flash_attention(
            q, k, v, q_positions=positions, kv_positions=positions, q_segment_ids=segments,
            kv_segment_ids=segments, sinks=sinks, carry=carry, implementation=implementation,
        )  # fmt: skip

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(*arrays):
        found, pull = jax.vjp(attend, *arrays)
        return found, pull(jax.tree.map(jnp.ones_like, found))

    (out, lse), (dq, dk, dv, dsinks, dcarry) = run(q, k, v, jnp.array([NOTHING, 0.0]), carry)
    score = np.einsum("tnh,th->tn", q[0, :2], k[0, :2, 0]) / 4
    np.testing.assert_allclose(out[0, :2, 0], v[0, :2, 0], rtol=1e-5)
    np.testing.assert_allclose(lse[0, :2, 0], score[:, 0], rtol=1e-5)
    assert not np.any(out[0, 2]) and lse[0, 2].tolist() == [NOTHING, 0.0]
    assert np.isfinite(dq).all() and not np.any(dq[0, 2])
    for gradient in (dk, dv):
        assert np.isfinite(gradient).all() and not np.any(gradient[0, 2])
    # without a sink a lone key has weight 1: only lse moves, by its score
    np.testing.assert_allclose(dq[0, :2, 0], k[0, :2, 0] / 4, rtol=1e-5)
    kept = 1 / (1 + np.exp(-score[:, 1]))
    through_out = kept * (1 - kept) * np.asarray(v[0, :2, 0]).sum(1)
    assert dsinks[0] == 0  # and of the other, 1 from the row in which it is alone
    np.testing.assert_allclose(dsinks[1], 1 + (1 - kept - through_out).sum(), rtol=1e-5)
    assert not any(np.any(x) for x in jax.tree.leaves(dcarry))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_infinite_sinks_of_a_cache(implementation):
    """Decoding: a row with one key, and a pad."""
    (q, k, v), positions, _ = arrays()
    positions = positions.at[0, 1].set(0)
    kv_positions = jnp.array([[0, PAD_POSITION, PAD_POSITION]], jnp.int32)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(sinks):
        return decode_attention(
            q, k, v, q_positions=positions, kv_positions=kv_positions, sinks=sinks,
            implementation=implementation,
        )  # fmt: skip

    out, lse = run(jnp.array([NOTHING, np.inf]))
    np.testing.assert_allclose(out[0, :2, 0], np.tile(v[0, :1, 0], (2, 1)), rtol=1e-5)
    assert np.isfinite(lse[0, :2, 0]).all() and lse[0, 2, 0] == NOTHING
    assert not np.any(out[0, 2]) and not np.any(out[:, :, 1]) and np.isposinf(lse[..., 1]).all()
