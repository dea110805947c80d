# SPDX-License-Identifier: Apache-2.0
"""Drafts and routers' losses in a training step: their definition, on any mesh, in any pieces."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxcp
from jaxcp.data.lookahead import draft_batch
from jaxcp.data.placing import put
from jaxcp.data.sources import checked
from jaxcp.layout import Contiguous, Zigzag
from jaxcp.mesh import MeshConfig
from jaxcp.models.hybrid_moe.config import HybridMoEConfig
from jaxcp.training import LossConfig, OptimizerConfig, TrainConfig, read_metrics, train
from jaxcp.training.metrics import LOADS, as_json
from jaxcp.training.objective import objective, scales_of
from jaxcp.training.step import abstract_inputs
from jaxcp.weights.placement import place

FIXTURE = pathlib.Path(__file__).parents[2] / "fixtures" / "hy3-tiny"
ALL = LossConfig(balance_loss_weight=0.02, z_loss_weight=0.01, mtp_loss_weight=0.3)
TINY = HybridMoEConfig(
    vocab_size=256, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=8,
    mlp_dim=16, moe_dim=8, num_experts=4, num_experts_per_tok=2, num_mtp_layers=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Hy3's fixture with its MTP layer."""
    folder = tmp_path_factory.mktemp("mtp")
    tensors = load_file(FIXTURE / "model.safetensors")
    from safetensors.numpy import save_file

    save_file(tensors | load_file(FIXTURE / "model_mtp.safetensors"), folder / "model.safetensors")
    fields = json.loads((FIXTURE / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"num_nextn_predict_layers": 1}))
    return folder


def documents():
    """Two rows of 32 tokens; the first has two documents, some targets are not to be learnt."""
    tokens = np.load(FIXTURE / "reference_mtp.npz")["input_ids"].astype(np.int32)
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1)}
    batch["segment_ids"] = np.zeros_like(tokens)
    batch["segment_ids"][0, 13:] = 1
    batch["positions"] = np.tile(np.arange(32, dtype=np.int32), (2, 1))
    batch["positions"][0, 13:] -= 13
    batch["targets"][:, -1] = batch["targets"][0, 12] = -1
    batch["weights"] = np.ones(tokens.shape, np.float32)
    batch["weights"][1, :9] = 0.0
    batch = checked(batch, vocab_size=1 << 20)
    return batch | draft_batch(batch, 1)


def gradient(model, batch, strategy):
    """`(gradients by name, parts, stats)` of the pieces of a batch, over its weight."""
    scales = scales_of(batch)

    def loss(model, piece):
        options = {"strategy": strategy, "scales": scales, "chunk": 16}
        return objective(model, piece, ALL, **options)

    found = [
        jax.grad(loss, has_aux=True, allow_int=True)(
            model, jax.tree.map(lambda x, i=i: x[i], batch)
        )
        for i in range(batch["tokens"].shape[0])
    ]
    grads, totals = jax.tree.map(lambda *x: sum(x[1:], x[0]), *found)
    over = lambda x: x / totals.weight  # noqa: E731
    grads = jax.tree_util.tree_leaves_with_path(jax.tree.map(over, grads))
    names = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in grads}
    return names, jax.tree.map(over, totals.parts), totals.stats


run = jax.jit(gradient, static_argnums=2)


@pytest.fixture(scope="module")
def alone(folder):
    model, _ = jaxcp.load(folder)
    return run(model, jax.tree.map(lambda x: jnp.asarray(x)[None], documents()), None)


@pytest.mark.slow
def test_the_loss_of_drafts_is_the_definition(folder, alone):
    """From the model's logits, in float64, target by target."""
    batch = documents()
    model, _ = jaxcp.load(folder)
    ids = {"segment_ids": jnp.asarray(batch["segment_ids"])}
    logits = np.asarray(
        model.mtp_logits(
            *(jnp.asarray(batch[k]) for k in ("tokens", "following", "positions")), **ids
        )[0],
        np.float64,
    )
    losses, weights = [], []
    for row, at in np.ndindex(2, 30):
        if batch["segment_ids"][row, at] != batch["segment_ids"][row, at + 2]:
            continue  # the token after next is in another document
        weight = batch["weights"][row, at + 1]
        line = logits[row, at]
        losses.append(weight * (np.log(np.exp(line).sum()) - line[batch["tokens"][row, at + 2]]))
        weights.append(weight)
    assert sum(weights) < 60 - 9
    np.testing.assert_allclose(alone[1]["mtp_loss"], sum(losses) / sum(weights), rtol=1e-5)
    reached = [name for name in alone[0] if name.startswith("mtp.") and "router_bias" not in name]
    assert len(reached) > 10 and all(np.abs(alone[0][name]).max() > 0 for name in reached)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "layout"),
    [
        ({"data": 2, "seq": 4}, Zigzag()),
        ({"data": 2, "seq": 2}, Contiguous()),
        ({"seq": 2, "model": 2}, Zigzag()),
        ({"seq": 3}, Zigzag()),
    ],
    ids=["zigzag", "contiguous", "model", "with pads"],
)
def test_every_loss_and_gradient_is_that_of_one_device(folder, alone, axes, layout, mesh_of):
    mesh_of(**axes)
    model, _ = jaxcp.load(folder)
    mesh = jax.sharding.get_mesh()
    batch = put(documents(), mesh=mesh, layout=layout)
    grads, parts, stats = run(place(model), batch, jaxcp.Ring(layout=layout))
    assert parts.keys() == {"loss", "mtp_loss", "router_balance_loss", "router_z_loss"}
    for name in parts:
        np.testing.assert_allclose(parts[name], alone[1][name], rtol=1e-5, err_msg=name)
    for name, x in alone[0].items():
        if x.dtype != jax.dtypes.float0:
            scale = max(1.0, np.abs(x).max())
            np.testing.assert_allclose(grads[name], x, atol=2e-5 * scale, err_msg=name)
    np.testing.assert_allclose(stats.load, alone[2].load, atol=1e-6)


