# SPDX-License-Identifier: Apache-2.0
"""Perplexity equals a forward pass for every window, on any mesh, and counts each token once."""

import json
import math

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoints import FIXTURES

import jaxcp
from jaxcp.cli.main import main
from jaxcp.evaluate.perplexity import evaluate_perplexity, windows_of
from jaxcp.evaluate.texts import Text
from jaxcp.mesh import MeshConfig
from jaxcp.text.tokenizer import byte_level
from jaxcp.training import TextSource, TrainConfig
from jaxcp.training.batches import Batches
from jaxcp.training.step import init_state, join
from jaxcp.training.validation import whole_loss

GPT = jaxcp.GPTConfig(vocab_size=256, max_positions=32, num_layers=1, num_heads=2, embed_dim=16)
RNG = np.random.default_rng(0)
TEXTS = [
    Text(RNG.integers(0, 256, n).astype(np.int32), first, n)
    for n, first in ((61, 1), (9, 2), (2, 1))
]
COUNT = 60 + 7 + 1


@pytest.fixture(scope="module")
def model():
    return jaxcp.GPT(GPT, rngs=nnx.Rngs(0))


def reference(model, texts, context, stride):
    """The loss of each token and how many it saw, from a pass over what is before it.

    The first window that reaches a token decides; what lies behind it is noise that is not seen.
    """
    losses, seen = [], []
    for text in texts:
        for token in range(text.first, len(text.ids)):
            start = max(0, math.ceil((token - context) / stride)) * stride
            before = np.full((1, GPT.max_positions), 7, np.int32)
            before[0, : token - start] = text.ids[start:token]
            logits = np.asarray(jaxcp.logits(model, before), np.float64)[0, token - start - 1]
            losses.append(np.log(np.exp(logits).sum()) - logits[text.ids[token]])
            seen.append(token - start)
    return np.array(losses), np.array(seen)


@pytest.fixture(scope="module")
def expected(model):
    return {case: reference(model, TEXTS, *case) for case in ((16, 5), (24, 24))}


