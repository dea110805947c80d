# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V3, V3.2 and V4 compute what transformers computes, over any number of shards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from tiny_checkpoints import FIXTURES, flat, tensors, write

import jaxcp
from jaxcp import Striped, Zigzag
from jaxcp.attention.whole_sequence import WholeSequence

V3, V32, V4 = "deepseek-v3-tiny", "deepseek-v32-tiny", "deepseek-v4-tiny"
LAYERS = {V3: 3, V32: 3, V4: 5}
# These programs are compiled to run once: two thirds of the time without LLVM's optimisations.


@functools.cache
def reference(name):
    return dict(np.load(FIXTURES / name / "reference.npz"))


def on_mesh(tokens, layout, shards):
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    there = {"tokens": tokens, "positions": positions, "targets": np.roll(tokens, -1, axis=1)}
    there["targets"][:, -1] = -1
    there = layout.permute({k: v.astype(np.int32) for k, v in there.items()}, shards)
    if not jax.sharding.get_abstract_mesh().empty:
        there = jax.device_put(there, P("data", "seq"))
    return there


@functools.partial(jax.jit, static_argnames=("strategy", "count"))
def states(model, batch, strategy=None, count=None):
    """The residual stream before the first `count` layers and after them; logits after the last."""
    tokens, positions = batch["tokens"], batch["positions"]
    attend = WholeSequence(positions, strategy=strategy, consecutive=strategy is not None)
    v4 = isinstance(model, jaxcp.DeepSeekV4)
    x = model.embedded(tokens, positions)
    found = [x]
    for layer in model.layers[:count]:
        x, _ = layer(x, *([tokens] if v4 else []), positions, attend)
        found.append(x)
    if count is None:
        found[-1] = model.final_norm(model.streams_to_one(x) if v4 else x)
        found.append(model.logits(found[-1]))
    return found


def expected_states(name, count):
    return [reference(name)[f"hidden_{i:02d}"] for i in range(count + 1)]


def same(found, expected):
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        limit = 1e-4 * max(1, np.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, atol=limit, rtol=0, err_msg=str(i))


@pytest.mark.parametrize("name", [V3, V32, pytest.param(V4, marks=pytest.mark.slow)])
def test_every_layer_is_that_of_transformers(name):
    model, _ = jaxcp.load(FIXTURES / name)
    found = states(model, on_mesh(reference(name)["input_ids"], Zigzag(), 1))
    same(found[:-1], expected_states(name, LAYERS[name]))  # the last is normed, as theirs is
    np.testing.assert_allclose(found[-1], reference(name)["logits"], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, axes, strategy, length",
    [
        (V3, {"seq": 3}, jaxcp.Ring(), 29),
        (V32, {"seq": 4, "model": 2}, None, 29),
        # of V4: a window, blocks of 8 tokens, selected blocks of 4; pieces hold 1 or 2
        (V4, {"seq": 8}, jaxcp.Ring(), 29),
    ],
    ids=str,
)
def test_layers_over_a_mesh(name, axes, strategy, length, mesh_of):
    """The first three layers; a causal model's states do not depend on what comes later."""
    mesh_of(**axes)
    model, _ = jaxcp.load(FIXTURES / name)
    layout = Zigzag() if strategy is None else strategy.layout
    batch = on_mesh(reference(name)["input_ids"][:, :length], layout, axes["seq"])
    count = 3 if name == V4 else 2
    found = layout.inverse(states(model, batch, strategy, count), axes["seq"], length)
    same(found, [x[:, :length] for x in expected_states(name, count)])


@jax.jit
def loss_and_gradients(model, batch):
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    def loss(parameters):
        logits = nnx.merge(graph, parameters, rest)(
            batch["tokens"], batch["positions"], strategy=jaxcp.Ring(), consecutive=True
        )
        wanted = batch["targets"][..., None] == jnp.arange(logits.shape[-1])
        picked = jnp.where(wanted, jax.nn.log_softmax(logits), 0.0).sum()
        return -picked / (batch["targets"] >= 0).sum().astype(jnp.float32), logits

    return jax.value_and_grad(loss, has_aux=True)(parameters)


@pytest.mark.slow
def test_logits_and_gradients_of_v4_are_those_of_transformers(mesh_of, tmp_path):
    gradients = {
        k.removeprefix("grad/"): v for k, v in np.load(FIXTURES / V4 / "grads.npz").items()
    }
    # what no gradient reaches: the index selects, biases and tables of the router choose
    no_gradient = ("gate.bias", "tid2eid")
    rest = {k: v for k, v in tensors(V4).items() if "indexer" in k or k.endswith(no_gradient)}
    expected = flat(jaxcp.load(write(tmp_path / "grads", V4, gradients | rest))[0])
    mesh_of(seq=2, model=2)
    model, _ = jaxcp.load(FIXTURES / V4)
    batch = on_mesh(reference(V4)["input_ids"], Zigzag(), 2)
    (loss, logits), found = loss_and_gradients(model, batch)
    np.testing.assert_allclose(loss, reference(V4)["lm_loss"], rtol=1e-5)
    logits = Zigzag().inverse(logits, 2, 32)
    np.testing.assert_allclose(logits, reference(V4)["logits"], atol=1e-4, rtol=0)
    for length, name in ((29, "logits_tail"), (32, "logits_cached")):
        np.testing.assert_allclose(logits[:, :length], reference(V4)[name], atol=1e-4, rtol=0)
    for keys, leaf in nnx.to_flat_state(found):
        path = ".".join(map(str, keys))
        if ".index." in path:
            assert not np.any(leaf.get_value()), path
            continue
        limit = 1e-4 * np.abs(expected[path]).max()
        np.testing.assert_allclose(leaf.get_value(), expected[path], atol=limit, rtol=0,
                                   err_msg=path)  # fmt: skip


def test_what_v4_cannot_do_is_said(mesh_of):
    mesh_of(seq=2)
    model, _ = jaxcp.load(FIXTURES / V4)
    batch = on_mesh(reference(V4)["input_ids"], Striped(), 2)
    arrays = batch["tokens"], batch["positions"]
    with pytest.raises(NotImplementedError, match=r"runs of consecutive tokens.*use Zigzag\(\)"):
        jax.eval_shape(lambda *x: model(*x, strategy=jaxcp.Ring(layout=Striped())), *arrays)
    with pytest.raises(NotImplementedError, match=r"no reproducible form; use Ring\(\)"):
        strategy = jaxcp.FixedOrder()
        jax.eval_shape(lambda *x: model(*x, strategy=strategy), *arrays)


@pytest.mark.parametrize(
    ("name", "why"), [(V4, "blocks are numbered by position"), (V32, "it scores all keys before")]
)
def test_packed_documents_are_refused_with_the_reason(name, why):
    model = jaxcp.abstract_model(jaxcp.load_config(FIXTURES / name))
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    refused = rf"packed documents apart \({why}.*got segment_ids: give each document a row"
    with pytest.raises(NotImplementedError, match=refused):
        jax.eval_shape(lambda m, x: m(x, x, segment_ids=x), model, tokens)
