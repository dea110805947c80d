# SPDX-License-Identifier: Apache-2.0
"""Router losses and health: the definition in float64, on any mesh, and pads do not count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxcp.layers.moe import MoE
from jaxcp.layers.router_stats import RouterStats, joined, stacked
from jaxcp.layers.routing import Routing
from jaxcp.sharding import Rules
from jaxcp.weights.placement import place
from pallas_kernels import PAD_POSITION

B, T, D, E, K = 2, 16, 12, 4, 2
ROUTINGS = {
    "softmax": Routing(scores="softmax", selection_bias=False),
    "sigmoid": Routing(),
    "sqrt_softplus": Routing(scores="sqrt_softplus", linear_bias=True),
}
SCORES = {
    "softmax": lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "sqrt_softplus": lambda x: np.log1p(np.exp(x)) ** 0.5,
}
MESHES = {
    "tokens and widths": {"data": 2, "seq": 2, "model": 2},
    "experts apart": {"seq": 2, "expert": 4},
    "experts on seq": {"data": 2, "seq": 4, "experts": "seq"},
}


def layer(name):
    sizes = {"num_experts": E, "num_experts_per_tok": K, "std": 0.4, "out_std": 0.4}
    moe = MoE(D, 8, routing=ROUTINGS[name], rngs=nnx.Rngs(0), **sizes)
    if ROUTINGS[name].selection_bias:
        moe.router_bias.set_value(jnp.array([0.2, -0.1, 0.0, 0.1]))
    return moe


def batch():
    rng = np.random.default_rng(0)
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    positions[:, 11:] = PAD_POSITION
    return rng.normal(size=(B, T, D)).astype(np.float32), positions


def top(x):
    return np.argsort(-x, axis=-1, kind="stable")[..., :K]


def by_definition(name, x, positions):
    """`(stats, gradient of losses(stats) in the router)`, one token after the other, float64."""
    moe = layer(name)
    router = np.asarray(moe.router.get_value(), np.float64)
    bias = np.asarray(moe.router_bias.get_value()) if ROUTINGS[name].selection_bias else np.zeros(E)
    x = x[positions != PAD_POSITION].astype(np.float64)

    def of(router):
        logits = x @ router
        score = SCORES[name](logits)
        chosen, plain = top(score + bias), top(score)
        counts = np.bincount(chosen.reshape(-1), minlength=E)
        mean = (score / score.sum(-1, keepdims=True)).mean(0)
        z = (np.log(np.exp(logits).sum(-1)) ** 2).mean()
        same = sum(len(set(a) & set(b)) for a, b in zip(chosen, plain, strict=True))
        return RouterStats(counts, mean, z, chosen.size - same)

    counts = of(router).counts
    grad = np.zeros_like(router)
    for at in np.ndindex(router.shape):
        step = np.zeros_like(router)
        step[at] = 1e-6
        up, down = (of(router + sign * step)._replace(counts=counts) for sign in (1, -1))
        grad[at] = (weighed(up) - weighed(down)) / 2e-6
    return of(router), grad


def weighed(stats):
    load = stats.counts / stats.counts.sum()
    return E * (load * stats.probabilities).sum(-1) + 0.1 * stats.z


@jax.jit
def ours(moe, x, positions):
    def losses(moe):
        stats = moe(x, positions=positions)[1]
        return stats.balance_loss() + 0.1 * stats.z_loss(), stats

    grads, stats = jax.grad(losses, has_aux=True)(moe)
    return stats, grads.router.get_value()


@pytest.mark.parametrize("axes", [None, *MESHES.values()], ids=["one device", *MESHES])
@pytest.mark.parametrize("name", ROUTINGS)
def test_value_and_gradient_are_the_definition_on_any_mesh(name, axes, mesh_of):
    x, positions = batch()
    expected, grad = by_definition(name, x, positions)
    assert np.abs(grad).max() > 1e-2 and (expected.flips > 0) == ROUTINGS[name].selection_bias
    moe = layer(name)
    if axes is not None:
        axes = dict(axes)
        experts = axes.pop("experts", "expert")
        mesh_of(**axes)
        moe = place(moe, rules=Rules(experts=experts))
        x, positions = (jax.device_put(a, P("data", "seq")) for a in (x, positions))
    stats, found = ours(moe, x, positions)
    for a, b, field in zip(stats, expected, RouterStats._fields, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7, err_msg=field)
    assert stats.counts.dtype == stats.flips.dtype == jnp.int32
    np.testing.assert_allclose(stats.load, expected.counts / (B * 11 * K), rtol=1e-6)
    np.testing.assert_allclose(found, grad, atol=2e-6)


def test_losses_by_hand():
    """Even routing costs 1; all tokens on one of two experts, and sure of it, cost 2."""
    even = RouterStats(*(jnp.full((2,), 0.5),) * 2, jnp.float32(1.0), jnp.float32(0.0))
    sure = RouterStats(*(jnp.array([1.0, 0.0]),) * 2, jnp.float32(3.0), jnp.float32(0.0))
    assert even.balance_loss() == 1 and sure.balance_loss() == 2
    both = stacked([None, even, sure])
    assert both.load.shape == (2, 2) and both.balance_loss() == 1.5 and both.z_loss() == 2
    assert stacked([None]) is None and joined(None, both) is both
    assert joined(both, stacked([even])).z.tolist() == [1, 3, 1]


def test_the_load_has_no_gradient_and_experts_chosen_by_others_none_at_all():
    x, positions = batch()
    moe = layer("softmax")
    chosen = jnp.zeros((B, T, K), jnp.int32).at[..., 1].set(3)

    def loss(moe, chosen):
        return moe(x, chosen, positions=positions)[1].balance_loss()

    assert np.abs(jax.grad(loss)(moe, None).router.get_value()).max() > 1e-3
    assert np.abs(jax.grad(loss)(moe, chosen).router.get_value()).max() == 0


def test_a_batch_of_pads_is_finite():
    x, positions = batch()
    stats = layer("sigmoid")(x, positions=np.full_like(positions, PAD_POSITION))[1]
    assert all((np.asarray(leaf) == 0).all() for leaf in stats)
