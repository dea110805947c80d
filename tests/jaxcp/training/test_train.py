# SPDX-License-Identifier: Apache-2.0
"""Runs: the same numbers on any mesh, bit for bit the same after any interruption."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcp.layers.router_stats import RouterStats
from jaxcp.mesh import MeshConfig
from jaxcp.models.gpt.config import GPTConfig
from jaxcp.models.hybrid_moe.config import HybridMoEConfig
from jaxcp.sharding import Rules
from jaxcp.training import (
    OptimizerConfig,
    TextSource,
    TrainConfig,
    checkpoint,
    load_run,
    read_metrics,
    train,
)
from jaxcp.training.step import abstract_inputs, balance, init_state, routing_health

GPT = GPTConfig(vocab_size=256, max_positions=64, num_layers=1, num_heads=2, embed_dim=32)
MOE = HybridMoEConfig(
    vocab_size=256, num_layers=1, embed_dim=32, num_heads=2, num_kv_heads=2, head_dim=16,
    mlp_dim=64, moe_dim=16, num_experts=4, num_experts_per_tok=2, first_dense_layers=0,
)  # fmt: skip
SPREAD = MeshConfig(data=2, seq=4)
RULES = Rules(experts="seq")


def run(out_dir, **changes):
    """A run of 6 steps; two with the same model, optimizer and mesh share their compiled step."""
    config = {
        "model": GPT, "seq_len": 60, "batch_size": 4, "steps": 6, "data": TextSource(),
        "out_dir": out_dir, "optimizer": OptimizerConfig(muon_learning_rate=0.02, warmup_steps=2),
        "log_every": 1, "checkpoint_every": 3, "rules": RULES,
    }  # fmt: skip
    return TrainConfig(**(config | changes))


def arrays(model):
    return [np.asarray(x) for x in jax.tree.leaves(model)]


def losses(result):
    return [record["loss"] for record in read_metrics(result.metrics_path)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Six steps without interruption, on one device and on eight."""
    folder = tmp_path_factory.mktemp("straight")
    return {mesh: train(run(folder / str(mesh.size), mesh=mesh)) for mesh in (MeshConfig(), SPREAD)}


def test_eight_devices_train_as_one(straight):
    one, eight = (losses(straight[mesh]) for mesh in (MeshConfig(), SPREAD))
    assert len(one) == 6 and one[-1] < one[0]
    np.testing.assert_allclose(one, eight, rtol=1e-4)


def test_the_record_of_a_run(straight):
    result = straight[SPREAD]
    records = read_metrics(result.metrics_path)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert [r["tokens"] for r in records] == [240 * step for step in range(1, 7)]
    assert records[0]["tokens_per_second"] is None and records[1]["tokens_per_second"] > 0
    assert all(r["grad_norm"] > 0 and r["lr"] > 0 and r["seconds"] > 0 for r in records)
    assert result.final_loss == records[-1]["loss"] and result.steps == 6
    assert result.resumed_from is None and result.checkpoint_path.is_dir()


@pytest.mark.parametrize("mesh", [MeshConfig(), SPREAD], ids=["one device", "seq=4, data=2"])
def test_a_resumed_run_is_bitwise_the_straight_one(straight, tmp_path, mesh):
    first = train(run(tmp_path, mesh=mesh, stop_after=3))
    assert first.steps == 3
    second = train(run(tmp_path, mesh=mesh))
    assert (second.resumed_from, second.steps) == (3, 6)
    assert losses(second) == losses(straight[mesh])
    for a, b in zip(arrays(second.model), arrays(straight[mesh].model), strict=True):
        np.testing.assert_array_equal(a, b)
    again = train(run(tmp_path, mesh=mesh))  # done already: nothing to do
    assert (again.resumed_from, again.final_loss) == (6, second.final_loss)


