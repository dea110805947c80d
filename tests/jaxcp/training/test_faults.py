# SPDX-License-Identifier: Apache-2.0
"""A run that is killed, stopped or damaged ends bit for bit as one that nobody disturbed."""

import pytest

from benchmarks.soak import disturbed, undisturbed


@pytest.mark.slow
def test_killed_at_random_and_inside_a_save(tmp_path):
    expected = undisturbed(tmp_path / "run", 80)
    assert disturbed(tmp_path / "run", 80, ["kill", "kill in a save"], seed=1) == expected


@pytest.mark.slow
def test_every_fault_and_ten_kills(tmp_path):
    expected = undisturbed(tmp_path / "run", 400)
    faults = ["kill", "kill in a save"] * 5
    faults[1:1], faults[4:4], faults[7:7] = ["SIGTERM", "flipped"], ["missing"], ["truncated"]
    faults[11:11] = ["SIGINT", "shard gone"]
    assert disturbed(tmp_path / "run", 400, faults, seed=2) == expected
