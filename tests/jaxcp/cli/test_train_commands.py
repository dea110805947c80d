# SPDX-License-Identifier: Apache-2.0
"""The commands of training as a person types them, in this process."""

import json

import pytest

from jaxcp.cli.main import main
from jaxcp.data.prepared import read_prepared

TINY = """
import jaxcp

def config():
    return jaxcp.TrainConfig(
        model=jaxcp.GPTConfig(
            vocab_size=256, max_positions=32, num_layers=1, num_heads=2, embed_dim=16
        ),
        seq_len=32, batch_size=2, steps=3, data=jaxcp.TextSource(), out_dir="runs/tiny",
        log_every=1,
    )
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(TINY)
    return tmp_path


def run(capsys, line):
    """Exit code, stdout and stderr of a command."""
    code = 0
    try:
        main(line.split())
    except SystemExit as ended:
        code = ended.code
    return code, *capsys.readouterr()


def test_prepare_says_what_it_wrote_and_takes_a_separator_where_there_are_many_documents(
    here, capsys
):
    (here / "a.txt").write_text("One text.\n" * 20)
    (here / "b.jsonl").write_text(
        "".join(json.dumps({"body": f"text {i}"}) + "\n" for i in range(99))
    )
    code, out, errors = run(capsys, "prepare a.txt --out one")
    assert code == 0 and "one: 180 tokens to train, 20 to validate, a vocabulary of 256" in out
    assert read_prepared("one").separator is None
    code, out, errors = run(capsys, "prepare a.txt b.jsonl --out two --field body --tokenizer char")
    assert code == 0 and "separator" in out, errors
    prepared = read_prepared("two")
    assert prepared.separator == prepared.vocab_size - 1
    tokenizer = "two/tokenizer.json"
    code, out, errors = run(
        capsys, f"prepare b.jsonl --out three --field body --tokenizer {tokenizer} --val 0"
    )
    assert code == 0, errors
    assert read_prepared("three").separator == prepared.separator and not read_prepared("three").val
    code, _, errors = run(capsys, "prepare b.jsonl --out four")
    assert code == 1 and "its fields are ['body']" in errors and len(errors.splitlines()) == 1
    code, _, errors = run(capsys, "prepare a.txt --out one")
    assert code == 1 and "needed an empty folder" in errors


def test_help_of_a_run_lists_its_fields_with_their_values(here, capsys):
    code, out, _ = run(capsys, "train tiny.py --help")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line.split()}
    assert "32" in lines["seq_len"] and "int" in lines["seq_len"]
    assert "0.0006" in lines["optimizer.learning_rate"]
    assert "--cool-down" in out and "--set" in out
    code, out, _ = run(capsys, "train --help")
    assert code == 0 and "--cool-down" in out and "optimizer.learning_rate  " not in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--set step=5", "no field 'step'; near it are steps"),
        ("--set steps=x", "steps needs int; got 'x'"),
        ("--cool-down 3", "give its folder by --out"),
        ("--from-step 3", "--from-step names the checkpoint of a --cool-down"),
        ("--extend 9", "needed the configuration of a run"),
        ("--cool-down 3 --out x", "needed a checkpoint in runs/tiny"),
        ("--init-from nowhere", "nowhere"),
        ("--profile x", "--profile takes STEP:COUNT"),
        ("--profile 9000000:2", "the profile is of steps 9000000 to 9000001; the run has"),
        ("--wandb me", "pip install jaxcp[wandb]"),
    ],
)
def test_options_that_cannot_be_are_one_line(here, capsys, options, message):
    code, _, errors = run(capsys, f"train tiny.py {options}")
    assert code == 1 and message in errors and len(errors.strip().splitlines()) == 1


def test_evaluations_of_nothing_and_pictures_of_nothing(here, capsys):
    code, _, errors = run(capsys, "train tiny.py --set eval_every=1")
    assert code == 1 and "eval_every needs eval_data that can be gone through" in errors
    code, _, errors = run(capsys, "plot nowhere")
    assert code == 1 and "nowhere" in errors
