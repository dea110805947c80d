# SPDX-License-Identifier: Apache-2.0
"""What one process can show of several: options, errors told apart, nothing to wait for."""

import jax
import pytest

import jaxcp
from jaxcp import processes
from jaxcp.processes import lost

GLOO = "UNKNOWN: Gloo all-reduce failed: Connection reset by peer"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"coordinator": "a:1"}, "processes, process id missing"),
        ({"processes": 2, "process_id": 0}, "coordinator missing"),
        (
            {"coordinator": "a", "processes": 2, "process_id": 0},
            r"HOST:PORT, of process 0; got 'a'",
        ),
        ({"coordinator": "a:70000", "processes": 2, "process_id": 0}, "got 'a:70000'"),
        ({"coordinator": "a:1", "processes": 2, "process_id": 2}, "got 2 of 2 processes"),
        ({"coordinator": "a:1", "processes": 2, "process_id": -1}, "got -1 of 2 processes"),
    ],
    ids=str,
)
def test_half_an_address_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        processes.join(**options)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("text", [GLOO, "batch_size must be positive"])
def test_only_a_lost_process_ends_this_one(monkeypatch, count, text):
    left = []
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(lost, "leave", left.append)
    with pytest.raises(ValueError, match=text), processes.tied():
        raise ValueError(text)
    expected = [f"another process of 2 is gone ({GLOO})"] if (count, text) == (2, GLOO) else []
    assert left == expected


def test_one_process_decides_alone():
    assert processes.gather({"a": 1}) == [{"a": 1}] and processes.decide("x") == "x"
    assert processes.total(2.5) == 2.5 and processes.is_first() and not processes.several()
    assert processes.by_first(lambda: 3) == processes.together(lambda: 3) == 3
    with pytest.raises(KeyError, match="a"):  # as it was raised
        processes.together(lambda: {}["a"])
    poll = processes.Poll(jaxcp.make_mesh())
    assert [poll.turn(2), poll.turn(0)] == [2, 0]
    processes.check_takes_all(3)
