# SPDX-License-Identifier: Apache-2.0
"""The command line as a person meets it; in a process of its own where that may matter."""

import io
import json
import os
import subprocess
import sys

import pytest

from jaxcp.checkpoints import NEEDLE
from jaxcp.cli.main import main
from jaxcp.data.haystack import QUESTION, make_haystack

TINY = """
import jaxcp

def config():
    return jaxcp.TrainConfig(
        model=jaxcp.GPTConfig(
            vocab_size=256, max_positions=64, num_layers=1, num_heads=2, embed_dim=32
        ),
        mesh=jaxcp.MeshConfig(seq=2), seq_len=64, batch_size=2, steps=3, data=jaxcp.TextSource(),
        out_dir="unused", log_every=1,
    )
"""


def jaxcp_command(*arguments, cwd=None, stdin=""):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jaxcp.cli.main", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment, input=stdin, capture_output=True, text=True, timeout=600
    )


def test_help_names_every_command_and_needs_no_jax():
    code = (
        "import sys; sys.argv = ['jaxcp', '--help']\n"
        "from jaxcp.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: assert 'jax' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "generate", "chat", "prepare", "train", "tune", "quantize", "eval"):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prompt", "x", "--checkpoint", "nowhere"], "nowhere"),
        (["generate", "--prompt-file", "latin1.txt"], "UTF-8"),
        (["generate", "--prompt", "long enough", "--max-len", "4"], "max_len=4"),
        (["train", "no_such_run"], "no run 'no_such_run'"),
        (["train", "gpt_cpu", "--set", "steps=3", "--set", "batch_size=2"], "--set is there twice"),
        (["generate", "--prompt=x", "--prompt", "y"], "--prompt is there twice"),
        (["generate", "--max-len", "9", "--max_len", "8"], "--max-len is there twice"),
        (
            ["tune", "--op", "flash_attention", "--target", "v6e", "--shape", "head_dim"],
            "name=size",
        ),
        (
            ["tune", "--op", "flash_attention", "--target", "v6e", "--part", "triton_dq"],
            "has the parts mosaic_forward, mosaic_backward",
        ),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    errors = capsys.readouterr().err
    assert ended.value.code == 1 and message in errors and "Traceback" not in errors


def test_a_process_says_what_is_wrong_and_fails(tmp_path):
    done = jaxcp_command("generate", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the prompt is empty" in done.stderr


@pytest.mark.slow
def test_train_export_and_generate(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)
    out = tmp_path / "run"
    done = jaxcp_command("train", "tiny.py", "--out", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (out / "loss.png").exists() and (out / "model" / "model.safetensors").exists()
    arguments = ("--prompt", "The ", "--max-new-tokens", 5, "--seq", 2)
    done = jaxcp_command("generate", "--checkpoint", out / "model", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 tokens prefilled" in done.stderr and len(done.stdout.rstrip("\n")) >= 1


@pytest.mark.slow
def test_chat_keeps_the_conversation(tmp_path):
    done = jaxcp_command("chat", "--max-new-tokens", 3, "--max-len", 200, stdin="one\ntwo\n")
    assert done.returncode == 0, done.stderr
    assert "3 tokens prefilled" in done.stderr
    assert "4 tokens prefilled" in done.stderr and "5 reused" in done.stderr


@pytest.mark.slow
def test_demo_does_the_whole_job(tmp_path):
    done = jaxcp_command("demo", "--smoke", "--out", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    for name in ("needle.png", "loss.png"):
        assert (tmp_path / "demo" / name).read_bytes().startswith(b"\x89PNG")
    measured = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert set(measured["accuracy"]) == {"1024", "2048"}
    assert "resumed from step" in done.stdout and "reused" in done.stdout


@pytest.mark.slow
def test_quantize_and_generate(tmp_path):
    """Needles are found by the engine, over shards, with weights of 4 bits."""
    done = jaxcp_command("quantize", NEEDLE, tmp_path / "four", "--weights", "nvfp4")
    assert done.returncode == 0, done.stderr
    assert "100 tensors in nvfp4, 0 could not be; 1.77 -> 0.63 MiB" in done.stdout
    stack = make_haystack(1_024, 4, 0)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(stack.text + QUESTION.format(key=stack.keys[1]))
    options = ["--prompt-file", prompt, "--max-new-tokens", 6, "--seq", 2]
    done = jaxcp_command("generate", "--checkpoint", tmp_path / "four", *options)
    assert done.returncode == 0, done.stderr
    assert f"{stack.values[1]:06d}" in done.stdout
    done = jaxcp_command("quantize", NEEDLE, tmp_path / "four", "--weights", "int8")
    assert done.returncode == 1 and "needed an empty folder" in done.stderr
