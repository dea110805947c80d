# SPDX-License-Identifier: Apache-2.0
"""The metrics file survives what kills a process."""

import pytest

from jaxcp.training.metrics import MetricsFile, plot_loss, read_metrics


def record(step):
    return {"step": step, "loss": 5.0 - step, "tokens": 10 * step, "tokens_per_second": None}


def test_a_resumed_run_takes_out_what_came_after_and_repeats_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, resumed_at=0)
    for step in (1, 2, 3, 4):
        file.write(record(step))
    file = MetricsFile(path, resumed_at=2)
    assert [r["step"] for r in file.records] == [1, 2]
    file.write(record(3))
    assert read_metrics(path) == [record(1), record(2), record(3)]


def test_a_torn_last_line_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, resumed_at=0).write(record(1))
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_metrics(path) == [record(1)]
    MetricsFile(path, resumed_at=9).write(record(2))
    assert read_metrics(path) == [record(1), record(2)]


def test_another_broken_line_is_named(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2"):
        read_metrics(tmp_path / "m.jsonl")


def test_the_loss_is_drawn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, resumed_at=0)
    with pytest.raises(ValueError, match="no record yet"):
        plot_loss(path, tmp_path / "loss.png")
    file.write(record(1))
    file.write(record(2))
    plot_loss(path, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
