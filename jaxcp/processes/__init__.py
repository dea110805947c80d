# SPDX-License-Identifier: Apache-2.0
"""One program in several processes, as JAX's multi-controller runtime has it.

All processes run the same program and must come to every collective in the same order. So what
depends on a clock, a signal, an exception or a disk is decided once, and told to all (`agreement`);
and where one process is lost, the others end rather than wait for it (`lost`).
"""

from jaxcp.processes.agreement import (
    Poll,
    by_first,
    check_takes_all,
    decide,
    everywhere,
    gather,
    is_first,
    several,
    together,
    total,
)
from jaxcp.processes.lost import LOST, tied
from jaxcp.processes.start import Joined, join, part

__all__ = [
    "LOST",
    "Joined",
    "Poll",
    "by_first",
    "check_takes_all",
    "decide",
    "everywhere",
    "gather",
    "is_first",
    "join",
    "part",
    "several",
    "tied",
    "together",
    "total",
]
