# SPDX-License-Identifier: Apache-2.0
"""Every example and the GPU benchmark run as a user runs them: as programs of their own."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from flax import nnx

import jaxcp
from jaxcp.text.tokenizer import byte_level

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
SYSTEM = "Files are read one after the other. Answer with what comes next in each.\n"


def start(program, *args, **variables):
    inherited = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / program), *map(str, args)],
        env=inherited | {"PYTHONPATH": str(ROOT)} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, out + errors
    return out


def run(program, *args):
    return finish(start(program, *args))


def report(text):
    """`name: number` of the lines of a compile report."""
    lines = re.findall(r"^ *([a-zA-Z -]+?) {2,}([\d,.]+)", text, re.MULTILINE)
    return {name: float(number.replace(",", "")) for name, number in lines}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model of the shipped one's kind, with random weights."""
    config = jaxcp.HybridMoEConfig(
        vocab_size=256, num_layers=2, embed_dim=32, num_heads=2, num_kv_heads=2, head_dim=32,
        mlp_dim=64, moe_dim=32, num_experts=4, num_experts_per_tok=2, layer_pattern="LN", window=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("checkpoint")
    jaxcp.save(jaxcp.HybridMoE(config, rngs=nnx.Rngs(0)), folder, byte_level())
    return folder


def test_ring_attention_smoke():
    out = run("examples/ring_attention.py", "--smoke")
    assert "250 tokens over 8 x cpu" in out
    assert re.findall(r"^  (\w+) +differs", out, re.MULTILINE) == ["dk", "dq", "dv", "out"]


@pytest.mark.slow
def test_ring_in_your_model_smoke():
    out = run("examples/ring_in_your_model.py", "--smoke")
    assert re.findall(r"^in_(\w+): 208 tokens over 8", out, re.MULTILINE) == [
        "nnx", "linen", "plain_jax",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "once"),
    [("ring_attention", ["250 tokens over 16 x cpu", "differs from dense attention"]),
     ("ring_in_your_model", ["in_plain_jax: 224 tokens over 16, differs by"])],
)  # fmt: skip
def test_a_ring_on_two_hosts(name, once):
    """Two processes of 8 devices each, found through the variables that Slurm sets."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    job = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    job |= {"SLURM_STEP_NUM_TASKS": "2", "JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
    args = (f"examples/{name}.py", "--smoke", "--hosts", 2)
    hosts = [start(*args, SLURM_PROCID=i, SLURM_LOCALID=i, **job) for i in "01"]
    first, second = map(finish, hosts)
    # gloo writes of its connections on either, and its lines may run into each other
    assert all(line in first for line in once), first
    assert "process 1 of 2 (Slurm" in second and "tokens over" not in second, second
    assert "differs" not in second


@pytest.mark.slow
def test_train_gpt_smoke_resumes(tmp_path):
    args = ("examples/train_gpt.py", "--smoke", "--out-dir", tmp_path / "run")
    first = run(*args)
    assert "step 20: loss" in first
    [loss] = re.findall(r"loss ([\d.]+) after", first)
    assert float(loss) < 5.4  # below the start, ln 256 = 5.55
    assert f"step 20, resumed from 20: loss {loss}" in run(*args)


@pytest.mark.slow
def test_long_context_smoke():
    """The shipped checkpoint finds its needles; the second question prefills itself alone."""
    out = run("examples/long_context.py", "--smoke")
    answers = re.findall(r"^(.*?) +\(expected (\d{6})\)$", out, re.MULTILINE)
    assert len(answers) == 2 and all(answer == known for answer, known in answers), out
    turns = re.findall(r"prefilled ([\d,]+) tokens in [\d.]+ s, reused ([\d,]+)", out)
    new, reused = ([int(x.replace(",", "")) for x in column] for column in zip(*turns, strict=True))
    question = len("\n[key 1234 is ")
    assert new == [2048 + question, question + 1]  # and the last token of the answer before
    assert reused == [0, 2048 + question + 5]


@pytest.mark.slow
def test_long_context_on_a_file(checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike. " * 20, encoding="utf-8")
    program = ("examples/long_context.py", "--checkpoint", checkpoint, "--smoke", "--text", text)
    out = run(*program, "--max-new-tokens", 4, "--question", "Are they?", "Who?")
    assert "> Are they?" in out and "> Who?" in out and "expected" not in out
    without = start(*program)
    _, errors = without.communicate(timeout=300)
    assert without.returncode == 1 and "--text needs a --question" in errors


@pytest.mark.slow
def test_agent_loop_on_a_folder(checkpoint, tmp_path):
    """Every turn computes what the tool said, and the last token of the answer before."""
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text("All happy families are alike. " * 4, encoding="utf-8")
    program = ("examples/agent_loop.py", "--checkpoint", checkpoint, "--folder", tmp_path)
    out = run(*program, "--turns", 3, "--output", 50, "--new-tokens", 4)
    cells = [line.replace("│", " ").rsplit(maxsplit=3) for line in out.splitlines() if "│" in line]
    rows = {name.strip(): numbers for name, *numbers in cells}
    said = len("\n# one.py\n") + 50
    first, last = said + len(SYSTEM), said + 1
    assert rows["tokens computed"] == [str(x) for x in (first, last, first + 2 * last)]
    assert rows["tokens reused"] == [str(x) for x in (0, first + last + 6, 2 * first + last + 9)]
    assert rows["tokens generated"] == ["4", "4", "12"]
    assert "the last answer: " in out
    without = start(*program, "--turns", 0)
    _, errors = without.communicate(timeout=300)
    assert without.returncode == 1 and "--turns must be at least 1" in errors


def test_ring_attention_compiles_for_a_tpu():
    program = ("examples/ring_attention.py", "--compile-only", "v6e:2x4")
    out = run(*program, "--tokens", 1024, "--dtype", "bfloat16")
    assert out.startswith("8 x v6e (data 1, seq 8, model 1, expert 1)")
    numbers = report(out)
    # forward: 7 rotations of k, v, positions; backward: the same, and 7 of dk and dv
    assert numbers["collective-permute"] == 7 * 3 + 7 * 5
    assert numbers["Pallas kernel calls"] == 8 + 8  # forward; backward
    assert numbers["arguments"] == pytest.approx(1024 / 8 * (12 * 64 * 2 + 4) / 2**20, abs=0.1)


@pytest.mark.slow
def test_train_gpt_compiles_for_gpus():
    program = ("examples/train_gpt.py", "--compile-only", "rtx-pro-6000:8")
    numbers = report(run(*program, "--layers", 1, "--seq-len", 1024))
    assert numbers["collective-permute"] > 0 and numbers["all-reduce"] > 0
    assert numbers["Pallas kernel calls"] == 4 * (2 + 2)  # forward, again for remat, dq, dkv
    assert numbers["together"] > 0


@pytest.mark.slow
def test_long_context_compiles_for_gpus(checkpoint):
    program = ("examples/long_context.py", "--checkpoint", checkpoint, "--compile-only")
    prefill, decode = run(*program, "h200:4", "--context", 2048).split("one step of decoding")
    assert report(prefill)["Pallas kernel calls"] >= 2 * 4  # layers x shards
    assert report(prefill)["collective-permute"] > 0
    assert report(decode)["Pallas kernel calls"] >= 2
    assert report(decode)["all-gather"] == 1  # of the layer that sees everything


def test_a_target_that_is_none_is_an_error_of_one_line():
    process = start("examples/ring_attention.py", "--compile-only", "v6e:nonsense")
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 1 and not out and errors.count("\n") == 1, errors
    assert errors.startswith("jaxcp: a target is kind:shape")
