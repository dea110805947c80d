# SPDX-License-Identifier: Apache-2.0
"""Training in several processes, as on several hosts: the numbers of one, and what ends them."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxcp
from jaxcp.mesh import MeshConfig
from jaxcp.training import export_run, load_run, read_metrics, train

RUN = Path(__file__).with_name("struck_run.py")
SECONDS = 300
"""Until a process that does nothing is an error; a loaded machine is slow."""


def start(out, *options, cwd=None, **environment):
    """Start two processes of `jaxcp train`."""
    return launch(["train", str(RUN), "--out", str(out), *options], cwd, **environment)


def launch(words, cwd=None, processes=2, **environment):
    """Start a command in several processes, each with CPU devices of its own."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jaxcp", *words, "--coordinator", f"localhost:{port}"]
    command += ["--processes", str(processes)]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    return [
        subprocess.Popen(
            [*command, "--process-id", str(i)],
            env=env | environment | {"PROCESS": str(i)},
            cwd=None if cwd is None else cwd[i],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]


def finish(started):
    """Wait for processes; give of each its exit code, what it said, and its errors."""
    try:
        said = [process.communicate(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


def losses(folder):
    return {record["step"]: record["loss"] for record in read_metrics(folder / "metrics.jsonl")}


def alone(folder, mesh, **changes):
    """The same run in this process, on as many devices."""
    fields = {"mesh": mesh, "out_dir": folder, "keep_programs": False} | changes
    config = dataclasses.replace(load_run(RUN), **fields)
    return train(config), config


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run of two processes, rows over them; and what they said."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return folder, finish(start(folder, "--export-dtype", "bfloat16"))


def compiled(undisturbed):
    """Environment of processes that need not compile again."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(undisturbed[0] / "xla_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def check_alike(records, expected, rtol):
    """Losses and all that is counted; 0: bit for bit."""
    assert [record["step"] for record in records] == [record["step"] for record in expected]
    for key in ("lr", "tokens", "skipped", "eval_tokens"):
        assert [r.get(key) for r in records] == [r.get(key) for r in expected], key
    for key in ("loss", "grad_norm", "eval_loss"):
        ours, theirs = ([r[key] for r in some if key in r] for some in (records, expected))
        np.testing.assert_allclose(ours, theirs, rtol=rtol, err_msg=key)
    a_token = [
        [r["flops_per_second"] / r["tokens_per_second"] for r in some[2:]]
        for some in (records, expected)
    ]
    np.testing.assert_allclose(*a_token, rtol=1e-12)


@pytest.mark.slow
def test_two_processes_train_as_one(undisturbed, tmp_path):
    """Each has rows of its own: the losses, evaluations and weights of one, bit for bit."""
    folder, ended = undisturbed
    assert [code for code, *_ in ended] == [0, 0], ended
    assert all(f"process {i} of 2 (given" in said for i, (_, said, _) in enumerate(ended))
    assert "1 of 2 cpu devices" in ended[0][1] and "step 12, loss" in ended[0][1]
    assert "step 12" not in ended[1][1]
    result, config = alone(tmp_path / "one", MeshConfig(data=2))
    records = [read_metrics(path / "metrics.jsonl") for path in (folder, tmp_path / "one")]
    check_alike(*records, rtol=0)
    parts = {path.name for path in (folder / "checkpoints" / "12").glob("ocdbt.*")}
    assert parts == {"ocdbt.process_0", "ocdbt.process_1"}
    export_run(result, config, tmp_path / "one" / "model", dtype="bfloat16")
    ours, theirs = (
        jaxcp.load(path / "model", dtype="float32")[0] for path in (folder, tmp_path / "one")
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_ring_through_two_processes_and_one_goes_on(tmp_path):
    """On four devices gloo sums in another order than one process: alike but for rounding."""
    folder = tmp_path / "two"
    ended = finish(
        start(folder, "--set", "mesh.data=1", "mesh.seq=4", "accumulate=1", "stop_after=8")
    )
    assert [code for code, *_ in ended] == [0, 0], ended
    before = read_metrics(folder / "metrics.jsonl")
    done = alone(folder, MeshConfig(seq=4), accumulate=1)[0]
    assert (done.resumed_from, done.steps) == (8, 12)
    alone(tmp_path / "one", MeshConfig(seq=4), accumulate=1)
    ours, theirs = (read_metrics(path / "metrics.jsonl") for path in (folder, tmp_path / "one"))
    assert ours[:8] == before
    check_alike(before, theirs[:8], rtol=2e-6)
    np.testing.assert_allclose(*([r["loss"] for r in some] for some in (ours, theirs)), rtol=2e-6)


def damage(folder):
    """Flip a bit in a file of a checkpoint that process 1 wrote, and that it is to check."""
    names = [*json.loads((folder / "files.json").read_text())]
    file = folder / next(name for name in names[1::2] if "process_1/d/" in name)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


@pytest.mark.slow
def test_a_lost_process_and_a_signal_cost_no_number(undisturbed, tmp_path):
    """One is killed, the other ends with 75; one is told to stop, and both do, saved; that state
    is damaged, as one process alone finds, and both take the one before."""
    folder, programs = tmp_path / "run", compiled(undisturbed)
    other, killed = finish(start(folder, STRIKE="SIGKILL 1 7", **programs))
    assert killed[0] == -9 and other[0] == 75, other
    assert re.search("jaxcp: (another process of 2|process 1) is gone", other[2]), other
    ended = finish(start(folder, STRIKE="SIGTERM 1 8", **programs))
    assert [code for code, *_ in ended] == [0, 0], ended
    [stopped] = map(int, re.findall(r"SIGTERM: saved at step (\d+) of 12", ended[0][1]))
    assert 7 <= stopped <= 10 and (folder / "checkpoints" / str(stopped) / "files.json").exists()
    damage(folder / "checkpoints" / str(stopped))
    ended = finish(start(folder, **programs))
    assert [code for code, *_ in ended] == [0, 0], ended
    assert (folder / "checkpoints" / f"{stopped}.unreadable").is_dir()
    assert losses(folder) == losses(undisturbed[0])
    assert len(read_metrics(folder / "metrics.jsonl")) == 12


@pytest.mark.slow
def test_the_coordinator_is_lost(undisturbed, tmp_path):
    """The other one ends too, with 75, or aborted by JAX where that is faster."""
    killed, other = finish(start(tmp_path / "run", STRIKE="SIGKILL 0 5", **compiled(undisturbed)))
    assert killed[0] == -9 and other[0] in (75, -6), other


@pytest.mark.slow
def test_a_process_that_hangs_is_lost(undisturbed, tmp_path):
    """No connection is closed: only silence tells."""
    options = {"STRIKE": "SIGSTOP 1 5"} | compiled(undisturbed)
    other, hanging = start(tmp_path / "run", "--heartbeat", "10", **options)
    _, errors = other.communicate(timeout=SECONDS)
    hanging.kill()
    finish([hanging])
    assert other.returncode == 75 and "is gone" in errors, errors


@pytest.mark.slow
def test_a_folder_of_its_own_for_each_host_is_refused(tmp_path):
    hosts = [tmp_path / "a", tmp_path / "b"]
    for host in hosts:
        host.mkdir()
    ended = finish(start("run", cwd=hosts))
    assert [code for code, *_ in ended] == [1, 1], ended
    assert all("out_dir must be one folder for all processes; process 1 ca" in e[2] for e in ended)
    assert not any((host / "run" / "metrics.jsonl").exists() for host in hosts)


@pytest.mark.slow
def test_two_processes_generate_what_one_does():
    options = ["--prompt", "[key 4831 is 902714] " * 9, "--max-new-tokens", "8", "--seq", "4"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "jaxcp", "generate", *options]
    one = subprocess.run(command, env=env, capture_output=True, text=True, timeout=SECONDS)
    first, second = finish(launch(["generate", *options]))
    assert (one.returncode, first[0], second[0]) == (0, 0, 0), (one, first, second)
    assert one.stdout and without_gloo(first[1]).partition("\n")[2] == one.stdout
    assert without_gloo(second[1]).partition("\n")[2] == ""  # after which process it is


def without_gloo(text):
    """Give what jaxcp printed; gloo tells of its connections on the same stream."""
    return re.sub(r"\[Gloo\] Rank[^\n]*\n", "", text)
