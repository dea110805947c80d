# SPDX-License-Identifier: Apache-2.0
"""A context that grows during a run: the numbers of runs that begin where its stages do."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest
from slow import slow_but

import jaxcp
from jaxcp.context_parallel import FixedOrder
from jaxcp.mesh import MeshConfig
from jaxcp.models.dense.config import DenseConfig
from jaxcp.models.gpt.config import GPTConfig
from jaxcp.models.hybrid_moe.config import AttentionConfig, HybridMoEConfig
from jaxcp.training import (
    ContextStage,
    OptimizerConfig,
    StartConfig,
    TextSource,
    TokenFiles,
    TrainConfig,
    export_run,
    read_metrics,
    train,
)
from jaxcp.training.overrides import override

MODEL = DenseConfig(
    vocab_size=256, num_layers=1, embed_dim=32, num_heads=2, num_kv_heads=1, head_dim=16,
    mlp_dim=32, trained_positions=16,
)  # fmt: skip
GPT = GPTConfig(vocab_size=256, max_positions=32, num_layers=1, num_heads=1, embed_dim=16)
STAGES = (
    ContextStage(step=2, seq_len=32, rope_theta=5e4),
    ContextStage(step=4, seq_len=48),
)


def run(out_dir, **changes):
    config = {
        "model": MODEL, "seq_len": 16, "batch_size": 4, "steps": 6, "data": TextSource(),
        "out_dir": out_dir, "optimizer": OptimizerConfig(warmup_steps=2, learning_rate=1e-2),
        "log_every": 1, "checkpoint_every": 2, "keep": 4, "loss_chunk": 64, "context": STAGES,
        "keep_programs": False,
    }  # fmt: skip
    return TrainConfig(**(config | changes))


def records(result):
    return read_metrics(result.metrics_path)


def losses(result):
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in records(result)}


def assert_same_weights(a, b):
    for x, y in zip(jax.tree.leaves(a.model), jax.tree.leaves(b.model), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    return train(run(tmp_path_factory.mktemp("grown")))


def test_the_record_says_what_the_context_is(grown):
    said = [(r["step"], r["context"], r["rope_theta"], r["tokens"]) for r in records(grown)]
    assert said == [
        (1, 16, 1e4, 64), (2, 16, 1e4, 128),
        (3, 32, 5e4, 256), (4, 32, 5e4, 384),
        (5, 48, 5e4, 576), (6, 48, 5e4, 768),
    ]  # fmt: skip


@pytest.mark.parametrize(("step", "length"), [(2, 32), (4, 48)])
def test_a_stage_is_a_run_that_begins_at_its_checkpoint(grown, tmp_path, step, length):
    """Bit for bit, with the length and the base in its config from the beginning."""
    rope = dataclasses.replace(MODEL.rope, theta=5e4)
    alone = run(
        tmp_path, context=STAGES[1:] if step == 2 else (), seq_len=length,
        model=dataclasses.replace(MODEL, rope=rope, trained_positions=length),
        start=StartConfig(run=str(grown.checkpoint_path.parents[1]), step=step),
    )  # fmt: skip
    result = train(alone)
    assert losses(result) == losses(grown) and len(losses(result)) == 6
    assert_same_weights(result, grown)


@pytest.mark.parametrize("stop", slow_but([2, 3, 4], lambda stop: stop == 3))
def test_a_run_resumes_in_any_stage(grown, tmp_path, stop):
    assert train(run(tmp_path, stop_after=stop)).steps == stop
    again = train(run(tmp_path))
    assert again.resumed_from == stop and losses(again) == losses(grown)
    assert_same_weights(again, grown)


def test_the_checkpoint_says_the_last_context(grown, tmp_path):
    """And gives the logits of the run's own model."""
    config = run(tmp_path)
    export_run(grown, config, tmp_path / "model")
    fields = json.loads((tmp_path / "model" / "config.json").read_text())
    assert fields["rope_parameters"]["rope_theta"] == 5e4
    assert fields["max_position_embeddings"] == 48
    tokens = np.arange(80).reshape(2, 40)
    loaded = jaxcp.load(tmp_path / "model")[0]
    with jax.set_mesh(MeshConfig().make(jax.devices()[:1])):
        ours = jaxcp.logits(grown.model, tokens)
    theirs = jaxcp.logits(loaded, tokens)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    rope = dataclasses.replace(loaded.config.rope, theta=1e4)
    other = dataclasses.replace(loaded.config, rope=rope)
    (tmp_path / "model" / "config.json").write_text(
        json.dumps(fields | {"rope_parameters": other.rope.to_hf()})
    )
    changed = jaxcp.logits(jaxcp.load(tmp_path / "model")[0], tokens)
    assert np.abs(changed - theirs).max() > 1e-3, "the base makes no difference here"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        (MeshConfig(seq=4), {}),
        (MeshConfig(data=2, seq=2), {"zero": 3, "accumulate": 2}),
        (MeshConfig(seq=2), {"strategy": FixedOrder()}),
    ],
    ids=["ring", "zero", "fixed order"],
)
def test_a_mesh_grows_as_one_device(grown, tmp_path, mesh, changes):
    result = train(run(tmp_path, mesh=mesh, **changes))
    np.testing.assert_allclose([*losses(result).values()], [*losses(grown).values()], rtol=1e-4)


