# SPDX-License-Identifier: Apache-2.0
"""Covering arrays: every two options meet in some case, in far fewer cases than a product has."""

import itertools
from collections.abc import Callable, Iterable


def pairwise(
    factors: dict[str, Iterable], allowed: Callable[[dict], bool] = lambda case: True
) -> list[dict]:
    """Cases `{factor: value}` in which any two values of two factors that may meet do meet.

    `allowed` leaves out what cannot be. Pairs of values cover what options do
    to each other two at a time; write a case of its own for a fault that takes three.

    >>> len(pairwise({"a": "xyz", "b": "xyz", "c": "xyz", "d": "xyz"}))  # of 81
    9
    """
    product = [
        dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())
    ]
    return _covering(filter(allowed, product), _pairs)


def each_value(cases: Iterable[dict]) -> list[dict]:
    """Some of the cases, in which every value that a factor has in any of them is met.

    The part of `pairwise` for a suite that must be quick.
    """
    return _covering(cases, _values)


def _covering(cases, parts_of: Callable[[dict], Iterable]) -> list[dict]:
    """Greedy: the case with most parts that no case before it has, the first of equals."""
    cases = list(cases)
    parts = {i: set(parts_of(case)) for i, case in enumerate(cases)}
    missing, chosen = set().union(*parts.values()), []
    while missing:
        best = max(parts, key=lambda i: len(parts[i] & missing))
        missing -= parts[best]
        chosen.append(cases[best])
    return chosen


def _values(case: dict):
    return ((name, repr(value)) for name, value in case.items())


def _pairs(case: dict):
    return itertools.combinations(_values(case), 2)
