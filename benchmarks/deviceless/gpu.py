# SPDX-License-Identifier: Apache-2.0
"""Compile the SM120 kernels and read their machine code.

python -m benchmarks.deviceless.gpu OUT.json
"""

import dataclasses
import itertools
import json
import pathlib
import sys

import jax.numpy as jnp

from benchmarks.deviceless import flash, moe_decode
from jaxcp.compile.gpu_code import Kernel
from jaxcp.compile.machine_code import Compiler

CHIP = "rtx-pro-6000"


def attempt(compiler: Compiler, program, *args) -> dict:
    """`{"seconds", "cpu_seconds", "kernels": [...]}` of `program(*args)`, or `{"error"}`."""
    try:
        done = compiler(*program(*args))
        result = {"seconds": done.seconds, "cpu_seconds": done.cpu_seconds}
        return result | {"kernels": [as_json(kernel) for kernel in done.kernels.values()]}
    except Exception as error:  # one that fails is a line of the table
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def as_json(kernel: Kernel) -> dict:
    loops = [
        {"instructions": x.instructions, "matrix": x.matrix, "opcodes": x.opcodes}
        for x in kernel.loops
    ]
    return dataclasses.asdict(kernel) | {"loops": loops}


def rows(compiler: Compiler):
    for head_dim, what in itertools.product(flash.HEAD_DIMS, ("forward", "backward")):
        row = {"op": f"flash_{what}", "head_dim": head_dim}
        yield row | attempt(compiler, flash.ours, what, head_dim, "triton")
    for dtype in ("bfloat16", "int8"):
        row = {"op": "decode_attention", "dtype": dtype}
        yield row | attempt(compiler, moe_decode.decode, jnp.dtype(dtype), "triton")
    for tokens in moe_decode.TOKENS_PER_EXPERT:
        row = {"op": "grouped_matmul", "dtype": "bfloat16", "tokens": tokens}
        yield row | attempt(compiler, moe_decode.matmul, tokens, "triton")


def main(out: str) -> None:
    compiler = Compiler(CHIP)
    rows = []
    for row in rows(compiler):
        rows.append({"chip": CHIP} | row)
        pathlib.Path(out).write_text(json.dumps(rows))
    compiler.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