@pytest.mark.slow
def test_evaluations_are_of_the_stage_and_the_best_of_the_last(tmp_path):
    validation = TextSource(part=(0.999, 1.0))
    config = run(tmp_path, eval_every=1, eval_data=validation, data=TextSource(part=(0.0, 0.9)))
    result = train(config)
    said = {r["step"]: r["eval_loss"] for r in records(result)}
    last = {step: loss for step, loss in said.items() if step > 4}
    assert result.best_step == min(last, key=last.get)
    # step 5 is in the last stage from its beginning
    rope = dataclasses.replace(MODEL.rope, theta=5e4)
    alone = dataclasses.replace(
        config, out_dir=tmp_path / "alone", context=(), seq_len=48, stop_after=5,
        model=dataclasses.replace(MODEL, rope=rope, trained_positions=48),
        start=StartConfig(run=str(tmp_path), step=4),
    )  # fmt: skip
    assert records(train(alone))[-1]["eval_loss"] == said[5]


@pytest.mark.slow
def test_a_finished_run_becomes_longer_with_a_longer_context(grown, tmp_path):
    train(run(tmp_path, context=()))
    longer = run(tmp_path, steps=9, extended=(6,), context=(ContextStage(step=6, seq_len=32),))
    result = train(longer)
    assert [r.get("context") for r in records(result)[-4:]] == [None, 32, 32, 32]
    with pytest.raises(ValueError, match="holds a run with another configuration: context"):
        train(dataclasses.replace(longer, context=(ContextStage(step=7, seq_len=32),)))


def test_other_stages_are_another_run(grown, tmp_path):
    folder = grown.checkpoint_path.parents[1]
    for stages in ((), STAGES[:1]):
        with pytest.raises(ValueError, match="holds a run with another configuration: context"):
            train(run(folder, context=stages))


HYBRID = HybridMoEConfig(
    vocab_size=256, num_layers=1, embed_dim=32, num_heads=2, num_kv_heads=2, head_dim=16,
    mlp_dim=64, moe_dim=16, num_experts=4, num_experts_per_tok=2,
    attention=AttentionConfig(max_positions=20),
)  # fmt: skip


def test_the_base_and_the_length_are_found_where_a_model_has_them():
    last = run("nowhere", model=HYBRID).at(6)
    assert (last.seq_len, last.model.attention.rope.theta) == (48, 5e4)
    assert last.model.attention.max_positions == 48
    config = run("nowhere")
    assert [config.at(step).seq_len for step in (0, 1, 2, 3, 4, 5, 6)] == [16] * 3 + [32] * 2 + [
        48
    ] * 2
    assert config.at(3).model.rope.theta == 5e4 and config.at(2).model == MODEL


def test_stages_are_set_from_the_command_line():
    config = override(run("nowhere", context=()), ["context=((2, 32, 5e4), (4, 48))"])
    assert config.context == STAGES
    for wrong in ("(2, 32)", "((2, 32, 5e4, 1),)", "((2.5, 32),)", "((2, 8),)", "((2,),)"):
        with pytest.raises(ValueError):
            override(run("nowhere", context=()), [f"context={wrong}"])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"context": STAGES[::-1]}, r"stages of the context must ascend.*\[4, 2\]"),
        ({"steps": 4}, "begin before steps=4"),
        ({"seq_len": 40}, "longer rows than the one before, 40 tokens"),
        ({"context": (ContextStage(step=2, seq_len=16),)}, "or another rope_theta"),
        ({"model": GPT}, "rotary positions; GPTConfig has none. Leave rope_theta out"),
        (
            {"model": GPT, "context": (ContextStage(step=2, seq_len=48),)},
            "the model has 32 positions; got seq_len=48. Raise max_positions",
        ),
    ],
)
def test_what_cannot_be_is_refused_at_the_config(changes, match):
    with pytest.raises(ValueError, match=match):
        run("nowhere", **changes)


@pytest.mark.parametrize("values", [(0, 32), (2, 0), (2.5, 32), (2, 32, 1.0), (2, 32, np.inf)])
def test_a_stage_is_checked(values):
    names = "step", "seq_len", "rope_theta"
    with pytest.raises(ValueError, match=r"a stage of the context|rope_theta must"):
        ContextStage(**dict(zip(names, values, strict=False)))


class Stubborn:
    """Rows of one length, whatever is asked for."""

    def batch(self, step, rows, length):
        return TextSource().batch(step, rows, 16)


def test_what_only_a_run_can_know_is_refused_before_its_first_step(tmp_path):
    with pytest.raises(ValueError, match="step 3 has 32 tokens in a row, and got 16 from"):
        train(run(tmp_path / "a", data=Stubborn()))
    stage = (ContextStage(step=2, seq_len=40),)
    with pytest.raises(ValueError, match="FixedOrder needs"):
        train(run(tmp_path / "b", strategy=FixedOrder(), context=stage, mesh=MeshConfig(seq=4)))
    assert not [*tmp_path.rglob("metrics.jsonl")]


@pytest.mark.slow
def test_rows_longer_than_all_documents_are_told(tmp_path, caplog):
    tokens = np.where(np.arange(4000) % 10, np.arange(4000) % 200, 255).astype("<u2")
    tokens.tofile(tmp_path / "a.bin")
    for isolate, separator in ((True, 255), (False, 255)):
        data = TokenFiles(pattern=str(tmp_path / "*.bin"), separator=separator, isolate=isolate)
        with caplog.at_level(logging.WARNING, logger="jaxcp"):
            train(run(tmp_path / str(isolate), data=data, stop_after=1))
        said = "no document of its first batch is longer than the 16 before" in caplog.text
        assert said == isolate
        caplog.clear()