@pytest.mark.slow
def test_pieces_make_the_same_loss_of_drafts(folder, alone):
    """Rows with other weights: a mean over pieces would not be that of the batch."""
    model, _ = jaxcp.load(folder)
    batch = jax.tree.map(lambda x: jnp.asarray(x)[:, None], documents())
    _, parts, _ = run(model, batch, None)
    for name in ("loss", "mtp_loss"):
        np.testing.assert_allclose(parts[name], alone[1][name], rtol=1e-5)


def test_what_a_draft_is_trained_on():
    batch = {
        "tokens": np.array([[5, 6, 7, 8, 9]]),
        "targets": np.array([[6, 7, -1, 9, 3]]),
        "weights": np.array([[1, 2, 0, 3, 4]], np.float32),
        "segment_ids": np.array([[0, 0, 0, 1, 1]]),
    }
    found = {name: x[0, :, 0].tolist() for name, x in draft_batch(batch, 1).items()}
    assert found["following"] == [6, 7, 0, 9, 0]
    assert found["draft_targets"] == [7, -1, -1, 3, -1]
    assert found["draft_weights"] == [2, 0, 0, 4, 0]


def config(folder, **changes):
    fixed = {"steps": 2, "seq_len": 20, "batch_size": 2, "data": jaxcp.training.TextSource()}
    fixed |= {"model": TINY, "log_every": 1, "optimizer": OptimizerConfig(warmup_steps=1)}
    return TrainConfig(**(fixed | {"out_dir": folder} | changes))


@pytest.mark.slow
def test_the_record_shows_losses_and_loads(tmp_path):
    result = train(config(tmp_path, losses=ALL, mesh=MeshConfig(data=2, seq=2)))
    first, last = read_metrics(result.metrics_path)
    assert last["mtp_loss"] < first["mtp_loss"] and first["router_balance_loss"] >= 0.9
    assert first["router_z_loss"] > 0 and first["router_flips"] == 0
    load = np.asarray(first["router_load"])
    assert load.shape == (2, 4)  # one MoE layer, and the MTP layer's
    np.testing.assert_allclose(load.mean(1), 100, atol=1)
    bias = result.model.mtp.block.mlp.router_bias.get_value()
    assert np.abs(bias).max() > 0  # balanced too


@pytest.mark.slow
def test_a_router_without_a_selection_bias_is_trained_by_its_loss(tmp_path):
    """And where its weight is 0, the record does not speak of it."""
    routing = dataclasses.replace(TINY.experts.routing, scores="softmax", selection_bias=False)
    experts = dataclasses.replace(TINY.experts, routing=routing)
    model = dataclasses.replace(TINY, experts=experts, num_mtp_layers=0)
    off = read_metrics(train(config(tmp_path / "off", model=model)).metrics_path)
    losses = LossConfig(balance_loss_weight=1.0)
    on = read_metrics(train(config(tmp_path / "on", model=model, losses=losses)).metrics_path)
    assert "router_balance_loss" not in off[0] and on[0]["loss"] == off[0]["loss"]
    assert on[0]["router_balance_loss"] >= 0.9 and on[0]["grad_norm"] != off[0]["grad_norm"]


def test_abstract_batches_have_what_drafts_need(tmp_path):
    made = config(tmp_path, mesh=MeshConfig(data=2, seq=2))
    mesh = made.mesh.make(jax.devices()[:4])
    _, abstract = abstract_inputs(made, mesh)
    host = checked(made.data.batch(0, 2, 20), vocab_size=256)
    real = put(host | draft_batch(host, 1), mesh=mesh, layout=Zigzag())
    shapes = {name: (x.shape, x.dtype) for name, x in real.items()}
    assert {name: (x.shape, x.dtype) for name, x in abstract.items()} == shapes


def test_a_record_stays_small():
    out = {"loss": jnp.float32(2.0), "router_load": jnp.full((80, 192), 1.004)}
    assert out["router_load"].size > LOADS and as_json(out, whole=False) == {"loss": 2.0}
    assert as_json(out, whole=True)["router_load"][79][191] == 100
    small = as_json({"router_load": jnp.array([[0.5, 1.5]])}, whole=False)
    assert small == {"router_load": [[50, 150]]}
