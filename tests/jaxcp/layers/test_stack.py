# SPDX-License-Identifier: Apache-2.0
"""Layers alike run as one program, in their order, and each can be had by itself."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxcp
from jaxcp import HybridMoE, HybridMoEConfig
from jaxcp.attention.attend import Attend
from jaxcp.compile import compile_for, decode_program, parse_target
from jaxcp.layers.router_stats import RouterStats
from jaxcp.layers.stack import Layers, layers_in, members, of_each_layer, stack_names

MIXED = HybridMoEConfig(
    vocab_size=64, num_layers=7, embed_dim=32, num_heads=2, num_kv_heads=1, head_dim=16,
    mlp_dim=32, moe_dim=16, num_experts=4, num_experts_per_tok=2, layer_pattern="LG", window=8,
    first_dense_layers=1, num_mtp_layers=1,
)  # fmt: skip


def model(config=MIXED):
    return HybridMoE(config, rngs=nnx.Rngs(0))


# Names


@pytest.mark.parametrize(
    "structures, names",
    [
        ("A", ["0"]),
        ("AB", ["0", "1"]),
        ("DMMMMM", ["0", "1:6"]),
        ("LLLGLLLGLLLG", ["0:12:4", "1:12:4", "2:12:4", "3:12:4"]),
        ("DGLGLGLG", ["0", "1:7:2", "2:7:2", "7"]),  # a G that no L follows
        ("", []),
    ],
)
def test_stacks_of_known_patterns(structures, names):
    assert stack_names(structures) == names


def test_every_layer_is_in_one_stack_of_its_like():
    rng = random.Random(0)
    for _ in range(300):
        structures = rng.choices("ABC"[: rng.randint(1, 3)], k=rng.randint(1, 24))
        names = stack_names(structures)
        layers = [i for name in names for i in layers_in(name)]
        assert sorted(layers) == list(range(len(structures)))
        for name in names:
            assert len({structures[i] for i in layers_in(name)}) == 1


def test_names_of_the_layers_arrays():
    assert members("layers.1:3.attention.q") == ["layers.1.attention.q", "layers.2.attention.q"]
    assert members("layers.2:9:3.mlp.up") == [f"layers.{i}.mlp.up" for i in (2, 5, 8)]
    assert members("layers.7.mlp.up") == ["layers.7.mlp.up"]
    assert members("final_norm.scale") == ["final_norm.scale"]
    every = of_each_layer(model())
    assert {name.split(".")[1] for name in every if name.startswith("layers")} == set("0123456")
    assert every["layers.2.attention.q"].shape == (32, 2, 16)


# Order


class Block(nnx.Module):
    def __init__(self, i, wide):
        self.number = nnx.Param(jnp.asarray([float(i)] * (2 if wide else 1)))
        self.wide = wide


class Counting(Attend):
    """Keeps how often each layer was called, and by whom."""

    keeps_rows = True

    def __init__(self, layers):
        self.states = {name: jnp.zeros(len(layers_in(name))) for name in layers.names}

    def kept(self, name):
        return self.states[name]

    def keep(self, name, state):
        self.states[name] = state

    def of(self, state, layer):
        one = Attend()
        one.state, one.layer = state, layer
        return one


def step(block, x, attend):
    number = block.number[0]
    attend.state = attend.state.at[attend.layer].add(number + 1)
    stats = RouterStats(number[None].astype(jnp.int32), number[None], number, jnp.int32(0))
    return x * 3 + number, stats


@pytest.mark.parametrize("wide", ["ffffff", "wffwff", "fwwwww", "fwfwfwfw", "w"])
def test_layers_run_in_their_order_and_keep_their_own(wide):
    blocks = [Block(i, x == "w") for i, x in enumerate(wide)]
    layers = Layers(blocks)
    attend = Counting(layers)
    x, stats = layers.run(step, jnp.float32(1), attend)
    expected = 1.0
    for i in range(len(wide)):
        expected = expected * 3 + i
    assert float(x) == expected
    assert stats.z.tolist() == list(range(len(wide)))
    for name in layers.names:
        assert attend.states[name].tolist() == [i + 1 for i in layers_in(name)]
    assert [float(block.number[0]) for block in layers] == list(range(len(wide)))
    assert [block.wide for block in layers] == [x == "w" for x in wide]
    with pytest.raises(IndexError):
        layers[len(wide)]


# A model


@jax.jit
def unrolled(model, tokens, positions):
    """The model's hidden states, by its blocks one after the other."""
    x, attend = model.embedded(tokens, positions), model.attend_over(positions)
    for block in model.layers:
        x, _ = block(x, positions, attend)
    return model.final_norm(x)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_values_and_gradients_are_those_of_blocks_one_by_one(remat):
    one = model(dataclasses.replace(MIXED, remat=remat, num_mtp_layers=0))
    assert one.layers.names == ["0", "1:7:2", "2:7:2"]
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 20)))
    positions = jnp.broadcast_to(jnp.arange(20), (2, 20))
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, 20, 32)), jnp.float32)

    def loss(run):
        return jax.jit(jax.grad(lambda model: (run(model, tokens, positions) * weights).sum()))

    stacked, alone = (loss(run)(one) for run in (lambda m, *x: m.hidden(*x)[0], unrolled))
    np.testing.assert_allclose(
        one.hidden(tokens, positions)[0], unrolled(one, tokens, positions), atol=1e-5
    )
    for ours, theirs in zip(jax.tree.leaves(stacked), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


@pytest.mark.slow
def test_more_layers_are_no_longer_program_and_copy_no_experts():
    """A decode step on a TPU: its equations, and its temporary memory beside a layer's experts."""
    lengths, sizes = set(), []
    for layers in (5, 9):
        config = dataclasses.replace(
            MIXED, num_layers=layers, embed_dim=256, head_dim=128, moe_dim=256, num_experts=64,
            layer_pattern="G", num_mtp_layers=0,
        )  # fmt: skip
        mesh = parse_target("v6e:2x2").mesh(seq=4)
        fn, arrays = decode_program(jaxcp.abstract_model(config), mesh, max_len=512)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            lengths.add(str(fn.trace(*arrays).jaxpr).count(" = "))
        sizes.append(compile_for(fn, arrays, mesh).temp_bytes)
    assert len(lengths) == 1
    experts = 3 * 64 * 256 * 256 * 4
    assert max(sizes) < experts / 8, sizes
