# SPDX-License-Identifier: Apache-2.0
"""Evaluation is exact on any mesh, its best state stays, and the model writes meanwhile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcp
from jaxcp.data.prepare import prepare
from jaxcp.mesh import MeshConfig
from jaxcp.models.gpt.config import GPTConfig
from jaxcp.text.encoders import byte_encoder
from jaxcp.training import (
    OptimizerConfig,
    Profile,
    SampleConfig,
    TextSource,
    TokenFiles,
    TrainConfig,
    checkpoint,
    read_metrics,
    train,
)
from jaxcp.training.batches import Batches
from jaxcp.training.step import init_state, join
from jaxcp.training.validation import validation_source, whole_loss

GPT = GPTConfig(vocab_size=256, max_positions=64, num_layers=1, num_heads=2, embed_dim=32)
VAL = TextSource(part=(0.0, 0.0015))  # some 700 bytes


def run(out_dir, **changes):
    config = {
        "model": GPT, "seq_len": 50, "batch_size": 4, "steps": 4, "data": TextSource(),
        "eval_data": VAL, "eval_every": 2, "out_dir": out_dir, "log_every": 1,
        "optimizer": OptimizerConfig(warmup_steps=2), "loss_chunk": 32,
    }  # fmt: skip
    return TrainConfig(**(config | changes))


def losses_of_rows(model, tokens, length):
    """The loss of every token but the first, row by row, in float64."""
    out = []
    for start in range(0, len(tokens) - 1, length):
        row = tokens[start : start + length + 1].astype(np.int32)
        logits = np.asarray(jaxcp.logits(model, row[None, :-1]), np.float64)[0]
        logits -= logits.max(-1, keepdims=True)
        picked = np.take_along_axis(logits, row[1:, None], -1)[:, 0]
        out.append(np.log(np.exp(logits).sum(-1)) - picked)
    return np.concatenate(out)


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=2, seq=4)], ids=["1", "8"])
def test_every_token_counts_once_on_any_mesh(tmp_path, mesh):
    config = run(tmp_path, mesh=mesh)
    made = mesh.make(jax.devices()[: mesh.size])
    with jax.set_mesh(made):
        state = init_state(config)
        loss = whole_loss(config, state, VAL, Batches(config, made).place)
        arrays = jax.tree.map(np.asarray, state)
    assert loss.tokens == len(VAL.tokens) - 1 and loss.tokens % 50  # the last window is partial
    expected = losses_of_rows(join(GPT, arrays), VAL.tokens, 50)
    assert len(expected) == loss.tokens
    assert loss.mean == pytest.approx(expected.mean(), rel=1e-6)


def test_a_separator_is_no_target_of_an_evaluation(tmp_path):
    """Documents that are apart: what ends one predicts nothing, and nobody looks across."""
    ids = np.frombuffer(b"one two three\0four five\0six", np.uint8)
    ids.tofile(tmp_path / "x.bin")
    source = TokenFiles(pattern=str(tmp_path / "x.bin"), dtype="uint8", separator=0)
    config = run(tmp_path, eval_data=source, data=source)
    made = MeshConfig().make(jax.devices()[:1])
    with jax.set_mesh(made):
        state = init_state(config)
        loss = whole_loss(config, state, source, Batches(config, made).place)
        arrays = jax.tree.map(np.asarray, state)
    model = join(GPT, jax.tree.map(jnp.asarray, arrays))
    positions = np.arange(len(ids), dtype=np.int32)
    segments = (np.cumsum(ids == 0) - (ids == 0)).astype(np.int32)
    hidden, _ = model.hidden(
        ids[None].astype(np.int32), positions[None], segment_ids=segments[None]
    )
    logits = np.asarray(hidden @ model.head_kernel(), np.float64)[0, :-1]
    every = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids) - 1), ids[1:]]
    assert loss.tokens == len(ids) - 1 - 2
    assert loss.mean == pytest.approx(every[ids[:-1] != 0].mean(), rel=1e-5)


@pytest.mark.slow
def test_the_best_state_stays_and_the_record_has_it_all(tmp_path):
    """A rate that is far too high: the first evaluation is the best."""
    options = {"optimizer": OptimizerConfig(learning_rate=0.3, warmup_steps=0, decay_fraction=0.0)}
    result = train(run(tmp_path, steps=6, checkpoint_every=4, **options))
    records = read_metrics(result.metrics_path)
    evaluated = {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r}
    assert [*evaluated] == [2, 4, 6] and result.eval_loss == evaluated[6]
    assert result.best_step == min(evaluated, key=evaluated.__getitem__)
    assert result.best_loss == evaluated[result.best_step]
    assert checkpoint.steps(tmp_path / "best") == [result.best_step]
    assert all(r["eval_tokens"] == len(VAL.tokens) - 1 for r in records if "eval_loss" in r)
    startup = records[0]["startup"]
    assert startup.keys() == {"init", "restore", "compile", "first_step"}
    assert startup["compile"] > 0 and startup["first_step"] > sum(startup.values()) / 2
    assert all("startup" not in record for record in records[1:])
    assert records[1]["flops_per_second"] > 0 and records[1]["mfu_mask"] == "causal"
    assert all("mfu" not in record for record in records)  # nobody knows a CPU's peak


@pytest.mark.slow
def test_an_evaluation_changes_nothing_and_resuming_does_not_repeat_it(tmp_path):
    plain = train(run(tmp_path / "plain", eval_every=None, eval_data=None))
    first = train(run(tmp_path / "looked", stop_after=3))
    again = train(run(tmp_path / "looked"))
    assert (first.steps, again.resumed_from) == (3, 3)
    losses = [[r["loss"] for r in read_metrics(x.metrics_path)] for x in (plain, again)]
    assert losses[0] == losses[1]
    with_loss = [r["step"] for r in read_metrics(again.metrics_path) if "eval_loss" in r]
    assert with_loss == [2, 4]


def test_a_run_needs_something_to_be_evaluated_on(tmp_path):
    with pytest.raises(ValueError, match="eval_every needs eval_data that can be gone through"):
        run(tmp_path, eval_data=None)
    np.zeros(500, "<u2").tofile(tmp_path / "x.bin")
    config = run(tmp_path / "out", data=str(tmp_path / "x.bin"), eval_data=None)
    with pytest.raises(ValueError, match=r"is no folder of `jaxcp prepare`"):
        train(config)
    with pytest.raises(ValueError, match="samples need data whose tokenizer is known"):
        train(run(tmp_path / "out", data=str(tmp_path / "x.bin"), samples=SampleConfig(every=1)))
    with pytest.raises(ValueError, match="has 100 tokens; the model has 64 positions"):
        train(run(tmp_path / "out", samples=SampleConfig(every=1, prompt="x" * 100)))


def test_the_validation_part_of_a_folder_is_as_its_training_part(tmp_path):
    prepare(["tinyshakespeare"], tmp_path / "data", encoder=byte_encoder(separator="\n"))
    folder = str(tmp_path / "data")
    for data in (folder, TokenFiles(pattern=folder, isolate=False)):
        source = validation_source(run(tmp_path, data=data, eval_data=None))
        assert (source.part, source.isolate) == ("val", data == folder)
        assert source.stream.total == 111_541  # the separator is its end
        assert source.stream.separator == (256 if data == folder else None)


def test_a_profile_is_a_step_and_a_count():
    assert Profile.parse("2:2") == Profile(step=2, count=2) and Profile.parse("7").count == 1
    with pytest.raises(ValueError, match="takes STEP:COUNT, as 100:5; got '2:x'"):
        Profile.parse("2:x")
    with pytest.raises(ValueError, match="a step and a count of 1 or more"):
        Profile.parse("0:2")
