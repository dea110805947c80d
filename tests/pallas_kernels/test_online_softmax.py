# SPDX-License-Identifier: Apache-2.0
"""`merge` is associative, has a neutral element, and never makes a NaN."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pallas_kernels.online_softmax import merge, merge_stacked

ROWS, H = 3, 2
merge = jax.jit(merge)
merge_stacked = jax.jit(merge_stacked)
SOME = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)  # XLA flushes those to zero
VALUES = st.floats(-8, 8, width=32, allow_subnormal=False)


@st.composite
def parts(draw):
    """A partial result; rows that saw nothing are `(0, -inf)`."""
    lse = draw(arrays.arrays(np.float32, ROWS, elements=st.just(-np.inf) | SOME))
    out = draw(arrays.arrays(np.float32, (ROWS, H), elements=VALUES))
    return np.where(np.isneginf(lse)[:, None], np.float32(0), out), lse


def close(a, b):
    # a lse of 1e4 has steps of 1e-3 in float32, and weights are as fine as the lse
    step = 4 * np.spacing(np.float32(1e4))
    np.testing.assert_allclose(a[0], b[0], atol=8 * step, rtol=0)
    np.testing.assert_allclose(a[1], b[1], atol=step, rtol=0)


@given(parts(), parts(), parts())
def test_order_and_grouping_do_not_matter(a, b, c):
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    close(left, right)
    close(merge(a, b), merge(b, a))
    stacked = merge_stacked(*(jnp.stack(x) for x in zip(a, b, c, strict=True)))
    close(left, stacked)
    assert not any(np.isnan(x).any() for x in (*left, *stacked))


@given(parts())
def test_neutral_element(a):
    nothing = np.zeros((ROWS, H), np.float32), np.full(ROWS, -np.inf, np.float32)
    for merged in (merge(a, nothing), merge(nothing, a)):
        np.testing.assert_array_equal(merged[0], a[0])
        np.testing.assert_array_equal(merged[1], a[1])


def test_gradients_of_rows_that_saw_nothing_are_finite():
    nothing = jnp.zeros((ROWS, H)), jnp.full(ROWS, -jnp.inf)
    grads = jax.grad(lambda out: merge((out, nothing[1]), nothing)[0].sum())(nothing[0])
    assert np.isfinite(grads).all()


def test_it_is_the_softmax_over_both_sets():
    rng = np.random.default_rng(0)
    scores, values = rng.normal(size=(ROWS, 10)), rng.normal(size=(10, H))

    def attend(keys):
        p = np.exp(scores[:, keys])
        part = p @ values[keys] / p.sum(1, keepdims=True), np.log(p.sum(1))
        return tuple(x.astype(np.float32) for x in part)

    out, lse = merge(attend(slice(0, 3)), attend(slice(3, 10)))
    whole = attend(slice(0, 10))
    np.testing.assert_allclose(out, whole[0], rtol=1e-5)
    np.testing.assert_allclose(lse, whole[1], rtol=1e-5)


def test_gradients_of_lse_are_finite_where_one_side_saw_nothing():
    """The weight of what saw nothing stays 0: no gradient, whatever comes back through `lse`."""
    lse = jnp.array([[-jnp.inf, -jnp.inf, 1.0], [-jnp.inf, 2.0, 1.0]])
    out = jnp.where(jnp.isneginf(lse), 0.0, jnp.array([[1.0], [3.0]]))[..., None]

    def one_by_one(out, lse):
        return merge((out[0], lse[0]), (out[1], lse[1]))

    for together in (one_by_one, merge_stacked):
        found, pull = jax.vjp(together, out, lse)
        dout, dlse = pull(jax.tree.map(jnp.ones_like, found))
        np.testing.assert_allclose(dout[..., 0], [[0, 0, 0.5], [0, 1, 0.5]], atol=1e-6)
        # of two equal weights: d out / d lse is half of the difference of out, d lse / d lse a half
        np.testing.assert_allclose(dlse, [[0, 0, 0.0], [0, 1, 1.0]], atol=1e-6)