@pytest.mark.parametrize(
    ("axes", "rows", "strategy"),
    [
        (None, 1, None),
        ({"seq": 4}, 3, None),
        ({"data": 2, "seq": 2}, 4, jaxcp.AllGather()),
        ({"seq": 2, "model": 2}, 2, jaxcp.Ulysses()),
        ({"seq": 2}, 2, jaxcp.Ring(layout=jaxcp.Balanced())),
    ],
    ids=str,
)
def test_equals_a_pass_for_every_token(model, expected, mesh_of, axes, rows, strategy):
    if axes:
        mesh_of(**axes)
    for (context, stride), (losses, seen) in expected.items():
        counted = []
        found = evaluate_perplexity(
            model, TEXTS, context=context, stride=stride, rows=rows, strategy=strategy,
            on_tokens=counted.append,
        )  # fmt: skip
        assert found.tokens == len(losses) == COUNT == sum(counted)
        assert found.nll == pytest.approx(losses.sum(), rel=1e-6)
        assert found.seen == pytest.approx(seen.mean())
        for bucket in found.buckets:
            within = (seen >= bucket.least) & (seen <= bucket.most)
            assert bucket.tokens == within.sum() > 0
            assert bucket.nll == pytest.approx(losses[within].sum(), rel=1e-6)
        assert found.perplexity == pytest.approx(np.exp(losses.mean()), rel=1e-6)
        assert found.bits_per_byte == pytest.approx(losses.sum() / np.log(2) / 72, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt-oss-tiny", "deepseek-v32-tiny"])
def test_of_windows_and_latents(name, mesh_of):
    """Over two shards, as one pass over each window alone gives it; noise behind it is not seen."""
    model, _ = jaxcp.load(FIXTURES / name)
    ids = RNG.integers(0, model.config.vocab_size, 60).astype(np.int32)
    total, scored = 0.0, 1
    for window in windows_of(Text(ids, 1, 0), 24, 10):
        before = np.full((1, 24), 7, np.int32)
        before[0, : window.stop - window.start] = ids[window.start : window.stop]
        logits = np.asarray(jaxcp.logits(model, before), np.float64)
        for token in range(window.scored, window.stop + 1):
            row = logits[0, token - 1 - window.start]
            total += np.log(np.exp(row).sum()) - row[ids[token]]
            assert token == scored
            scored += 1
    mesh_of(seq=2)
    sharded, _ = jaxcp.load(FIXTURES / name)
    found = evaluate_perplexity(sharded, [Text(ids, 1, 0)], context=24, stride=10, rows=3)
    assert found.tokens == 59 and found.nll == pytest.approx(total, rel=1e-5)


def test_without_overlap_it_is_the_evaluation_of_a_run(tmp_path):
    source = TextSource(part=(0.0, 0.0005))
    mesh = MeshConfig(data=2, seq=2)
    config = TrainConfig(
        model=GPT, seq_len=20, batch_size=4, steps=1, data=source, eval_data=source, mesh=mesh,
        out_dir=tmp_path,
    )  # fmt: skip
    made = mesh.make(jax.devices()[:4])
    with jax.set_mesh(made):
        state = init_state(config)
        loss = whole_loss(config, state, source, Batches(config, made).place)
        text = Text(source.tokens.astype(np.int32), 1, source.tokens.size)
        trained = join(GPT, state)
        found = evaluate_perplexity(trained, [text], context=20, stride=20, rows=2)
    assert found.tokens == loss.tokens
    assert found.loss == pytest.approx(loss.mean, rel=1e-6)


@given(st.integers(2, 80), st.integers(1, 4), st.integers(1, 30), st.integers(1, 30))
def test_windows_predict_every_token_once(length, first, context, stride):
    stride = min(stride, context)
    text = Text(np.arange(length), first, length)
    predicted = []
    for window in windows_of(text, context, stride):
        assert 0 < window.stop - window.start <= context and window.start % stride == 0
        assert window.start < window.scored <= window.stop < length
        if window.start:
            assert window.scored - window.start >= min(context - stride + 1, context)
        predicted += range(window.scored, window.stop + 1)
    assert predicted == list(range(first, length))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 33}, r"context must be in 1\.\.32 .the model has no more positions.; got 33"),
        ({"context": 0}, "context must be"),
        ({"context": 8, "stride": 9}, r"stride must be in 1..8 .a larger one leaves tokens out"),
        ({"context": 8, "rows": 0}, "rows must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_perplexity(model, TEXTS, **options)


def test_rows_must_divide_over_a_mesh(model, mesh_of):
    mesh_of(data=2)
    with pytest.raises(ValueError, match="multiple of the mesh's data=2; got 3"):
        evaluate_perplexity(model, TEXTS, context=8, rows=3)


def test_ids_and_losses_that_are_none(model):
    for ids in ([1, 256], [256, 1]):
        with pytest.raises(ValueError, match="token ids must lie in 0"):
            evaluate_perplexity(model, [Text(np.array(ids), 1, 2)], context=8)
    broken = jax.tree.map(lambda x: x * np.float32("nan"), model)
    with pytest.raises(FloatingPointError, match="losses are not finite"):
        evaluate_perplexity(broken, TEXTS, context=8)


def test_the_command(tmp_path, capsys, model):
    jaxcp.save(model, tmp_path / "model", byte_level())
    text = tmp_path / "a.txt"
    text.write_text("The cat sät on the mat, and there it lay.")
    ids = np.frombuffer(text.read_bytes(), np.uint8).astype(np.int32)
    asked = ["eval", "perplexity", str(text), "--checkpoint", str(tmp_path / "model"), "--seq", "2"]
    main(
        [
            *asked,
            "--context",
            "8",
            "32",
            "--stride",
            "4",
            "--json",
            "--out",
            str(tmp_path / "a.png"),
        ]
    )
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    results = json.loads(line)["results"]
    for result, context in zip(results, (8, 32), strict=True):
        losses, _ = reference(model, [Text(ids, 1, 0)], context, 4)
        assert result["tokens"] == result["bytes"] == len(ids) - 1
        assert result["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    main([*asked, "--context", "8", "--stride", "4"])
    table = capsys.readouterr().out
    assert f"{results[0]['loss']:.4f}" in table and f"{results[0]['bits_per_byte']:.4f}" in table
    for wrong in (
        ["--context", "0"],
        ["--stride", "3000"],
        ["--strategy", "Rings"],
        ["--out", "x"],
    ):
        with pytest.raises(SystemExit):
            main([*asked, *wrong])
