# SPDX-License-Identifier: Apache-2.0
"""Infinities and what vanishes, outside of the kernels: models, routers, blocks, sparse attention.

Strategies and caches have heads with a sink of -inf in their own tests.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_attention import dense
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxcp
from jaxcp.attention.blocks import compress
from jaxcp.attention.selected import Selection, shared_head, sparse_attention
from jaxcp.layers.router_stats import router_stats
from jaxcp.layers.routing import SCORES, Routing
from jaxcp.models.hybrid_moe.config import AttentionConfig
from jaxcp.training.loss import chunked_cross_entropy
from jaxcp.training.optimizer import OptimizerConfig, make_optimizer
from pallas_kernels import PAD_POSITION

NOTHING = -np.inf
QUICK = {"xla_backend_optimization_level": 0}


def test_a_model_whose_sinks_are_minus_infinity():
    """It is one whose sinks take next to nothing, pads and gradients included."""
    config = jaxcp.HybridMoEConfig(
        vocab_size=16, num_layers=1, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4,
        mlp_dim=8, moe_dim=8, num_experts=2, num_experts_per_tok=1, first_dense_layers=1,
        attention=AttentionConfig(sinks=True),
    )  # fmt: skip
    graph, parameters, rest = nnx.split(jaxcp.abstract_model(config), nnx.Param, ...)
    rng = np.random.default_rng(0)
    parameters = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), parameters)
    tokens = jnp.arange(10).reshape(2, 5)
    positions = jnp.tile(jnp.array([0, 1, 2, 3, PAD_POSITION], jnp.int32), (2, 1))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(parameters):
        def loss(parameters):
            x, _ = nnx.merge(graph, parameters, rest).hidden(tokens, positions)
            return (x[:, :4] ** 3).sum(), x

        return jax.grad(loss, has_aux=True)(parameters)

    def with_sinks(value):
        flat = nnx.to_flat_state(parameters)
        (name,) = (name for name, _ in flat if name[-1] == "sinks")
        set_to = [(k, v.replace(jnp.full((2,), value)) if k == name else v) for k, v in flat]
        gradients, x = run(nnx.from_flat_state(set_to))
        gradients = {k: v[...] for k, v in nnx.to_flat_state(gradients)}
        return x, gradients.pop(name), gradients

    x, dsinks, gradients = with_sinks(NOTHING)
    wanted, _, near = with_sinks(-60.0)
    assert not np.any(dsinks)
    np.testing.assert_allclose(x, wanted, atol=1e-6, rtol=0)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, near[name], atol=1e-5, err_msg=str(name))


def test_an_optimizer_leaves_a_sink_of_minus_infinity():
    parameters = {"layers.0.attention.sinks": jnp.array([NOTHING, 1.0])}
    axes = dict.fromkeys(parameters, ("heads",))
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.1), 10, axes)
    with jax.numpy_dtype_promotion("standard"):  # as a step has it
        gradient = {name: jnp.array([0.0, 1.0]) for name in parameters}
        updates, _ = optimizer.update(gradient, optimizer.init(parameters), parameters)
    (update,) = updates.values()
    assert update[0] == 0 and np.isfinite(update[1]) and update[1] != 0


@pytest.mark.parametrize("strategy", [jaxcp.Ring(), jaxcp.FixedOrder()], ids=str)
def test_a_latent_whose_sinks_are_minus_infinity(strategy, mesh_of):
    """Over two shards, the last three tokens pads, against float64; also in a fixed order."""
    rng = np.random.default_rng(0)
    x = {
        name: rng.normal(size=(1, 32, *shape)).astype(np.float32)
        for name, shape in (("q", (2, 4)), ("latent", (4,)), ("dout", (2, 4)))
    }
    place = np.arange(32, dtype=np.int32)
    x["positions"] = np.where(place < 29, place, PAD_POSITION)[None]
    sinks = np.array([NOTHING, 0.3], np.float32)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(q, latent, dout, positions, sinks):
        def attend(q, latent, sinks):
            return jaxcp.latent_attention(
                q, latent, (), positions, expand=shared_head, strategy=strategy, sinks=sinks
            )

        out, pull = jax.vjp(attend, q, latent, sinks)
        return out, *pull(dout)

    mesh_of(seq=2)
    there = jax.device_put(strategy.layout.permute(x, 2), P("data", "seq"))
    *found, dsinks = run(**there, sinks=sinks)
    found = strategy.layout.inverse(found, 2, 32)
    key = x["latent"][:, :, None]
    out, dq, dk, dv, dsink = dense(x["q"], key, key, x["positions"], sinks=sinks, dout=x["dout"])
    wanted = out, dq, (dk + dv)[:, :, 0]
    for ours, theirs in zip((*found, dsinks), (*wanted, dsink), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert not np.any(found[0][:, 29:]) and dsinks[0] == 0


@pytest.mark.parametrize("selected", [False, True])
def test_sparse_attention_whose_sinks_are_minus_infinity(selected):
    """The first two queries see no key, the first of the window's is a pad."""
    rng = np.random.default_rng(0)
    q, keys, window_keys = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((1, 5, 2, 4), (1, 3, 4), (1, 5, 4))
    )
    positions = jnp.array([[PAD_POSITION, 0, 1, 2, 3]], jnp.int32)
    key_positions = jnp.array([[1, 3, PAD_POSITION]], jnp.int32)
    selection = None
    if selected:
        index = (jnp.asarray(rng.normal(size=(1, n, 1, 2)), jnp.float32) for n in (5, 3))
        queries, index_keys = index
        weights = jnp.ones((1, 5, 1))
        selection = Selection(queries=queries, weights=weights, keys=index_keys[:, :, 0], top_k=2)
    attend = functools.partial(
        sparse_attention, positions=positions, key_positions=key_positions, scale=0.5,
        selection=selection, window=2,
    )  # fmt: skip

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(sinks, q, keys, window_keys):
        def out(q, keys, window_keys, sinks):
            alone = attend(q, keys, sinks=sinks)
            return alone, attend(q, keys, sinks=sinks, window_keys=window_keys)

        found, pull = jax.vjp(out, q, keys, window_keys, sinks)
        return found, pull(jax.tree.map(jnp.ones_like, found))

    (alone, both), (*gradients, dsinks) = run(jnp.full(2, NOTHING), q, keys, window_keys)
    # a sink that takes next to nothing, where something is seen: the same
    (_, near), (*wanted, _) = run(jnp.full(2, -60.0), q, keys, window_keys)
    assert not np.any(alone[0, :2]) and not np.any(both[0, 0]) and not np.any(dsinks)
    np.testing.assert_allclose(alone[0, 2], np.tile(keys[0, 0], (2, 1)), rtol=1e-5)
    np.testing.assert_allclose(both, near, atol=1e-6)
    for ours, theirs in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("overlap", [False, True])
