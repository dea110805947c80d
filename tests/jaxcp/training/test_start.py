# SPDX-License-Identifier: Apache-2.0
"""A run that starts from weights, from another run's state, or from its own old end."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

import jaxcp
from jaxcp.mesh import MeshConfig
from jaxcp.models.gpt.config import GPTConfig
from jaxcp.training import (
    OptimizerConfig,
    StartConfig,
    TextSource,
    TrainConfig,
    read_metrics,
    train,
)
from jaxcp.training.batches import Batches
from jaxcp.training.folder import claim
from jaxcp.training.optimizer import in_words, schedule
from jaxcp.training.start import cooled, from_checkpoint, lengthened
from jaxcp.training.step import init_state, join
from jaxcp.training.validation import whole_loss

GPT = GPTConfig(vocab_size=256, max_positions=32, num_layers=1, num_heads=2, embed_dim=16)
GPT2 = pathlib.Path(__file__).parents[2] / "fixtures" / "gpt2-tiny"
FLAT = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, decay_fraction=0.0)


def run(out_dir, **changes):
    fixed = {
        "model": GPT, "seq_len": 32, "batch_size": 2, "steps": 6, "data": TextSource(),
        "out_dir": out_dir, "log_every": 1, "optimizer": FLAT, "checkpoint_every": 2,
    }  # fmt: skip
    return TrainConfig(**(fixed | changes))


def column(result, name):
    return [record[name] for record in read_metrics(result.metrics_path)]


@pytest.mark.slow
def test_a_cool_down_is_the_end_of_a_run_that_was_planned_so(tmp_path):
    """Bit for bit: the same rates, the same data, the same state."""
    flat = run(tmp_path / "flat", steps=100, stop_after=4)
    train(flat)
    planned = dataclasses.replace(FLAT, decay="linear", decay_fraction=2 / 6, final_fraction=0.0)
    whole = train(run(tmp_path / "planned", optimizer=planned))
    cooling = cooled(flat, 2, tmp_path / "cooled", step=4)
    end = train(dataclasses.replace(cooling, stop_after=None))
    assert (end.steps, end.resumed_from) == (6, None)
    for name in ("loss", "lr", "step", "tokens"):
        assert column(end, name) == column(whole, name)
    assert column(end, "lr")[3:] == pytest.approx([1e-2, 1e-2, 5e-3])
    for a, b in zip(jax.tree.leaves(end.model), jax.tree.leaves(whole.model), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    with pytest.raises(ValueError, match=r"goes on from a flat part; at step 6 the rate is 0\.5"):
        cooled(run(tmp_path / "planned", optimizer=planned), 2, tmp_path / "again")
    with pytest.raises(ValueError, match=r"needed a checkpoint in .*: \[2, 4\]; got step=3"):
        cooled(flat, 2, tmp_path / "again", step=3)


@pytest.mark.slow
def test_a_finished_run_is_made_longer_and_its_schedule_begins_anew(tmp_path):
    optimizer = dataclasses.replace(FLAT, decay="linear", decay_fraction=1.0, final_fraction=0.1)
    config = run(tmp_path, steps=4, optimizer=optimizer)
    with pytest.raises(ValueError, match="needed the configuration of a run"):
        lengthened(config, 10)
    train(dataclasses.replace(config, stop_after=2))
    with pytest.raises(ValueError, match="needed a finished run"):
        lengthened(config, 10)
    losses = column(train(config), "loss")
    longer = lengthened(config, 10)
    assert (longer.steps, longer.extended) == (10, (4,))
    part = train(dataclasses.replace(longer, stop_after=7))
    assert part.resumed_from == 4
    end = train(lengthened(config, 10))  # the same call goes on
    assert (end.resumed_from, end.steps) == (7, 10)
    assert column(end, "loss")[:4] == losses
    #  up again from the last rate, in as many steps as at first, then down to it
    low, top = 1e-3, 1e-2
    again = [low + (top - low) / 2, top, *np.linspace(top, low, 5)[:-1]]
    np.testing.assert_allclose(column(end, "lr")[4:], again, rtol=1e-5)
    with pytest.raises(ValueError, match="steps: 10 -> 4"):
        train(config)
    with pytest.raises(ValueError, match="needed a run of less than 8 steps"):
        lengthened(config, 8)


def test_schedules_by_hand():
    wsd = OptimizerConfig(warmup_steps=4, decay="sqrt", decay_fraction=0.25, final_fraction=0.0)
    rates = [float(schedule(wsd, 1.0, 16)(step)) for step in range(17)]
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0])
    assert rates[4:13] == [1.0] * 9
    np.testing.assert_allclose(rates[13:], [1 - (i / 4) ** 0.5 for i in range(1, 5)], atol=1e-6)
    assert in_words(wsd, 16) == (
        "learning rate, steps 0 to 16: from 0 to 0.0006 in 4 steps, sqrt decay from step 12 to 0"
    )
    assert in_words(FLAT, (4, 10)) == "learning rate, steps 4 to 10: from 0.001 to 0.01 in 2 steps"
    one = [float(schedule(wsd, 1.0, (16,))(step)) for step in range(16)]
    assert one == rates[:16]


def test_weights_of_a_checkpoint_of_transformers_are_where_a_run_begins(tmp_path):
    """The loss of its first state is that of the logits which transformers computed."""
    reference = np.load(GPT2 / "reference.npz")
    ids = reference["input_ids"][:1].astype(np.int32)
    logits = reference["logits"][0, :-1].astype(np.float64)
    picked = logits[np.arange(ids.size - 1), ids[0, 1:]]
    expected = np.mean(np.log(np.exp(logits).sum(-1)) - picked)
    ids.astype("<u2").tofile(tmp_path / "x.bin")
    length = ids.size - 1
    start = run(tmp_path / "out", data=str(tmp_path / "x.bin"), seq_len=8)
    config = dataclasses.replace(from_checkpoint(start, str(GPT2)), seq_len=length)
    assert config.model == jaxcp.load_config(GPT2)
    mesh = MeshConfig().make(jax.devices()[:1])
    with jax.set_mesh(mesh):
        made = Batches(config, mesh)
        loss = whole_loss(config, init_state(config), made.source, made.place)
    assert loss == (pytest.approx(expected, rel=1e-5), length)


def test_weights_of_our_own_are_those_of_step_0(tmp_path):
    saved = jaxcp.GPT(GPT, rngs=nnx.Rngs(7))
    jaxcp.save(saved, tmp_path / "model")
    wider = run(tmp_path / "run", model=dataclasses.replace(GPT, embed_dim=32, remat=True))
    config = from_checkpoint(wider, str(tmp_path / "model"))
    assert config.model == dataclasses.replace(GPT, remat=True)
    claim(config)
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["start"]["weights"] == str(tmp_path / "model")
    resolved = json.loads((tmp_path / "run" / "resolved.json").read_text())
    assert resolved["optimizer"]["learning_rate"] == 1e-2 and resolved["model"]["embed_dim"] == 16
    with jax.set_mesh(MeshConfig().make(jax.devices()[:1])):
        model = join(config.model, init_state(config))
        for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(saved), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        with pytest.raises(ValueError, match=r"another than the run's: embed_dim: 16 -> 32"):
            init_state(dataclasses.replace(wider, start=config.start))


def test_a_start_is_one_place():
    with pytest.raises(ValueError, match="from weights or from a run; got both"):
        StartConfig(weights="a", run="b", step=3)
    with pytest.raises(ValueError, match="go together"):
        StartConfig(run="b")
