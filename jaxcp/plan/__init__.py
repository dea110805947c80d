# SPDX-License-Identifier: Apache-2.0
"""Ask the compiler what a program costs on machines that are not there."""

from jaxcp.plan.compile import Report, compile_for, on_mesh
from jaxcp.plan.hlo import Collective, collectives, kernel_calls
from jaxcp.plan.inference import decode_program, prefill_program
from jaxcp.plan.target import Target, parse_target, topology

__all__ = [
    "Collective",
    "Report",
    "Target",
    "collectives",
    "compile_for",
    "decode_program",
    "kernel_calls",
    "on_mesh",
    "parse_target",
    "prefill_program",
    "topology",
]
