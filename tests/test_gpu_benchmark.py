# SPDX-License-Identifier: Apache-2.0
"""What will run on a GPU one day runs interpreted today, and writes down what came of it."""

import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import report

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_the_script_from_beginning_to_end(tmp_path):
    command = [ROOT / "benchmarks/gpu.sh", tmp_path, "--smoke"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "report.json").read_text())
    checks = [row for row in found["rows"] if row["part"].startswith("check")]
    assert {row["part"] for row in found["rows"]} == set(gpu.PARTS)
    assert all(row["errors"] or row["skipped"] for row in checks)
    assert sum(bool(row["errors"]) for row in checks) == 3
    ours = [row for row in found["rows"] if row.get("contender") == "ours"]
    assert len(ours) == 2 + 1 + 2 and all(row["ms"] > 0 for row in ours)
    assert found["versions"]["jax"] == jax.__version__ and found["wrong"] == []
    assert "measure nothing" in (tmp_path / "report.md").read_text()


def test_it_refuses_a_cpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "needs a GPU; jax found cpu" in done.stderr


def test_a_row_that_fails_is_a_row(tmp_path, monkeypatch):
    def broken():
        raise ValueError("no such luck")

    def lost():
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    rows = {
        "good": lambda: {"errors": {}, "problems": []},
        "bad": broken,
        "lost": lost,
        "last": broken,
    }
    monkeypatch.setitem(gpu.PARTS, "check-grouped", lambda part, smoke: rows.items())
    (tmp_path / "about.json").write_text('{"date": "", "device": "", "versions": {}, "note": ""}')
    assert not gpu.run("check-grouped", tmp_path, False, time.time() + 60)
    assert gpu.run("check-grouped", tmp_path, False, time.time() - 1)  # goes on, but it is late
    said = [(row["name"], row.get("failed")) for row in report.read(tmp_path)]
    assert said == [
        ("good", None),
        ("bad", "ValueError: no such luck"),
        ("lost", "RuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS"),
        ("last", "not run: out of time"),
    ]
    assert len(report.write(tmp_path)) == 3
    assert "not run: out of time" in (tmp_path / "report.md").read_text()


def test_goals_compare_what_was_measured():
    def row(case, contender, ms):
        return {"part": "time-attention", "case": case, "contender": contender, "ms": ms}

    forward, both = f"{report.LONG} forward", f"{report.LONG} forward+backward"
    rows = [row(forward, "ours", 2.0), row(forward, "pallas mha", 3.0)]
    rows += [row(both, "ours", 6.0), row(both, "pallas mha", 9.0)]
    first, second, third = report.goals(rows)
    assert first["ratio"] == pytest.approx(1.5) and second["ratio"] == pytest.approx(6 / 4)
    assert third["ratio"] is None
    names = {
        t.case
        for part in ("time-attention", "time-grouped")
        for t in gpu.speed.timings(part, False)
    }
    assert {forward, both, f"{report.HY3} forward"} <= names
