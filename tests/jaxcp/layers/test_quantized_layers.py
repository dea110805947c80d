# SPDX-License-Identifier: Apache-2.0
"""A model with quantized weights computes what it computes with the weights that they stand for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from slow import slow_but
from tiny_checkpoints import FIXTURES

import jaxcp
from jaxcp.layers.linear import linear
from jaxcp.layers.quantized import (
    QuantizedLinear,
    misfit,
    quantized_model,
    quantized_names,
    widened,
    widened_model,
)
from jaxcp.layers.stack import members
from jaxcp.training.config import LossConfig
from jaxcp.training.objective import objective
from jaxcp.weights.placement import place
from pallas_kernels import quantize

MESHES = {
    "model=2": {"model": 2},
    "expert=2": {"expert": 2},
    "seq=2 x model=2": {"seq": 2, "model": 2},
}
# Sums of float32 in another order; an expert chosen differently would show as an error of 0.1.
CLOSE = {"atol": 2e-4, "rtol": 0}


@functools.cache
def quantized(name, only="all"):
    model = jaxcp.load(FIXTURES / f"{name}-tiny")[0]
    return quantized_model(model, only=only)


@functools.cache
def expected(name, only="all"):
    return logits(widened_model(quantized(name, only)))


def logits(model):
    tokens = np.random.default_rng(0).integers(0, 256, (1, 32)).astype(np.int32)
    return np.asarray(jaxcp.logits(model, tokens))


def spread(name, axes, mesh_of):
    model, wanted = quantized(name), expected(name)
    mesh_of(**axes)
    np.testing.assert_allclose(logits(place(model)), wanted, **CLOSE)


@pytest.mark.parametrize(
    "name", slow_but(["hy3", "deepseek-v3", "deepseek-v4"], lambda name: name == "hy3")
)
def test_logits(name):
    np.testing.assert_allclose(logits(quantized(name)), expected(name), **CLOSE)


@pytest.mark.parametrize("axes", slow_but(MESHES.values(), lambda axes: len(axes) == 2), ids=MESHES)
def test_logits_over_a_mesh(axes, mesh_of):
    spread("hy3", axes, mesh_of)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, axes",
    [
        ("deepseek-v3", "model=2"),
        ("deepseek-v32", "expert=2"),
        ("deepseek-v4", "model=2"),
        ("deepseek-v4", "seq=2 x model=2"),
    ],
)
def test_logits_of_other_models_over_a_mesh(name, axes, mesh_of):
    """Experts over every mesh are `hy3`'s, above."""
    spread(name, MESHES[axes], mesh_of)


def test_what_is_quantized():
    every = names("deepseek-v3")
    assert len(every) > 20, every
    experts = names("deepseek-v3", "experts")
    assert len(experts) == 2 * 3 and set(experts) < set(names("deepseek-v3"))
    assert not any("kv_up" in name or "router" in name or "embed" in name for name in every)
    linear_weight = quantized("hy3").layers[0].attention.o.get_value()
    assert isinstance(linear_weight, QuantizedLinear) and linear_weight.shape == (4, 16, 64)
    assert linear_weight.matrix.values.shape == (1, 64, 64)


def names(name, only="all"):
    return [x for stack in quantized_names(quantized(name, only)) for x in members(stack)]


def test_a_plain_weight_is_the_einsum(mesh_of):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 4, 8)), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(4, 8, 16)), jnp.float32)
    wanted = jnp.einsum("btnh,nhd->btd", x, w.astype(jnp.bfloat16))
    assert (linear("btnh,nhd->btd", x, w) == wanted).all()


@pytest.mark.parametrize(
    "subscripts, shape, summed",
    [
        ("btd,dnh->btnh", (16, 4, 8), 1),
        ("btnh,nhd->btd", (4, 8, 16), 2),
        ("pbtc,pcd->btd", (2, 8, 16), 2),
        ("btsc,cd->btsd", (8, 16), 1),
    ],
)
def test_every_form_of_product(subscripts, shape, summed):
    rng = np.random.default_rng(0)
    ours, axes = subscripts.split("->")[0].split(",")
    sizes = dict(zip(axes, shape, strict=True)) | {"b": 2, "t": 3, "s": 2}
    x = rng.normal(size=[sizes[axis] for axis in ours])
    rows = int(np.prod(shape[:summed]))
    matrix = quantize(jnp.asarray(rng.normal(size=(1, rows, np.prod(shape) // rows)), jnp.float32))
    weight = QuantizedLinear(matrix, shape, summed)
    found = linear(subscripts, jnp.asarray(x, jnp.float32), weight)
    wanted = np.einsum(subscripts, x, np.asarray(widened(weight), np.float64))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    with pytest.raises(ValueError, match="sums over its first"):
        linear("btx,xd->dbt", jnp.ones((2, 3, shape[0])), weight)


def test_the_gradient_of_the_input():
    rng = np.random.default_rng(0)
    weight = QuantizedLinear(
        quantize(jnp.asarray(rng.normal(size=(1, 16, 32)), jnp.float32)), (16, 4, 8), 1
    )
    x = jnp.asarray(rng.normal(size=(2, 3, 16)), jnp.float32)
    found = jax.grad(lambda x: (linear("btd,dnh->btnh", x, weight) ** 2).sum())(x)
    w = np.asarray(widened(weight), np.float64).reshape(16, 32)
    np.testing.assert_allclose(found, 2 * x @ w @ w.T, rtol=1e-4, atol=1e-4)


def test_a_mesh_that_cuts_through_a_scale():
    wide = jax.eval_shape(lambda: quantize(jnp.ones((4, 384, 256)), jnp.float8_e4m3fn, block=True))
    spec = P("expert", "model", None)
    assert misfit(wide, spec, {"expert": 2, "model": 3}) is None
    assert "at most model=3" in misfit(wide, spec, {"model": 6})
    heads = QuantizedLinear(wide, (6, 64, 256), 2)
    assert "128 of 384 belong" in misfit(heads, P("model", None, None), {"model": 6})
    assert "(6, 64, 256) by model=4" in misfit(heads, P("model", None, None), {"model": 4})
    with pytest.raises(NotImplementedError, match="axes 0 and 2"):
        misfit(heads, P(None, "model", None), {"model": 2})


def test_training_and_saving_say_that_they_cannot(tmp_path):
    model = quantized("hy3")
    with pytest.raises(NotImplementedError, match=r"no gradient flows.*layers\.0\.attention\.k\."):
        objective(model, {}, LossConfig(), scales=None, chunk=1)
    with pytest.raises(NotImplementedError, match="jaxcp quantize"):
        jaxcp.save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_device_holds_its_part_alone(mesh_of):
    model = quantized("hy3")
    mesh_of(model=2, expert=2)
    placed = place(model).layers[1]
    o, up = placed.attention.o.get_value().matrix, placed.mlp.up.get_value()
    assert o.values.addressable_shards[0].data.shape == (1, 32, 64)
    assert o.scales.addressable_shards[0].data.shape == (1, 1, 64)
    assert up.values.addressable_shards[0].data.shape == (4, 64, 16)
    assert up.scales.addressable_shards[0].data.shape == (4, 1, 16)


@pytest.mark.slow
def test_reproducible_experts():
    model = quantized("hy3")
    for layer in model.layers.stacks[1:]:
        layer.mlp.reproducible = True
    alone = logits(model)
    np.testing.assert_allclose(alone, expected("hy3"), **CLOSE)
    for layer in model.layers.stacks[1:]:
        layer.mlp.reproducible = False
