# SPDX-License-Identifier: Apache-2.0
"""Shares of the tests: together all of them, each about as many."""

import pytest
from share import drawn, function, share


def test_shares_are_disjoint_and_together_everything():
    names = [f"tests/test_{i // 9}.py::test[{i}]" for i in range(900)]
    parts = [{name for name in names if drawn(name, which, 3)} for which in (1, 2, 3)]
    assert set.union(*parts) == set(names) and sum(map(len, parts)) == len(names)
    assert all(240 < len(part) < 360 for part in parts)


def test_a_share_that_is_none_is_refused():
    assert share("2/3") == (2, 3)
    for text in ("0/3", "4/3", "3", "1/", "a/b"):
        with pytest.raises(pytest.UsageError, match="K from 1 to N"):
            share(text)


def test_the_parameters_of_a_test_stay_together():
    names = [f"tests/test_a.py::test_{i}[{j}-x]" for i in range(40) for j in range(5)]
    part = {name for name in names if drawn(function(name), 1, 2)}
    assert 0 < len(part) < len(names) and len(part) % 5 == 0
