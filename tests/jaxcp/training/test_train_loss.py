# SPDX-License-Identifier: Apache-2.0
"""Chunked cross-entropy: equal to the dense one, without its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxcp.training.loss import chunked_cross_entropy

B, T, D, V = 4, 24, 16, 50


def inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, T, D)).astype(dtype)
    head = rng.normal(size=(D, V)).astype(np.float32)
    targets = rng.integers(-1, V, (B, T)).astype(np.int32)
    weights = np.where(targets >= 0, rng.uniform(0.1, 1, (B, T)), 0).astype(np.float32)
    return x, head, targets, weights


def dense(x, head, targets, weights):
    logits = jnp.einsum("btd,dv->btv", x.astype(jnp.float32), head)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return -(weights * picked).sum() / weights.sum()


def chunked(*args, chunk=7):
    total, weight = chunked_cross_entropy(*args, chunk=chunk)
    return total / weight


@pytest.mark.parametrize("axes", [None, {"seq": 4, "data": 2}, {"seq": 8}, {"seq": 2, "model": 2}])
def test_equals_dense_cross_entropy(mesh_of, axes):
    args = inputs()
    value, grads = jax.value_and_grad(dense, argnums=(0, 1))(*args)
    if axes:
        mesh_of(**axes)
        specs = (P("data", "seq", None), P(), P("data", "seq"), P("data", "seq"))
        args = [jax.device_put(x, spec) for x, spec in zip(args, specs, strict=True)]
    got, got_grads = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(*args)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    for a, b in zip(got_grads, grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_target_of_weight_zero_changes_nothing():
    x, head, targets, weights = inputs()
    other = np.where(weights == 0, 3, targets)
    assert chunked(x, head, targets, weights) == chunked(x, head, other, weights)


def test_bfloat16_operands_sum_in_float32():
    x, head, targets, weights = inputs()
    low = chunked(jnp.asarray(x, jnp.bfloat16), head, targets, weights)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, dense(x, head, targets, weights), rtol=2e-2)


def test_never_holds_all_logits():
    tokens, vocab = 4096, 4096
    shapes = [(1, tokens, D), (D, vocab), (1, tokens), (1, tokens)]
    types = [jnp.float32, jnp.float32, jnp.int32, jnp.float32]
    args = [jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, types, strict=True)]

    def temporaries(fn):
        step = jax.jit(jax.value_and_grad(fn, argnums=(0, 1)))
        return step.lower(*args).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * tokens * vocab
    assert temporaries(dense) > logits
    assert temporaries(lambda *a: chunked(*a, chunk=128)) < logits / 4