def test_gates_of_minus_infinity(overlap, mesh_of):
    """Tokens left out; on two shards a part of a block of which nothing counts, and all of one."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(1, 12, 1 + overlap)).astype(np.float32)
    gates = rng.normal(size=values.shape).astype(np.float32)
    gates[:, 4:6] = NOTHING  # of the block 4..7, which lies on both shards
    gates[:, 8:] = NOTHING
    positions = np.arange(12, dtype=np.int32)[None]

    def entry(w):
        parts = [(values[0, 4 * w : 4 * w + 4, -1], gates[0, 4 * w : 4 * w + 4, -1])]
        if overlap and w:
            parts.append((values[0, 4 * w - 4 : 4 * w, 0], gates[0, 4 * w - 4 : 4 * w, 0]))
        value, gate = (np.concatenate(x) for x in zip(*parts, strict=True))
        weight = np.exp(gate.astype(float))
        return (weight * value).sum() / max(weight.sum(), 1e-30)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(values, gates):
        options = {"ratio": 4, "overlap": overlap, "layout": jaxcp.Contiguous()}

        def total(values, gates):
            entries, blocks = compress(values, gates, jnp.asarray(positions), **options)
            return entries.sum(), (entries, blocks)

        return jax.grad(total, (0, 1), has_aux=True)(values, gates)

    mesh_of(seq=2)
    gradients, (entries, blocks) = run(values, gates)
    order = np.argsort(np.asarray(blocks)[0], kind="stable")[:3]
    found = np.asarray(entries)[0, order, 0]
    np.testing.assert_allclose(found, [entry(w) for w in range(3)], atol=1e-6)
    for gradient in gradients:
        assert np.isfinite(gradient).all() and not np.any(np.asarray(gradient)[:, 4:6])


# Routers


def test_scores_that_vanish_have_a_gradient():
    """Logits so small that scores, their sum or all of them are 0; an expert of logit -inf."""
    logits = jnp.array([[-200.0, -150.0, NOTHING, -120.0], [1.0, 2.0, NOTHING, -300.0]])

    def gradients(scores):
        routing = Routing(scores=scores, selection_bias=False)

        def loss(logits):
            chosen = routing.select(SCORES[scores](logits), 2)
            stats = router_stats(logits, chosen, None, None, routing, ())
            weights = routing.weigh(SCORES[scores](logits), chosen)
            return (weights**2).sum() + stats.balance_loss() + 1e-3 * stats.z_loss()

        return jax.grad(loss)(logits), jax.grad(lambda x: SCORES[scores](x).sum())(logits)

    @jax.jit
    def run():
        return {scores: gradients(scores) for scores in SCORES}

    for scores, (gradient, slope) in run().items():
        assert np.isfinite(gradient).all() and not np.any(gradient[:, 2]), scores
        assert np.any(gradient[1, :2]), scores
        assert np.isfinite(slope).all(), scores
    (_, slope), x = run()["sqrt_softplus"], np.array([1.0, 2.0])
    wanted = 1 / (1 + np.exp(-x)) / (2 * np.sqrt(np.log1p(np.exp(x))))
    np.testing.assert_allclose(slope[1, :2], wanted, rtol=1e-5)


def test_a_selection_bias_of_minus_infinity_closes_an_expert():
    scores = jnp.array([[0.9, 0.8, 0.2, 0.1, 0.3, 0.4]])
    bias = jnp.array([NOTHING, 0, 0, 0, 0, 0])
    assert Routing().select(scores, 3, bias).tolist() == [[1, 5, 4]]
    # nor its group, whose two best sum to less than any other's
    assert Routing(num_groups=3).select(scores, 2, bias).tolist() == [[5, 4]]


# Losses


def test_a_batch_whose_targets_are_all_ignored():
    rng = np.random.default_rng(0)
    x, head = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 5, 3), (3, 7)))
    targets, weights = jnp.full((1, 5), -1), jnp.zeros((1, 5))

    def loss(x, head):
        total, weight = chunked_cross_entropy(x, head, targets, weights, chunk=2)
        return total / jnp.maximum(weight, 1e-9)  # as a step divides

    value, gradients = jax.value_and_grad(loss, (0, 1))(x, head)
    assert value == 0 and not any(np.any(g) for g in gradients)
