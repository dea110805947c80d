# SPDX-License-Identifier: Apache-2.0
"""The metrics file survives what kills a process."""

import pytest

from jaxcp.training.metrics import MetricsFile, read_metrics
from jaxcp.training.plots import plot_loss, plot_losses


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


def test_runs_are_drawn_in_one_picture(tmp_path, monkeypatch):
    from jaxcp.training import plots

    figures, make = [], plots.new_figure

    def remembered(**options):
        figures.append(make(**options))
        return figures[-1]

    monkeypatch.setattr(plots, "new_figure", remembered)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        file = MetricsFile(tmp_path / name / "metrics.jsonl", resumed_at=0)
        file.write(record(1))
        file.write(record(2) | {"eval_loss": 3.25})
    plot_losses([tmp_path / "a", tmp_path / "b" / "metrics.jsonl"], tmp_path / "runs.png")
    labels = [line.get_label() for line in figures[0].axes[0].get_lines()]
    assert labels == ["a: 3.000", "a, evaluated: 3.250", "b: 3.000", "b, evaluated: 3.250"]
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="needed runs to draw"):
        plot_losses([], tmp_path / "runs.png")
