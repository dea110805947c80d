# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of `python -m benchmarks.train`, and all of it once, on a few tokens."""

import pytest

from benchmarks import train, train_loop
from benchmarks.train_loop import Pair
from benchmarks.train_speed import Race, Setting, Turn, in_turns


def turn(seconds, loss=1.0):
    return Turn(seconds, 10 * seconds, loss)


def test_a_ratio_is_that_of_neighbours():
    """The machine gets three times slower, and the ratio stays."""
    race = Race([turn(1.0), turn(3.0), turn(1.0)], [turn(2.0), turn(6.0), turn(5.0)])
    assert race.ratio() == (2.0, 2.0, 5.0)
    assert race.medians() == (1.0, 5.0) and race.medians("cpu_seconds") == (10.0, 50.0)


def test_the_first_round_does_not_count_and_losses_must_agree():
    times = iter([9.0, 8.0, 1.0, 2.0, 1.0, 2.0])
    race = in_turns(lambda: turn(next(times)), lambda: turn(next(times)), 2)
    assert race.ratio() == (2.0, 2.0, 2.0) and len(race.ours) == 2
    with pytest.raises(ValueError, match="both sides must have the same losses"):
        in_turns(lambda: turn(1.0), lambda: turn(1.0, loss=1.1), 1)


def test_overhead_is_the_part_that_steps_do_not_take():
    part = train_loop.overhead([Pair(10.0, 9.0), Pair(20.0, 19.0), Pair(10.0, 10.5)])
    assert part == pytest.approx((0.05, -0.05, 0.1))


def test_goals_say_whether_they_are_met():
    assert train.verdict(1.25, 1.25, at_most=True) == "at most 1.25: met"
    assert train.verdict(1.26, 1.25, at_most=True) == "at most 1.25: **missed**"
    assert train.verdict(0.99, 1.0, at_most=False) == "at least 1: **missed**"


def test_the_memory_of_a_loss_grows_with_its_tokens_only_naively():
    """A chunk of 1,024 tokens, whatever their number."""
    (ours, naive), (more, naive_more) = (train.loss_memory(n, 16, 4096) for n in (2048, 8192))
    assert naive >= 2048 * 4096 * 4 and naive_more > 2 * naive
    assert ours < 0.8 * naive and more < 1.3 * ours


@pytest.mark.slow
def test_all_of_it_on_a_few_tokens(tmp_path):
    setting = Setting(layers=1, width=16, heads=2, context=32, rows=4, rounds=2, steps=2)
    train.main(train.Args(out=tmp_path, setting=setting, seq=2, loss_tokens=(64,), mebibytes=4))
    text = (tmp_path / "train.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + 5 and "seq=2 emulated, context 64" in text
    assert "PyTorch eager" in lines[1] or "not installed" in lines[1]
    assert sum(line.endswith(" |") and "at " in line for line in lines) >= 2
