# SPDX-License-Identifier: Apache-2.0
"""Ask the compiler what a program costs on machines that are not there."""

import jaxcp.flax_version  # noqa: F401  (before flax)

# isort: split
from jaxcp.compile.hlo import (
    Collective,
    Copy,
    Transfer,
    collectives,
    copies,
    kernel_calls,
    transfers,
)
from jaxcp.compile.programs import decode_program, engine_programs, prefill_program
from jaxcp.compile.report import Report, compile_for, on_mesh
from jaxcp.compile.target import Target, parse_target, topology

__all__ = [
    "Collective",
    "Copy",
    "Report",
    "Target",
    "Transfer",
    "collectives",
    "compile_for",
    "copies",
    "decode_program",
    "engine_programs",
    "kernel_calls",
    "on_mesh",
    "parse_target",
    "prefill_program",
    "topology",
    "transfers",
]
