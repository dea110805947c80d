# SPDX-License-Identifier: Apache-2.0
"""Covering arrays: every two options meet in some case, in far fewer cases than a product has."""

import itertools
from collections.abc import Callable, Iterable


def pairwise(
    factors: dict[str, Iterable], allowed: Callable[[dict], bool] = lambda case: True
) -> list[dict]:
    """Cases `{factor: value}` in which any two values of two factors that may meet do meet.

    Greedy: each case is the one of the product that meets most pairs that none before it has met,
    the first of equals. `allowed` leaves out what cannot be. Pairs of values cover what options do
    to each other two at a time; write a case of its own for a fault that takes three.

    >>> len(pairwise({"a": "xyz", "b": "xyz", "c": "xyz", "d": "xyz"}))  # of 81
    9
    """
    product = [
        dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())
    ]
    pairs = {i: set(_pairs(case)) for i, case in enumerate(product) if allowed(case)}
    missing, cases = set().union(*pairs.values()), []
    while missing:
        best = max(pairs, key=lambda i: len(pairs[i] & missing))
        missing -= pairs[best]
        cases.append(product[best])
    return cases


def _pairs(case: dict):
    return itertools.combinations(((name, repr(value)) for name, value in case.items()), 2)
