# SPDX-License-Identifier: Apache-2.0
"""Models over a mesh compute what they compute on one device, and what transformers computes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_attention import dense
from flax import nnx
from jax.sharding import PartitionSpec as P
from tiny_checkpoints import FIXTURES, flat, random_model, tensors, write

import jaxcp
from jaxcp import GPT, GPTConfig, HybridMoE, HybridMoEConfig, Zigzag, models
from jaxcp.layers.routing import Routing
from jaxcp.models.hybrid_moe.config import AttentionConfig, ExpertsConfig, Heads, NormConfig
from jaxcp.weights.placement import place

HYBRID = HybridMoEConfig(
    vocab_size=32, num_layers=3, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=16, moe_dim=8, num_experts=4, num_experts_per_tok=2,
    layer_pattern="LNG", window=5, norm=NormConfig(eps=1e-6),
    attention=AttentionConfig(full=Heads(num_heads=2, num_kv_heads=2, head_dim=8, value_dim=8)),
    experts=ExpertsConfig(routing=Routing(scale=1.5)),
)  # fmt: skip


@functools.cache
def hybrid():
    return random_model(HYBRID)


def on_mesh(tokens, shards):
    """Tokens, positions and targets in zigzag order on the mesh; pads have target -1."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    targets = np.concatenate([tokens[:, 1:], np.full_like(tokens[:, :1], -1)], axis=1)
    tree = {"tokens": tokens.astype(np.int32), "positions": positions, "targets": targets}
    there = Zigzag().permute(tree, shards)
    return {k: jax.device_put(v.astype(np.int32), P("data", "seq")) for k, v in there.items()}


@jax.jit
def loss_and_gradients(model, batch):
    """Mean next-token loss, and its gradient in every parameter by name."""
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    def loss(parameters):
        model = nnx.merge(graph, parameters, rest)
        logits = model(batch["tokens"], batch["positions"])
        wanted = batch["targets"][..., None] == jnp.arange(logits.shape[-1])
        picked = jnp.where(wanted, jax.nn.log_softmax(logits), 0.0).sum()
        return -picked / (batch["targets"] >= 0).sum().astype(jnp.float32)

    return jax.value_and_grad(loss)(parameters)


def named(state):
    return {".".join(map(str, k)): np.asarray(v.get_value()) for k, v in nnx.to_flat_state(state)}


def same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        limit = 1e-4 * np.abs(expected[name]).max()
        np.testing.assert_allclose(value, expected[name], atol=limit, rtol=0, err_msg=name)


# Over a mesh


@pytest.mark.parametrize("name", ["hy3-tiny", "gpt2-tiny"])
def test_logits_are_those_of_transformers(name, mesh_of):
    mesh_of(seq=8)
    model, _ = jaxcp.load(FIXTURES / name)
    reference = np.load(FIXTURES / name / "reference.npz")
    found = jaxcp.logits(model, reference["input_ids"])
    np.testing.assert_allclose(found, reference["logits"], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, axes",
    [
        ("hy3-tiny", {"seq": 8}),
        ("gpt-oss-tiny", {"seq": 2, "model": 2}),
        ("qwen2-tiny", {"seq": 2, "model": 2}),
        ("qwen3-tiny", {"seq": 8}),
    ],
)
def test_gradients_are_those_of_transformers(name, axes, mesh_of, tmp_path):
    """They bear the names of transformers in memory: a checkpoint like any other."""
    theirs = np.load(FIXTURES / name / "grads.npz")
    gradients = {k.removeprefix("grad/"): v for k, v in theirs.items() if k != "lm_loss"}
    bias = {k: v for k, v in tensors(name).items() if k.endswith("expert_bias")}
    expected, _ = jaxcp.load(write(tmp_path / "grads", name, gradients | bias))
    expected = {k: v for k, v in flat(expected).items() if not k.endswith("router_bias")}
    reference = np.load(FIXTURES / name / "reference.npz")
    lm_loss = reference["lm_loss"] if "lm_loss" in reference else theirs["lm_loss"]
    mesh_of(**axes)
    model, _ = jaxcp.load(FIXTURES / name)
    loss, found = loss_and_gradients(model, on_mesh(reference["input_ids"], axes["seq"]))
    np.testing.assert_allclose(loss, lm_loss, rtol=1e-5)
    same_gradients(named(found), expected)


