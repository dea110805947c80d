# SPDX-License-Identifier: Apache-2.0
"""GLM-4.5, MiniMax-M2 and MiMo-V2-Flash compute what transformers computes: on any mesh, by every
strategy, in turns, through the engine; and are trained on a mesh as on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow import slow_but
from strategies import VARIANTS
from test_models import loss_and_gradients, named, on_mesh, same_gradients
from tiny_checkpoints import FIXTURES

import jaxcp
from jaxcp.context_parallel import USP, AllGather, FixedOrder, Halo, Ulysses
from jaxcp.inference.sampling import Sampling
from jaxcp.layers.stack import of_each_layer

CLOSE = {"atol": 1e-4, "rtol": 0}
NAMES = "glm4-moe-tiny", "minimax-m2-tiny", "mimo-v2-flash-tiny"
MESHES = {"seq": 2}, {"seq": 3}, {"seq": 8}
SPLIT = {"seq": 2, "model": 2}, {"seq": 2, "expert": 2}
QUICK = ("minimax-m2-tiny", SPLIT[0]), ("mimo-v2-flash-tiny", {"seq": 3})


def reference(name):
    return np.load(FIXTURES / name / "reference.npz")


@functools.cache
def loaded(name):
    return jaxcp.load(FIXTURES / name)[0]


def allowed(strategy, shards, heads=4):
    """Halo has windows alone; heads go round as many shards as they divide; 37 tokens and pads are
    a multiple of 16, which FixedOrder wants, on 8."""
    if isinstance(strategy, FixedOrder):
        return shards == 8
    ways = {Ulysses: shards, USP: getattr(strategy, "ulysses", 1)}.get(type(strategy), 1)
    return not isinstance(strategy, Halo) and heads % ways == 0 and shards % ways == 0


# Over meshes


@pytest.mark.parametrize(
    ("name", "axes"),
    slow_but([(n, a) for n in NAMES for a in SPLIT + MESHES[1:2]], lambda case: case in QUICK),
)
def test_over_a_mesh_it_is_that_of_transformers(name, axes, mesh_of):
    """37 tokens divide by no mesh: there are pads."""
    mesh_of(**axes)
    expected = reference(name)
    model, _ = jaxcp.load(FIXTURES / name)
    found = jaxcp.logits(model, expected["input_ids"])
    np.testing.assert_allclose(found, expected["logits"], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_by_every_strategy(name, axes, mesh_of):
    mesh_of(**axes)
    expected = reference(name)
    model, _ = jaxcp.load(FIXTURES / name)
    for strategy in VARIANTS:
        if allowed(strategy, axes["seq"]):
            found = jaxcp.logits(model, expected["input_ids"], strategy=strategy)
            np.testing.assert_allclose(found, expected["logits"], **CLOSE, err_msg=str(strategy))


def test_a_norm_over_all_heads_lies_with_them(mesh_of):
    """MiniMax-M2's, over `model`; MiMo's values are narrower than its keys."""
    mesh_of(seq=2, model=2)
    leaves = of_each_layer(jaxcp.load(FIXTURES / "minimax-m2-tiny")[0])
    assert leaves["layers.3.attention.q_norm.scale"].shape == (4, 16)
    assert leaves["layers.3.attention.k_norm.scale"].get_metadata()["axes"][0] == "kv_heads"
    leaves = of_each_layer(loaded("mimo-v2-flash-tiny"))
    shapes = [leaves[f"layers.{i}.attention.{x}"].shape for i in (0, 1) for x in "kvo"]
    assert shapes == [(64, 2, 16), (64, 2, 12), (4, 12, 64), (64, 4, 16), (64, 4, 12), (4, 12, 64)]
    assert "layers.0.attention.sinks" not in leaves and "layers.1.attention.sinks" in leaves


# Over a cache


@pytest.mark.slow
@pytest.mark.parametrize("turns", [(17, 5, 12), (1, 30), (8, 8, 8, 8)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_turns_and_then_tokens_are_the_whole_sequence(name, turns, mesh_of):
    """MiMo's window of 9 ends inside a turn, and inside the cache."""
    if turns[0] != 8:
        mesh_of(seq=2, model=2)
    expected = reference(name)
    tokens, logits = expected["input_ids"], expected["logits"]
    model, _ = jaxcp.load(FIXTURES / name)
    cache, end = model.init_cache(batch_size=2, max_len=40), 0
    for turn in turns:
        start, end = end, end + turn
        options = {"strategy": AllGather()} if turn == 17 else {}
        found, cache = jaxcp.prefill(model, cache, tokens[:, start:end], **options)
        np.testing.assert_allclose(found, logits[:, end - 1], **CLOSE, err_msg=f"to {end}")
    for at in range(end, 37):
        found, cache = jaxcp.decode_step(model, cache, tokens[:, at])
        np.testing.assert_allclose(found, logits[:, at], **CLOSE, err_msg=f"token {at}")


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{}, {"seq": 2, "model": 2}, {"seq": 3}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_transformers(name, axes, mesh_of):
    """Through the engine, beside another row, and again from a shared prefix."""
    if axes:
        mesh_of(**axes)
    expected = reference(name)
    ids, greedy = expected["input_ids"].tolist(), expected["greedy"].tolist()
    engine = jaxcp.Engine(jaxcp.load(FIXTURES / name)[0], None, max_len=64, stop_tokens=())
    first, _ = engine.generate([ids[0], ids[1]], Sampling(max_new_tokens=12))
    assert first.tokens == greedy
    after = engine.generate([[*ids[0], *greedy[:5]]], Sampling(max_new_tokens=7))[0]
    assert after.tokens == greedy[5:]


# Training


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_gradients_on_a_mesh_are_those_of_one_device(name, mesh_of):
    tokens = reference(name)["input_ids"]
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    targets = np.pad(tokens[:, 1:], [(0, 0), (0, 1)], constant_values=-1)
    alone = {"tokens": tokens, "positions": positions, "targets": targets}
    expected = loss_and_gradients(
        loaded(name), {k: jnp.asarray(v, jnp.int32) for k, v in alone.items()}
    )
    values = named(expected[1])
    assert all(np.isfinite(x).all() and np.abs(x).max() > 0 for x in values.values())
    for axes in SPLIT:
        mesh_of(**axes)
        loss, found = loss_and_gradients(jaxcp.load(FIXTURES / name)[0], on_mesh(tokens, 2))
        np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
        same_gradients(named(found), values)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_layer_keeps_in_a_pool(name):
    """Keys and values of their own widths, a window's in a state."""
    model = loaded(name)
    pool = jax.eval_shape(lambda: model.init_pool(pages=1, page=8, states=1))
    found = {n: (kind.k.shape[-2:], kind.v.shape[-2:]) for n, kind in pool.layers.items()}
    if name == "mimo-v2-flash-tiny":
        assert found == {
            "0": ((2, 16), (2, 12)), "1:3": ((4, 16), (4, 12)), "3": ((2, 16), (2, 12)),
        }  # fmt: skip
        assert pool.keeps_state
    else:
        assert set(found.values()) == {((2, 16), (2, 16))} and not pool.keeps_state
