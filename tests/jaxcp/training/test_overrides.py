# SPDX-License-Identifier: Apache-2.0
"""Fields from the command line: typed, checked, and named when they are not there."""

import pathlib

import pytest

import jaxcp
from jaxcp.training import TextSource, TokenFiles, TrainConfig, load_run
from jaxcp.training.overrides import fields_of, override

WRITTEN = {"True": "true", "False": "false", "None": "none"}


@pytest.fixture
def config():
    return load_run("shakespeare_char_cpu")


@pytest.mark.parametrize(
    ("setting", "read"),
    [
        ("steps=500", lambda c: c.steps == 500),
        ("optimizer.learning_rate=1e-3", lambda c: c.optimizer.learning_rate == 1e-3),
        ("optimizer.muon_learning_rate=0.02", lambda c: c.optimizer.muon_learning_rate == 0.02),
        ("optimizer.clip_norm=none", lambda c: c.optimizer.clip_norm is None),
        ("optimizer.decay=sqrt", lambda c: c.optimizer.decay == "sqrt"),
        ("model.use_bias=false", lambda c: c.model.use_bias is False),
        ("model.dtype=bfloat16", lambda c: c.model.dtype == "bfloat16"),
        ("model.embed_dim=64", lambda c: (c.model.embed_dim, c.model.mlp_dim) == (64, 256)),
        ("model.mlp_dim=100", lambda c: c.model.mlp_dim == 100),
        ("mesh.seq=4", lambda c: c.mesh.seq == 4),
        ("data.part=(0.0, 0.5)", lambda c: c.data.part == (0.0, 0.5)),
        ("data.path=books/*.txt", lambda c: c.data.path == "books/*.txt"),
        ("data=corpus/*.bin", lambda c: c.data == "corpus/*.bin"),
        ("samples.prompt=a=b", lambda c: c.samples.prompt == "a=b"),
        ("strategy=Ring", lambda c: c.strategy == jaxcp.Ring()),
        ("strategy=USP(ulysses=2)", lambda c: c.strategy == jaxcp.USP(ulysses=2)),
        ("strategy=none", lambda c: c.strategy is None),
        ("rules.experts=seq", lambda c: c.rules.experts == "seq"),
        ("out_dir=runs/x", lambda c: str(c.out_dir) == "runs/x"),
        ("max_seconds=inf", lambda c: c.max_seconds == float("inf")),
    ],
)
def test_a_value_is_read_as_its_field_says(config, setting, read):
    assert read(override(config, [setting]))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (["steps"], "--set takes FIELD=VALUE, as steps=500; got 'steps'"),
        (["steps=many"], "steps needs int; got 'many'"),
        (["steps=1.5"], "steps needs int; got '1.5'"),
        (
            ["optimizer.learnin_rate=1"],
            "near it are optimizer.learning_rate",
        ),
        (["learning_rate=1"], "near it are optimizer.learning_rate"),
        (["warmup=1"], r"no field 'warmup'"),
        (["optimizer=adam"], "optimizer is made of fields; set one of optimizer.learning_rate"),
        (["optimizer.decay=square"], r"needs cosine \| linear \| sqrt; got 'square'"),
        (["model.use_bias=0"], "model.use_bias needs bool; got '0'"),
        (["strategy=Rings"], "strategy needs a strategy, as Ring or USP"),
        (["strategy=Ring(wheels=3)"], "strategy needs a strategy"),
        (["strategy=__import__('os')"], "strategy needs a strategy"),
        (["data.part=(0.0,)"], "data.part needs"),
        (["steps=0"], "steps must be positive; got steps=0"),
        (["seq_len=65"], "the model has 64 positions; got seq_len=65"),
    ],
)
def test_a_value_that_cannot_be_is_named(config, settings, match):
    with pytest.raises(ValueError, match=match):
        override(config, settings)


def test_settings_are_checked_together_and_leave_the_others(config):
    changed = override(config, ["seq_len=128", "model.max_positions=128", "batch_size=6"])
    assert (changed.seq_len, changed.model.max_positions, changed.model.num_layers) == (128, 128, 4)
    assert changed.data == config.data and changed.optimizer == config.optimizer
    assert override(config, []) == config


@pytest.mark.parametrize("name", ["needle", "gpt_cpu", "gpt2_124m", "shakespeare_char_cpu"])
def test_every_field_of_a_run_is_listed_and_can_be_set_to_what_it_is(name):
    config = load_run(name)
    fields = {field.path: field for field in fields_of(config)}
    assert {"steps", "optimizer.learning_rate", "mesh.seq", "model.vocab_size"} <= fields.keys()
    simple = [
        f"{path}={WRITTEN.get(str(field.value), field.value)}"
        for path, field in fields.items()
        if isinstance(field.value, bool | int | float | str | pathlib.Path | None)
    ]
    assert len(simple) > 50 and override(config, simple) == config


def test_sources_have_fields_too(tmp_path):
    model = jaxcp.GPTConfig(vocab_size=9, max_positions=8, num_layers=1, num_heads=1, embed_dim=8)
    files = TokenFiles(pattern="x.bin", separator=3)
    config = TrainConfig(
        model=model, seq_len=8, batch_size=1, steps=1, data=files, out_dir=tmp_path
    )
    changed = override(config, ["data.separator=4", "data.seed=2", "eval_every=5"])
    assert changed.data == TokenFiles(pattern="x.bin", separator=4, seed=2)
    assert override(config, ["data.separator=none"]).data.separator is None
    assert isinstance(load_run("gpt_cpu").data, TextSource)
