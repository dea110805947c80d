# SPDX-License-Identifier: Apache-2.0
"""Compile the SM120 kernels and read their machine code.

python -m benchmarks.deviceless.gpu OUT.json
"""

import dataclasses
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time

from benchmarks.deviceless import sass


class Compiler:
    """Compiles programs for one RTX PRO 6000, and assembles the PTX that XLA wrote of each."""

    def __init__(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="ptx-"))
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} {sass.dump_flags(self.folder)}"
        os.environ["JAX_PLATFORMS"] = "cpu"
        # only now: jax reads the environment when it is loaded
        from jaxcp.plan import parse_target

        self.mesh = parse_target("rtx-pro-6000:1").mesh()

    def __call__(self, fn, args) -> dict:
        """`{"seconds", "cpu_seconds", "kernels": [sass.Kernel, ...]}`, or `{"error"}`."""
        from jaxcp.plan import compile_for

        cpu, start = time.process_time(), time.perf_counter()
        try:
            compile_for(fn, args, self.mesh)
            seconds = time.perf_counter() - start
            found = {"seconds": seconds, "cpu_seconds": time.process_time() - cpu}
            kernels = [k for k in sass.kernels(self.folder) if k.matrix_names]
            return found | {"kernels": [as_json(kernel) for kernel in kernels]}
        except Exception as error:  # one that fails is a line of the table
            return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        finally:
            for path in self.folder.iterdir():
                path.unlink()


def as_json(kernel: sass.Kernel) -> dict:
    loops = [
        {"instructions": x.instructions, "matrix": x.matrix, "opcodes": x.opcodes}
        for x in kernel.loops
    ]
    return dataclasses.asdict(kernel) | {"loops": loops}


def rows(compile_one: Compiler):
    import jax.numpy as jnp

    from benchmarks.deviceless import flash, moe_decode

    for head_dim in flash.HEAD_DIMS:
        for what, program in (("forward", flash.forward), ("backward", flash.backward)):
            row = {"op": f"flash_{what}", "head_dim": head_dim}
            yield row | compile_one(*program(head_dim, "triton"))
    for dtype in ("bfloat16", "int8"):
        row = {"op": "decode_attention", "dtype": dtype}
        if moe_decode.there("decode_attention", "triton"):
            yield row | compile_one(*moe_decode.decode(jnp.dtype(dtype), "triton"))
        else:
            yield row | {"error": "not there"}
    for tokens in moe_decode.TOKENS_PER_EXPERT:
        row = {"op": "grouped_matmul", "dtype": "bfloat16", "tokens": tokens}
        if moe_decode.there("grouped_matmul", "triton"):
            yield row | compile_one(*moe_decode.matmul(tokens, "triton"))
        else:
            yield row | {"error": "not there"}
    for name in ("MXFP8", "NVFP4"):
        row = {"op": "grouped_matmul", "dtype": name}
        if moe_decode.there("grouped_matmul", "block_scaled"):
            yield row | compile_one(*moe_decode.block_scaled(512, name.lower()))
        else:
            yield row | {"error": "not there"}


def main(out: str) -> None:
    compiler = Compiler()
    found = []
    for row in rows(compiler):
        found.append({"chip": "rtx-pro-6000"} | row)
        pathlib.Path(out).write_text(json.dumps(found))
    shutil.rmtree(compiler.folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
