# SPDX-License-Identifier: Apache-2.0
"""An agent's turns: traces that are made, written and read again, and the numbers of each turn."""

import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

import jaxcp
from jaxcp.cli.main import main
from jaxcp.evaluate.agent import (
    Measured,
    Result,
    Turn,
    evaluate_agent,
    make_trace,
    plot_turns,
    read_trace,
    take_turn,
    tokens_of,
)
from jaxcp.text.tokenizer import byte_level

POSITIONS = 512
TRACE = make_trace(5, outputs=(20, 70), new_tokens=6, system=100)


def tiny():
    config = jaxcp.GPTConfig(
        vocab_size=256, max_positions=POSITIONS, num_layers=1, num_heads=2, embed_dim=16
    )
    return jaxcp.GPT(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agent") / "model"
    jaxcp.save(tiny(), folder, byte_level())
    return folder


def test_a_trace_has_the_sizes_asked_for():
    assert [len(turn.text) for turn in TRACE] == [120, 70, 20, 70, 20]
    assert {turn.new_tokens for turn in TRACE} == {6}
    again = {"outputs": (20, 70), "new_tokens": 6, "system": 100}
    assert make_trace(5, **again) == TRACE != make_trace(5, **again, seed=1)
    assert make_trace(3, **again) == TRACE[:3]
    assert len(make_trace(system=0)) == 495
    [long] = make_trace(1, outputs=(1_000_000,), system=0)  # more than the text has
    assert len(long.text) == 1_000_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"turns": 0}, "turns must be"),
        ({"outputs": ()}, "outputs needs one size or more"),
        ({"outputs": (5, 0)}, "a size of outputs must be"),
        ({"system": -1}, "system must be"),
        ({"new_tokens": 0}, "new_tokens must be"),
    ],
)
def test_a_size_that_is_none_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_trace(**options)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("[]", "needed a JSON object"),
        ("{}", 'needed "trace", a list of turns'),
        ('{"trace": []}', 'needed "trace", a list of turns'),
        ('{"trace": [{"text": "a", "new_tokens": 1}, 2]}', "turn 2 of .* needs"),
        ('{"trace": [{"text": "a"}]}', "turn 1 of .* needs"),
        ('{"trace": [{"text": "", "new_tokens": 1}]}', "turn 1 of .* must not be empty"),
        ('{"trace": [{"text": 5, "new_tokens": 1}]}', "turn 1 of .* must not be empty"),
        ('{"trace": [{"text": "a", "new_tokens": 0}]}', "turn 1 of .* new_tokens must be"),
        ('{"trace": [{"text": "a", "new_tokens": true}]}', "turn 1 of .* new_tokens must be"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path, written, message):
    file = tmp_path / "trace.json"
    file.write_text(written)
    with pytest.raises(ValueError, match=message):
        read_trace(file)


@pytest.mark.parametrize(("shards", "drafts"), [(None, 0), (2, 3)])
def test_a_turn_computes_its_own_tokens_and_says_what_the_whole_text_says(shards, drafts):
    """Against the logits of the whole conversation, computed at once and without a cache."""
    mesh = jaxcp.make_mesh(seq=shards, devices=jax.devices()[:shards]) if shards else None
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        model, tokenizer = tiny(), byte_level()
        engine = jaxcp.Engine(
            model, tokenizer, max_len=tokens_of(TRACE, tokenizer), max_rows=1, drafts=drafts
        )
        session, held = engine.session(), 0
        for number, turn in enumerate(TRACE):
            measured = take_turn(session, turn)
            new = len(tokenizer.encode(turn.text))
            assert (measured.prefilled, measured.reused) == (new + (number > 0), max(0, held - 1))
            assert measured.generated == 6 and 0 <= measured.accepted <= measured.drafted
            assert 0 < measured.first_token_seconds <= measured.seconds
            assert bool(drafts) or not measured.drafted
            held += new + measured.generated
    assert len(session.tokens) == held == tokens_of(TRACE, tokenizer)
    best = np.argmax(jaxcp.logits(tiny(), np.asarray(session.tokens)[None])[0], axis=-1)
    answered, end = [], 0
    for turn in TRACE:
        end += len(tokenizer.encode(turn.text)) + turn.new_tokens
        answered += range(end - turn.new_tokens, end)
    assert [session.tokens[i] for i in answered] == [int(best[i - 1]) for i in answered]


def test_no_turns_and_turns_too_long_are_refused():
    model, tokenizer = tiny(), byte_level()
    with pytest.raises(ValueError, match="the trace has no turns"):
        evaluate_agent(model, tokenizer, ())
    with pytest.raises(ValueError, match="max_len"):
        evaluate_agent(model, tokenizer, [Turn(text="a", new_tokens=POSITIONS)])


def written(file):
    file.write_text(json.dumps({"trace": [dataclasses.asdict(turn) for turn in TRACE]}))
    return file


def eval_agent(*arguments):
    main(["eval", "agent", *map(str, arguments)])


@pytest.mark.slow
def test_the_command_writes_what_it_reads(checkpoint, tmp_path, capsys):
    first, second = tmp_path / "new" / "first.json", tmp_path / "second.json"
    made = ("--turns", 3, "--outputs", 20, 70, "--new-tokens", 6, "--system", 100)
    eval_agent("--checkpoint", checkpoint, *made, "--out", first)
    out = capsys.readouterr().out
    assert first.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert read_trace(first) == TRACE[:3]
    longer = written(tmp_path / "longer.json")
    eval_agent("--checkpoint", checkpoint, "--trace", longer, "--turns", 3, "--out", second)
    assert read_trace(second) == TRACE[:3]
    one, two = (json.loads(file.read_text())["measured"] for file in (first, second))
    alike = ("prefilled", "reused", "generated", "answer")
    assert [[turn[x] for x in alike] for turn in one] == [[turn[x] for x in alike] for turn in two]
    last = out.splitlines()[-4]
    assert last.split()[:3] == ["3", *(f"{one[2][x]:,}" for x in ("prefilled", "reused"))]
    together = sum(turn["prefilled"] for turn in one)
    assert f"all{together:>13,}" in out and "% of the tokens before answers were reused" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--turns", 0], "--turns must be at least 1; got 0"),
        (["--turns", 9], "has 5"),
        (["--outputs", 5, "--new-tokens", 1], "leave out --outputs, --new-tokens, or --trace"),
        (["--out", "agent.png"], "--out is a file such as agent.json"),
        (["--drafts", 8], "drafts must be"),
    ],
)
def test_options_that_cannot_be_are_said_in_a_line(
    tmp_path, checkpoint, capsys, arguments, message
):
    file = written(tmp_path / "trace.json")
    out = () if "--out" in arguments else ("--out", tmp_path / "out.json")
    with pytest.raises(SystemExit):
        eval_agent("--checkpoint", checkpoint, "--trace", file, *arguments, *out)
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1


def test_seconds_are_a_picture(tmp_path):
    one, two = Measured(9, 0, 2, 0, 0, 0.5, 0.7, "ab"), Measured(4, 10, 3, 4, 1, 0.25, 1.0, "cde")
    result = Result(trace=TRACE[:2], measured=(one, two))
    plot_turns(result, tmp_path / "turns.png")
    assert (tmp_path / "turns.png").stat().st_size > 10_000
    assert result.totals() == Measured(13, 10, 5, 4, 1, 0.75, 1.7, "abcde")
    assert result.reused_share == 10 / 23