def test_a_damaged_newest_checkpoint_costs_steps_and_nothing_else(straight, tmp_path):
    mesh = MeshConfig()
    train(run(tmp_path, mesh=mesh, checkpoint_every=2, stop_after=4))
    newest = tmp_path / "checkpoints" / "4"
    file = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    file.write_bytes(file.read_bytes()[:100])
    result = train(run(tmp_path, mesh=mesh))
    assert result.resumed_from == 2
    assert losses(result) == losses(straight[mesh])
    for a, b in zip(arrays(result.model), arrays(straight[mesh].model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_another_mesh_continues(straight, tmp_path):
    train(run(tmp_path, mesh=MeshConfig(), stop_after=3))
    result = train(run(tmp_path, mesh=SPREAD))
    assert result.resumed_from == 3
    np.testing.assert_allclose(losses(result), losses(straight[SPREAD]), rtol=1e-4)


# With the same devices and precision as here: bit for bit holds for one set-up, not across them.
CHILD = """
import sys
import conftest
from test_train import run
from jaxcp.layers.router_stats import RouterStats
from jaxcp.mesh import MeshConfig
from jaxcp.training import train
train(run(sys.argv[1], mesh=MeshConfig(), steps=500, checkpoint_every=1))
"""


@pytest.mark.slow
def test_a_killed_process_resumes_bit_for_bit(tmp_path):
    here = pathlib.Path(__file__).parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [here, here.parents[1], *sys.path]))}
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path / "killed")], env=env)
    try:
        saved = tmp_path / "killed" / "checkpoints"
        deadline = time.monotonic() + 300
        while len(checkpoint.steps(saved)) < 2:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    options = {"mesh": MeshConfig(), "steps": 500, "checkpoint_every": 100}
    killed = checkpoint.steps(saved)[-1]
    resumed = train(run(tmp_path / "killed", stop_after=killed + 3, **options))
    whole = train(run(tmp_path / "whole", stop_after=killed + 3, **options))
    assert resumed.resumed_from == killed
    assert losses(resumed) == losses(whole)
    for a, b in zip(arrays(resumed.model), arrays(whole.model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_accumulation_changes_memory_and_not_the_step(straight, tmp_path):
    result = train(run(tmp_path, mesh=MeshConfig(), accumulate=4))
    np.testing.assert_allclose(losses(result), losses(straight[MeshConfig()]), rtol=1e-4)


@pytest.mark.slow
def test_router_bias_moves_towards_even_load(tmp_path):
    result = train(run(tmp_path, model=MOE, mesh=MeshConfig(seq=2, model=2), steps=2))
    bias = np.asarray(result.model.layers[0].mlp.router_bias.get_value())
    assert np.abs(bias).max() == pytest.approx(2e-3, rel=1e-3) and bias.min() < 0 < bias.max()


@pytest.mark.slow
def test_routing_health_is_that_of_one_device(tmp_path):
    """60 tokens on 4 shards have pads, which must not count as choices."""
    one, eight = (
        read_metrics(train(run(tmp_path / str(m.size), model=MOE, mesh=m, steps=2)).metrics_path)
        for m in (MeshConfig(), SPREAD)
    )
    for a, b in zip(one, eight, strict=True):
        assert a["router_load_max"] >= 1 and 0 < a["router_entropy"] <= 1
        for name in ("router_load_max", "router_entropy", "router_idle"):
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-3), name


def test_routing_health_by_hand():
    load = jnp.array([[0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 0.0, 0.0]])  # of two pieces
    health = routing_health(RouterStats(load, load, jnp.zeros(2), jnp.array([0.4, 0.8])))
    assert health["router_flips"] == pytest.approx(0.3)
    assert health["router_load"].tolist() == [[1, 1, 1, 1], [2, 2, 0, 0]]
    assert health["router_load_max"] == 2.0  # of eight choices four, where two are even
    assert health["router_entropy"] == pytest.approx(0.5)  # one bit of two
    assert health["router_idle"] == 0.25


def test_balance_favours_the_expert_that_is_chosen_too_seldom():
    names = [f"layers.{layer}.mlp.router_bias" for layer in (2, 10)]
    load = jnp.array([[0.7, 0.1, 0.2], [0.3, 0.4, 0.3]])
    # jit hands dicts on in alphabetical order
    moved = jax.jit(balance)({name: jnp.zeros(3) for name in names}, load, 0.01)
    np.testing.assert_allclose(moved[names[0]], [-0.01, 0.01, 0.01])
    np.testing.assert_allclose(moved[names[1]], [0.01, -0.01, 0.01])


def test_bfloat16_compute_keeps_float32_parameters(tmp_path):
    low = dataclasses.replace(GPT, dtype="bfloat16", remat=True)
    result = train(run(tmp_path, model=low, mesh=MeshConfig()))
    assert {x.dtype for x in arrays(result.model)} == {np.dtype("float32")}
    assert losses(result)[-1] < losses(result)[0]


def test_stops_on_time_and_goes_on(tmp_path):
    config = run(tmp_path, mesh=MeshConfig())
    result = train(dataclasses.replace(config, max_seconds=1e-3))
    assert result.steps == 1 and result.checkpoint_path.is_dir()
    assert train(config, progress=True).resumed_from == 1


def test_another_configuration_is_refused_by_field(tmp_path):
    train(run(tmp_path, mesh=MeshConfig(), stop_after=1))
    wider = dataclasses.replace(GPT, embed_dim=64)
    optimizer = OptimizerConfig(muon_learning_rate=0.03, warmup_steps=2)
    with pytest.raises(ValueError) as error:
        train(run(tmp_path, model=wider, optimizer=optimizer, data=TextSource(seed=7)))
    for line in (
        "model.embed_dim: 32 -> 64",
        "optimizer.muon_learning_rate: 0.02 -> 0.03",
        "data.seed: 0 -> 7",
    ):
        assert line in str(error.value)
    assert "seq_len" not in str(error.value)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    class Blank:
        def batch(self, step, rows, length):
            tokens = np.ones((rows, length), np.int32)
            weights = np.full((rows, length), 1.0 if step < 2 else np.nan, np.float32)
            return {"tokens": tokens, "targets": tokens, "weights": weights}

    with pytest.raises(FloatingPointError, match="step 3 has loss nan"):
        train(run(tmp_path, mesh=MeshConfig(), data=Blank(), checkpoint_every=1, max_skipped=1))
    assert (tmp_path / "checkpoints" / "2").is_dir()


def test_data_outside_the_vocabulary_and_meshes_that_do_not_fit(tmp_path):
    small = dataclasses.replace(GPT, vocab_size=100)
    with pytest.raises(ValueError, match="the vocabulary has 100"):
        train(run(tmp_path / "a", model=small, mesh=MeshConfig()))
    with pytest.raises(ValueError, match="needs 16 devices"):
        train(run(tmp_path / "b", mesh=MeshConfig(seq=16)))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"steps": 0}, "steps must be positive; got steps=0"),
        (
            {"batch_size": 3, "mesh": SPREAD},
            "divide by accumulate x mesh.data = 1 x 2; got batch_size=3",
        ),
        ({"data": 5}, "data must be a glob"),
        ({"seq_len": 100}, "the model has 64 positions"),
    ],
)
def test_a_configuration_that_cannot_be(changes, match):
    with pytest.raises(ValueError, match=match):
        run("out", **changes)


