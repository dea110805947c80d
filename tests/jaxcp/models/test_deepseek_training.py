# SPDX-License-Identifier: Apache-2.0
"""Drafts of DeepSeek, Qwen and MiMo in training: their loss is its definition, on any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow import slow_but
from tiny_checkpoints import FIXTURES

import jaxcp
from jaxcp import LossConfig, Zigzag
from jaxcp.data.lookahead import draft_batch
from jaxcp.data.placing import put
from jaxcp.data.sources import checked
from jaxcp.training.objective import objective, scales_of
from jaxcp.training.step import balance, skeleton
from jaxcp.weights.placement import place

V3, V32, V4 = "deepseek-v3-tiny", "deepseek-v32-tiny", "deepseek-v4-tiny"
NEXT, MIMO = "qwen3-next-tiny", "mimo-v2-flash-tiny"
ALL = LossConfig(balance_loss_weight=0.02, z_loss_weight=0.01, mtp_loss_weight=0.3)
LENGTH = 16


def config_of(name):
    """The fixture's, of one layer with experts; V4's chooses them by token id, Qwen's recurs."""
    config = jaxcp.load_config(FIXTURES / name)
    changes = {"num_layers": 1, "num_mtp_layers": 1}
    if name == V4:
        changes["layer_kinds"] = "C"
        changes["experts"] = dataclasses.replace(config.experts, hash_layers=1)
        changes["streams"] = dataclasses.replace(config.streams, iterations=2)
    elif name != NEXT:
        changes["first_dense_layers"] = 0
    if name == MIMO:
        changes |= {"mtp_kind": "L", "window": 5}
    return dataclasses.replace(config, **changes)


@functools.cache
def model_of(name):
    """Filled by NumPy: compiling a random number generator a shape takes ten seconds."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        shape = leaf.shape
        if leaf.dtype == jnp.int32:  # the experts of a token
            return jnp.arange(np.prod(shape), dtype=jnp.int32).reshape(shape) % 8
        if len(shape) == 1:
            return jnp.asarray(1 + rng.normal(scale=0.1, size=shape), leaf.dtype)
        return jnp.asarray(rng.normal(scale=64**-0.5, size=shape), leaf.dtype)

    return jax.tree.map(fill, jaxcp.abstract_model(config_of(name)))


def batch_of(name):
    """Two rows; some targets are not to be learnt. The first row of V3, Qwen and MiMo has
    two documents."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (2, LENGTH)).astype(np.int32)
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1)}
    batch["positions"] = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
    batch["targets"][:, -1] = -1
    if name in (V3, NEXT, MIMO):
        batch["segment_ids"] = np.zeros_like(tokens)
        batch["segment_ids"][0, 7:] = 1
        batch["positions"][0, 7:] -= 7
        batch["targets"][0, 6] = -1
    batch["weights"] = np.ones(tokens.shape, np.float32)
    batch["weights"][1, :5] = 0.0
    batch = checked(batch, vocab_size=256)
    return batch | draft_batch(batch, 1)


@functools.partial(jax.jit, static_argnums=2)
def gradient(model, batch, attention):
    """`(gradients, Totals)` of a batch over its weight."""

    def loss(model):
        options = {"scales": scales_of(batch), "chunk": 16, "strategy": attention}
        total, totals = objective(model, batch, ALL, **options)
        return total / totals.weight, totals

    return jax.grad(loss, has_aux=True, allow_int=True)(model)


@functools.cache
def alone(name):
    grads, totals = gradient(model_of(name), jax.tree.map(jnp.asarray, batch_of(name)), None)
    return named(grads), totals


def named(grads):
    found = jax.tree_util.tree_leaves_with_path(grads)
    names = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in found}
    return {name: np.asarray(x) for name, x in names.items() if x.dtype != jax.dtypes.float0}


@pytest.fixture(params=slow_but([V3, V32, V4, NEXT, MIMO], lambda name: name == V3))
def name(request):
    return request.param


