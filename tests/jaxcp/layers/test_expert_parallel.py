# SPDX-License-Identifier: Apache-2.0
"""Experts on other devices than the tokens: the same answer as from the definition, any mesh."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxcp.compile import collectives
from jaxcp.layers.expert_exchange import capacity
from jaxcp.layers.moe import MoE
from jaxcp.layers.routing import Routing
from jaxcp.sharding import Rules
from jaxcp.weights.placement import place

B, T, D, F, E, K = 2, 32, 16, 8, 8, 3
MESHES = {
    "experts on seq": {"seq": 4, "experts": "seq"},
    "on seq, beside data and model": {"data": 2, "seq": 2, "model": 2, "experts": "seq"},
    "on data": {"data": 2, "seq": 2, "experts": "data"},
    "an axis of their own": {"seq": 2, "expert": 2, "model": 2, "experts": "expert"},
}


def layer(skew=0.0, use_bias=False):
    """`skew` is added to the bias that selects expert 5."""
    options = {"routing": Routing(scale=1.5), "use_bias": use_bias, "std": 0.3, "out_std": 0.3}
    moe = MoE(D, F, num_experts=E, num_experts_per_tok=K, rngs=nnx.Rngs(0), **options)
    for i, name in enumerate(("gate_bias", "up_bias", "down_bias") if use_bias else ()):
        variable = getattr(moe, name)
        variable.set_value(jax.random.normal(jax.random.key(i), variable.shape))
    moe.router_bias.set_value(jnp.zeros(E).at[5].set(skew))
    return moe


def tokens():
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(B, T, D)).astype(np.float32) for _ in range(2))


def from_the_definition(moe, x):
    """Every expert on every token, in float64; those not chosen weigh nothing."""
    get = {k: np.asarray(v.get_value(), np.float64) for k, v in vars(moe).items() if is_array(v)}
    x = np.asarray(x, np.float64)
    score = 1 / (1 + np.exp(-x @ get["router"]))
    chosen = np.argsort(-(score + get["router_bias"]), axis=-1, kind="stable")[..., :K]
    weight = np.zeros_like(score)
    np.put_along_axis(weight, chosen, np.take_along_axis(score, chosen, -1), -1)
    weight *= 1.5 / weight.sum(-1, keepdims=True)

    def project(x, spec, name):
        return np.einsum(spec, x, get[name]) + get.get(f"{name}_bias", np.zeros((E, 1)))

    gate, up = (project(x, "btd,edf->btef", name) for name in ("gate", "up"))
    out = project(gate / (1 + np.exp(-gate)) * up, "btef,efd->bted", "down")
    return np.einsum("bted,bte->btd", out, weight)


def is_array(x):
    return isinstance(x, nnx.Variable)


@jax.jit
def with_gradients(moe, x, dout):
    def run(moe, x):
        return moe(x)[0]

    y, pull = jax.vjp(run, moe, x)
    return y, *pull(dout), moe(x)[1]


def enter(mesh_of, moe, axes):
    axes = dict(axes)
    experts = axes.pop("experts")
    mesh_of(**axes)
    return place(moe, rules=Rules(experts=experts)), [
        jax.device_put(x, P("data", "seq")) for x in tokens()
    ]


@functools.cache
def alone(skew, use_bias):
    """On one device, whose gradients `test_models.py` holds against another implementation's."""
    return with_gradients(layer(skew, use_bias), *map(jnp.asarray, tokens()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes, use_bias",
    [(axes, True) for axes in MESHES.values()] + [(MESHES["experts on seq"], False)],
    ids=[*MESHES, "no biases"],
)
def test_any_mesh_gives_the_same(axes, use_bias, mesh_of):
    """Even choices, and all tokens on one expert, which needs every round there is."""
    for skew in (0.0, 10.0):
        moe = layer(skew, use_bias)
        expected = alone(skew, use_bias)
        np.testing.assert_allclose(expected[0], from_the_definition(moe, tokens()[0]), atol=2e-6)
        moe, there = enter(mesh_of, moe, axes)
        found = with_gradients(moe, *there)
        for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            if ours.dtype != jax.dtypes.float0:
                scale = max(1.0, np.abs(theirs).max())
                np.testing.assert_allclose(ours, theirs, atol=5e-6 * scale, rtol=0)


def test_the_same_bits_from_any_number_of_shards(mesh_of):
    """Choices of a token add up in their order, wherever they were computed."""
    moe = layer()
    expected = np.asarray(jax.jit(moe.__call__)(jnp.asarray(tokens()[0]))[0])
    for shards in (1, 2, 4, 8):
        placed, (x, _) = enter(mesh_of, moe, {"seq": shards, "experts": "seq"})
        found = jax.jit(lambda moe, x: moe(x)[0])(placed, x)
        assert np.array_equal(found, expected), shards


def test_what_travels(mesh_of):
    """One round's rows, the numbers of their experts, and the rows back; no array has a place for
    each token at each expert."""
    shards = 4
    moe, (x, _) = enter(mesh_of, layer(), {"seq": shards, "experts": "seq"})
    text = jax.jit(lambda moe, x: moe(x)[0]).lower(moe, x).compile().as_text()
    mine = B * T // shards
    room = capacity(mine * K, shards)
    rounds = -(-min(mine * K, mine * E // shards) // room)  # the most that any choice can need
    found = {c.kind: c for c in collectives(text)}
    assert found.keys() == {"all-to-all", "all-reduce"}
    assert found["all-reduce"].bytes == 4  # how many rounds
    assert found["all-to-all"].bytes == rounds * shards * room * (2 * D + 1) * 4
    assert not any(f"[{tokens},{E}," in text for tokens in (B * T, mine, mine * K))


def test_experts_that_do_not_divide(mesh_of):
    mesh_of(seq=3)
    with pytest.raises(ValueError, match=r"the mesh does not divide: .*down.* by seq=3"):
        place(layer(), rules=Rules(experts="seq"))


def test_no_array_is_larger_than_the_choices():
    """128K tokens to 192 experts, forward and backward: no `[tokens, experts, capacity]`."""
    tokens, experts, k, d, f = 131_072, 192, 8, 64, 32
    sizes = {"num_experts": experts, "num_experts_per_tok": k, "std": 0.02, "out_std": 0.02}
    moe = nnx.eval_shape(lambda: MoE(d, f, routing=Routing(), rngs=nnx.Rngs(0), **sizes))
    graph, state = nnx.split(moe)

    def gradient(state, x):
        def total(state, x):
            return nnx.merge(graph, state)(x)[0].astype(jnp.float32).sum()

        return jax.grad(total, argnums=(0, 1))(state, x)

    x = jax.ShapeDtypeStruct((1, tokens, d), jnp.bfloat16)
    text = jax.jit(gradient).lower(state, x).compile().as_text()
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", text)
    found = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    padded = tokens * k + experts * 128  # each expert's rows begin on a block
    assert tokens * k * d <= found <= padded * d < tokens * experts * k
