# SPDX-License-Identifier: Apache-2.0
"""Find block sizes for the Pallas kernels: on a device that is here, or from machine code.

`search` tries candidates and gives a `Result`; its `row` is one line of the operation's
`tuning.py`. The command is `jaxcp tune`.
"""

from jaxcp.tune.evaluate import Problem
from jaxcp.tune.parts import PARTS, TARGETS, Part
from jaxcp.tune.rows import Row
from jaxcp.tune.search import Result, Tried, search

__all__ = ["PARTS", "TARGETS", "Part", "Problem", "Result", "Row", "Tried", "search"]