@pytest.mark.slow
def test_data_model_and_seq_axes_change_nothing(mesh_of):
    tokens = np.random.default_rng(0).integers(0, 32, (2, 18)).astype(np.int32)
    model = HybridMoE(dataclasses.replace(HYBRID, num_layers=2), rngs=nnx.Rngs(0))
    alone = {"tokens": tokens, "positions": np.broadcast_to(np.arange(18), (2, 18)),
             "targets": np.pad(tokens[:, 1:], [(0, 0), (0, 1)], constant_values=-1)}  # fmt: skip
    expected = loss_and_gradients(model, {k: jnp.asarray(v, jnp.int32) for k, v in alone.items()})
    mesh_of(data=2, seq=2, model=2)
    loss, found = loss_and_gradients(place(model), on_mesh(tokens, 2))
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
    same_gradients(named(found), named(expected[1]))


@pytest.mark.slow
def test_remat_changes_nothing():
    tokens = jnp.zeros((1, 6), jnp.int32)
    positions = jnp.arange(6, dtype=jnp.int32)[None]
    batch = {"tokens": tokens, "positions": positions, "targets": tokens}
    config = GPTConfig(vocab_size=8, max_positions=8, num_layers=1, num_heads=2, embed_dim=8)
    plain, remat = (
        loss_and_gradients(GPT(dataclasses.replace(config, remat=r), rngs=nnx.Rngs(0)), batch)[1]
        for r in (False, True)
    )
    same_gradients(named(remat), named(plain))


# Mixture of experts


def swiglu(x, gate, up, down):
    g = x @ gate
    return (g / (1 + np.exp(-g)) * (x @ up)) @ down


def one_token_at_a_time(layer, x):
    """The routed and shared experts of one token after another, and how many chose each."""
    w = {k: np.asarray(v, np.float64) for k, v in flat(layer).items()}
    y, count = np.zeros(x.shape), np.zeros(w["router"].shape[1])
    for at in np.ndindex(x.shape[:2]):
        token = x[at].astype(np.float64)
        score = 1 / (1 + np.exp(-token @ w["router"]))
        chosen = np.argsort(-(score + w["router_bias"]), kind="stable")[: layer.num_experts_per_tok]
        for e in chosen:
            weight = score[e] / score[chosen].sum() * layer.routing.scale
            y[at] += weight * swiglu(token, w["gate"][e], w["up"][e], w["down"][e])
            count[e] += 1
        y[at] += swiglu(token, w["shared.gate"], w["shared.up"], w["shared.down"])
    return y, count / count.sum()


@pytest.fixture
def moe():
    return jax.tree.map(lambda x: x, hybrid().layers[1].mlp)  # a copy, to be changed


@pytest.mark.parametrize("bias", [[0, 0, 0, 0], [0, 0.4, -0.3, 0], [9, -9, -9, 9]])
@pytest.mark.parametrize("axes", [{}, {"seq": 3}])
def test_no_token_is_dropped(bias, axes, moe, mesh_of):
    """Even where all of them choose the same experts; the bias selects and does not weigh."""
    moe.router_bias[...] = jnp.asarray(bias, jnp.float32)
    x = np.random.default_rng(0).normal(size=(2, 9, 16)).astype(np.float32)
    expected, load = one_token_at_a_time(moe, x)
    if axes:
        mesh_of(**axes)
        moe, x = place(moe), jax.device_put(x, P("data", "seq"))
    y, stats = jax.jit(lambda moe, x: moe(x))(moe, x)
    np.testing.assert_allclose(y, expected, atol=2e-5, rtol=0)
    np.testing.assert_allclose(stats.load, load, atol=1e-6)
    assert (load[[0, 3]] == 0.5).all() or bias[0] != 9


