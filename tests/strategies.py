# SPDX-License-Identifier: Apache-2.0
"""The strategies that tests walk over: each of them, and those whose options change the program."""

from jaxcp.context_parallel import (
    USP,
    AllGather,
    FixedOrder,
    Halo,
    Ring,
    RingPassQ,
    Ulysses,
)

VARIANTS = (
    Ring(),
    Ring(bidirectional=True),
    RingPassQ(),
    AllGather(),
    AllGather(chunks=3),
    Ulysses(),
    USP(ulysses=2),
    Halo(),
    FixedOrder(),
)
