# SPDX-License-Identifier: Apache-2.0
"""A run that is killed, stopped or damaged ends bit for bit as one that nobody disturbed."""

import pytest

from benchmarks import faults_together
from benchmarks.faults import disturbed, undisturbed
from benchmarks.links import linked


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


@pytest.mark.slow
def test_two_processes_through_faults(tmp_path):
    """One is killed, process 0 is, one is told to stop, a checkpoint is damaged."""
    expected = faults_together.undisturbed(tmp_path / "run", 200, 2)
    faults = ["kill", "flipped", "coordinator", "SIGTERM", "kill in a save"]
    assert faults_together.disturbed(tmp_path / "run", 200, 2, faults, seed=3) == expected


@pytest.mark.slow
def test_two_hosts_whose_link_is_cut(tmp_path):
    """No connection is closed, nobody answers: both end by themselves."""
    try:
        with linked() as link:
            expected = faults_together.undisturbed(tmp_path / "run", 60, 2)
            faults = [faults_together.LINK]
            found = faults_together.disturbed(tmp_path / "run", 60, 2, faults, 4, link)
            assert found == expected
    except PermissionError as error:
        pytest.skip(f"needs network namespaces: {error}")


@pytest.mark.slow
def test_a_disk_that_fills_in_a_save_of_two_processes(tmp_path):
    expected = faults_together.undisturbed(tmp_path / "run", 80, 2)
    try:
        found = faults_together.disturbed(tmp_path / "run", 80, 2, ["disk full"], 5)
    except PermissionError as error:
        pytest.skip(f"needs to mount a small disk: {error}")
    assert found == expected