def test_the_router_is_float32_in_a_bfloat16_model(moe):
    """Experts whose router columns bfloat16 cannot tell apart are told apart."""
    router = np.zeros((16, 4), np.float32)
    router[0] = [1.0, 1 + 2**-12, 1 + 2**-11, 0.5]
    assert (router[0, :3].astype(jnp.bfloat16) == 1).all()
    moe.router[...] = jnp.asarray(router)
    moe.router_bias[...] = jnp.zeros(4)
    moe.num_experts_per_tok = 1
    y, stats = moe(jnp.ones((1, 3, 16), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and stats.load.tolist() == [0, 0, 1, 0]


@pytest.mark.slow
def test_load_of_every_layer_sums_to_one(mesh_of):
    model = hybrid()
    mesh_of(data=2, seq=4)
    model = place(model)
    tokens = np.random.default_rng(0).integers(0, 32, (2, 16))
    batch = on_mesh(tokens, 4)
    run = jax.jit(lambda m, t, p: m.hidden(t, p))
    x, stats = run(model, batch["tokens"], batch["positions"])
    load = stats.load
    assert x.shape == (2, 16, 16) and load.shape == (2, 4) and load.dtype == jnp.float32
    np.testing.assert_allclose(load.sum(-1), 1, rtol=1e-6)


# The layer pattern


def rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + HYBRID.norm.eps) * scale


def rotary(x, positions):
    half = x.shape[-1] // 2
    turn = np.exp(
        1j * positions[..., None, None] * HYBRID.attention.rope.theta ** (-np.arange(half) / half)
    )
    y = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([y.real, y.imag], axis=-1)


@pytest.mark.parametrize("layer, kind", list(enumerate("LNG")))
def test_attention_of_each_kind(layer, kind):
    """L sees 5 positions, N does not rotate, G does both in full, and N and G have fewer heads."""
    attention = hybrid().layers[layer].attention
    x = np.random.default_rng(layer).normal(size=(2, 12, 16)).astype(np.float32)
    positions = np.stack([np.arange(12), np.arange(12) + 100]).astype(np.int32)

    def attend(q, k, v, *, window):
        return jaxcp.context_parallel_attention(q, k, v, jnp.asarray(positions), window=window)

    assert attention.q.shape[1] == (4 if kind == "L" else 2)
    found = jax.jit(lambda a, x: a(x, jnp.asarray(positions), attend))(attention, x)
    w = {k: np.asarray(v, np.float64) for k, v in flat(attention).items()}
    q, k, v = (np.einsum("btd,dnh->btnh", x.astype(np.float64), w[name]) for name in "qkv")
    q, k = rms(q, w["q_norm.scale"]), rms(k, w["k_norm.scale"])
    if kind != "N":
        q, k = rotary(q, positions), rotary(k, positions)
    out = dense(q, k, v, positions, window=5 if kind == "L" else None)
    expected = np.einsum("btnh,nhd->btd", out, w["o"])
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)


# Configurations


def test_a_gpt_that_makes_no_sense():
    config = GPTConfig(vocab_size=8, max_positions=8, num_layers=1, num_heads=2, embed_dim=8)
    assert config.mlp_dim == 32
    with pytest.raises(ValueError, match="num_heads must divide embed_dim; got 3 and 8"):
        dataclasses.replace(config, num_heads=3)
    with pytest.raises(ValueError, match=r"one of \['gelu', 'gelu_tanh'\]; got 'relu'"):
        dataclasses.replace(config, activation="relu")
    with pytest.raises(NotImplementedError, match="use_bias=False cannot be saved"):
        models.config_to_dict(dataclasses.replace(config, use_bias=False))
    for wrong in ({"activation_function": "relu"}, {"scale_attn_by_inverse_layer_idx": True}):
        with pytest.raises((ValueError, NotImplementedError), match=next(iter(wrong))):
            models.config_from_dict(models.config_to_dict(config) | wrong)


def test_a_mesh_that_does_not_divide_is_listed_leaf_by_leaf(mesh_of):
    model = hybrid()
    mesh_of(model=4)
    with pytest.raises(
        ValueError, match=r"does not divide: .*attention.*k.*\(16, 2, 8\) by model=4"
    ):
        place(model)