def test_the_loss_of_drafts_is_the_definition(name):
    """From the model's logits of drafts, in float64, target by target; and all of it is learnt."""
    batch, ids = batch_of(name), {}
    if "segment_ids" in batch:
        ids["segment_ids"] = jnp.asarray(batch["segment_ids"])
    arrays = (jnp.asarray(batch[k]) for k in ("tokens", "following", "positions"))
    logits = jax.jit(lambda m, *x: m.mtp_logits(*x, **ids)[0])
    logits = np.asarray(logits(model_of(name), *arrays), np.float64)
    segments = batch.get("segment_ids", np.zeros_like(batch["tokens"]))
    losses, weights = [], []
    for row, at in np.ndindex(2, LENGTH - 2):
        if segments[row, at] != segments[row, at + 2]:
            continue  # the token after next is in another document
        weight, line = batch["weights"][row, at + 1], logits[row, at]
        losses.append(weight * (np.log(np.exp(line).sum()) - line[batch["tokens"][row, at + 2]]))
        weights.append(weight)
    grads, totals = alone(name)
    found = totals.parts["mtp_loss"] / totals.weight
    np.testing.assert_allclose(found, sum(losses) / sum(weights), rtol=1e-5)
    reached = {k for k in grads if k.startswith("mtp.")}
    still = {k for k in reached if np.abs(grads[k]).max() == 0}
    # what selects is moved by a rule of its own, and the index is not trained
    assert len(reached - still) > 12
    assert all("router_bias" in k or ".index." in k for k in still), still
    # the trunk's layer and the MTP layer's, which of MiMo has no router
    assert totals.stats.load.shape == (1 if name == MIMO else 2, 8)


@pytest.mark.slow
def test_every_loss_and_gradient_is_that_of_one_device(name, mesh_of):
    expected, whole = alone(name)
    mesh_of(data=2, seq=2)
    batch = put(batch_of(name), mesh=jax.sharding.get_mesh(), layout=Zigzag())
    batch = jax.tree.map(lambda x: x[0], batch)
    grads, totals = gradient(place(model_of(name)), batch, jaxcp.Ring(layout=Zigzag()))
    assert totals.parts.keys() == {"loss", "mtp_loss", "router_balance_loss", "router_z_loss"}
    for key, value in totals.parts.items():
        np.testing.assert_allclose(value, whole.parts[key], rtol=1e-5, err_msg=key)
    np.testing.assert_allclose(totals.stats.load, whole.stats.load, atol=1e-6)
    for key, value in named(grads).items():
        scale = max(1.0, np.abs(expected[key]).max())
        np.testing.assert_allclose(value, expected[key], atol=1e-5 * scale, err_msg=key)


@pytest.mark.slow
def test_recomputed_layers_draft_the_same():
    again = dataclasses.replace(config_of(V4), remat=True)
    model = jax.tree.unflatten(
        jax.tree.structure(jaxcp.abstract_model(again)), jax.tree.leaves(model_of(V4))
    )
    grads, totals = gradient(model, jax.tree.map(jnp.asarray, batch_of(V4)), None)
    np.testing.assert_allclose(totals.parts["mtp_loss"], alone(V4)[1].parts["mtp_loss"], rtol=1e-6)
    for key, value in alone(V4)[0].items():
        np.testing.assert_allclose(named(grads)[key], value, atol=1e-5, err_msg=key)


def test_the_selection_bias_of_the_layer_that_drafts_is_moved():
    """V4's first layer chooses by token id: it has a load, and no bias to move."""
    biases = [name for name in skeleton(config_of(V4)).names if name.endswith("router_bias")]
    assert biases == ["mtp.block.mlp.router_bias"]
    load = jnp.array([[0.3, 0.1], [0.1, 0.3]])
    moved = balance({name: jnp.zeros(2) for name in biases}, load, 0.01)
    np.testing.assert_allclose(moved[biases[0]], [0.01, -0.01])
