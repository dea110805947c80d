# SPDX-License-Identifier: Apache-2.0
"""The covering arrays that other tests are made of leave no pair out."""

import itertools

from pairwise import each_value, pairwise

FACTORS = {"a": range(4), "b": "xyz", "c": (True, False), "d": (None, 1.5)}


def test_every_pair_that_may_meet_meets():
    def allowed(case):
        return case["a"] != 3 or case["b"] != "x"

    cases = pairwise(FACTORS, allowed)
    assert all(map(allowed, cases)) and len(cases) <= 14 < 48
    for one, other in itertools.combinations(FACTORS, 2):
        met = {(case[one], case[other]) for case in cases}
        may = set(itertools.product(FACTORS[one], FACTORS[other]))
        assert met == (may - {(3, "x")} if (one, other) == ("a", "b") else may)


def test_each_value_is_met_in_few_cases():
    cases = pairwise(FACTORS)
    few = each_value(cases)
    assert all(case in cases for case in few) and len(few) <= 5 < len(cases)
    for name, values in FACTORS.items():
        assert {case[name] for case in few} == set(values)
