# SPDX-License-Identifier: Apache-2.0
"""An engine over the devices of two processes answers as one over as many of one process."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import jaxcp
from jaxcp.inference import checks

FIXTURES = Path(__file__).parents[2] / "fixtures"
PROGRAM = str(Path(__file__).with_name("answering.py"))
SECONDS = 400
"""Until a process that does nothing is an error; a loaded machine is slow."""


def answers(folder, axes, processes):
    """The answers of each process."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "",
        "JAX_NUM_CPU_DEVICES": str(math.prod(axes.values()) // processes),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }  # fmt: skip
    command = [sys.executable, PROGRAM, str(FIXTURES / folder), json.dumps(axes)]
    started = [
        subprocess.Popen(
            command + [address, str(processes), str(i)] * (processes > 1),
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    found = [out.rpartition("ANSWERS ")[2] for out, _ in said]
    assert all(process.returncode == 0 for process in started), said
    return [json.loads(text) for text in found]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "axes"),
    [
        ("qwen3-moe-tiny", {"data": 2, "seq": 2}),
        ("qwen3-moe-tiny", {"seq": 2, "expert": 2}),
        ("qwen3-next-tiny", {"data": 2, "seq": 2}),
        ("deepseek-v3-tiny", {"seq": 2, "model": 2}),
    ],
    ids=str,
)
def test_two_processes_answer_as_one(folder, axes):
    """In both turns, with what is known again, by drafts, and a prompt's own probabilities."""
    (alone,) = answers(folder, axes, 1)
    assert alone["first"] and all(reused > 60 for _, reused in alone["second"])
    assert answers(folder, axes, 2) == [alone, alone]


def test_what_each_process_would_measure_is_refused(monkeypatch):
    assert checks.longest_wait(None) == 0.25
    monkeypatch.setattr(checks, "several", lambda: True)
    model, _ = jaxcp.load(FIXTURES / "qwen3-moe-tiny")
    assert jaxcp.Engine(model, None, max_len=64).max_wait == math.inf
    for options, kind, words in (
        ({"max_wait": 0.5}, ValueError, "leave max_wait out, or give math.inf; got 0.5"),
        ({"memory": 0.5}, ValueError, "give memory in bytes, or pool_tokens; got memory=0.5"),
        ({"host_memory": 1 << 20}, NotImplementedError, "host_memory is not there over several"),
    ):
        with pytest.raises(kind, match=words):
            jaxcp.Engine(model, None, max_len=64, **options)
