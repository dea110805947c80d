# SPDX-License-Identifier: Apache-2.0
"""The same bits from experts on every mesh, forward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxcp.layers.fixed_tiles import ROWS, experts_in_tiles, in_tiles
from jaxcp.layers.moe import MoE
from jaxcp.layers.routing import Routing
from jaxcp.sharding import Rules
from jaxcp.weights.placement import place

B, T, D, F, E, K = 2, 200, 48, 40, 8, 3
MESHES = [
    {"seq": 2, "experts": "seq"},
    {"seq": 8, "experts": "seq"},
    {"seq": 8},
    {"expert": 2},
    {"expert": 8},
    {"data": 2, "seq": 2, "expert": 2},
    {"data": 2, "seq": 4, "experts": "data"},
]


def layer(reproducible=True, use_bias=False):
    sizes = {"num_experts": E, "num_experts_per_tok": K, "std": 0.3, "out_std": 0.3}
    options = {"num_shared_experts": 1, "use_bias": use_bias, "reproducible": reproducible}
    moe = MoE(D, F, routing=Routing(scale=1.7), rngs=nnx.Rngs(0), **sizes, **options)
    for i, name in enumerate(("gate_bias", "up_bias", "down_bias") if use_bias else ()):
        variable = getattr(moe, name)
        variable.set_value(jax.random.normal(jax.random.key(i), variable.shape))
    return moe


def x(dtype="float32"):
    return np.random.default_rng(0).normal(size=(B, T, D)).astype(dtype)


apply = jax.jit(lambda moe, x: moe(x)[0])


def bits(y):
    return np.asarray(y, np.float32).view(np.int32)


@functools.cache
def alone(dtype, **options):
    return np.asarray(apply(layer(**options), jnp.asarray(x(), dtype)), np.float32)


def on(mesh_of, axes, dtype="float32", **options):
    axes = dict(axes)
    experts = axes.pop("experts", "expert")
    mesh_of(**axes)
    moe = place(layer(**options), rules=Rules(experts=experts))
    return apply(moe, jax.device_put(x().astype(dtype), P("data", "seq")))


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_the_same_bits(axes, mesh_of):
    np.testing.assert_array_equal(bits(on(mesh_of, axes)), bits(alone("float32")))


@pytest.mark.parametrize("axes", MESHES[1:6:4], ids=str)
def test_the_same_bits_in_bfloat16_and_with_biases(axes, mesh_of):
    options = {"dtype": jnp.bfloat16, "use_bias": True}
    np.testing.assert_array_equal(bits(on(mesh_of, axes, **options)), bits(alone(**options)))


def test_without_it_the_bits_differ(mesh_of):
    """So the test above could fail; and both are the same layer."""
    expected = alone("float32", reproducible=False)
    found = on(mesh_of, {"expert": 8}, reproducible=False)
    assert (bits(found) != bits(expected)).any()
    np.testing.assert_allclose(alone("float32"), expected, atol=2e-5)


def test_gradients_are_those_without_it():
    def loss(moe, x):
        return (moe(x)[0] ** 2).sum()

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
    ours, theirs = (grad(layer(flag), jnp.asarray(x())) for flag in (True, False))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))


def test_widths_that_are_split(mesh_of):
    with pytest.raises(NotImplementedError, match="needs model=1; got model=2"):
        on(mesh_of, {"model": 2})


@pytest.mark.parametrize("sizes", [[0, 300, 0, 5], [128, 0, 256, 0], [0, 0, 0, 0]])
def test_tiles_are_of_one_expert(sizes):
    """Rows of no expert at the end give 0; an expert that has none gets no tile."""
    rows = np.random.default_rng(1).normal(size=(400, 4)).astype(np.float32)
    expert = np.repeat(np.arange(5), [*sizes, 400 - sum(sizes)])
    factor = np.array([2.0, 3, 5, 7, 0], np.float32)

    def compute(weights, rows, expert, sizes):
        assert rows.shape == (ROWS, 4) and sizes.shape == (1,)
        return rows * weights[expert][:, None]

    found = experts_in_tiles(compute, jnp.asarray(factor[:4]), rows, jnp.asarray(sizes))
    np.testing.assert_array_equal(found, rows * factor[expert][:, None])
    np.testing.assert_array_equal(in_tiles(lambda a, b: a + b, rows, rows), 2 * rows)