@pytest.mark.parametrize(
    "changes", [{"decay": "square"}, {"clip_norm": 0}, {"beta1": 2.0}, {"warmup_steps": -1}]
)
def test_an_optimizer_that_cannot_be(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        OptimizerConfig(**changes)


def test_runs_are_files(tmp_path, monkeypatch):
    for name in ("gpt_cpu", "gpt2_124m"):
        assert isinstance(load_run(name), TrainConfig)
    assert load_run("gpt2_124m").seq_len == 32_768
    with pytest.raises(ValueError, match=r"no run 'gpt9'.*gpt_cpu"):
        load_run("gpt9")
    (tmp_path / "mine.py").write_text("def config(): return 3")
    with pytest.raises(ValueError, match="must return a TrainConfig; got int"):
        load_run(tmp_path / "mine.py")
    (tmp_path / "mine.py").write_text("x = 1")
    with pytest.raises(ValueError, match="must define config"):
        load_run(tmp_path / "mine.py")


def test_abstract_inputs_are_what_a_run_has():
    config = run("out", mesh=SPREAD)
    mesh = config.mesh.make()
    with jax.set_mesh(mesh):
        real = init_state(config)
    abstract, batch = abstract_inputs(config, mesh)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
        lambda x: (x.shape, x.dtype), real
    )
    assert batch["tokens"].shape == (1, 4, 64)
