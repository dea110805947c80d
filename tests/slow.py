# SPDX-License-Identifier: Apache-2.0
"""What `make test` leaves to `make test-all`, a case at a time."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_but(cases: Iterable[Any], quick: Callable[[Any], bool]) -> list[Any]:
    """The cases for `parametrize`, all marked slow but those that `quick` picks: one of each kind.

    A case of several arguments is a tuple.
    """
    return [
        case
        if quick(case)
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]
