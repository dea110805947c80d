# SPDX-License-Identifier: Apache-2.0
"""Compile one TPU's kernels, ours and tokamax's, and count their bundles. One process a chip.

python -m benchmarks.deviceless.tpu v6e OUT.json
"""

import dataclasses
import importlib.util
import itertools
import json
import pathlib
import sys

import jax.numpy as jnp

from benchmarks.deviceless import flash, moe_decode
from jaxcp.compile.machine_code import Compiler
from jaxcp.tune import tpu_cost


def attempt(compiler: Compiler, program, count) -> dict:
    """`{"seconds", "cpu_seconds", "kernels"}` and what `count(kernels)` says; or `{"error"}`."""
    try:
        done = compiler(*program)
        result = {"seconds": done.seconds, "cpu_seconds": done.cpu_seconds}
        result["kernels"] = {name: dataclasses.asdict(x) for name, x in done.kernels.items()}
        with compiler.here():
            return result | count(done.kernels)
    except Exception as error:  # one that fails is a line of the table
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def flash_rows(compiler: Compiler, theirs: bool):
    """Cycles of a 1024 x 1024 tile of attention, forward and backward, ours and tokamax's best."""

    def ours(kernels):
        (kernel,) = kernels.values()
        return per_tile(compiler.chip, kernel, flash.tile(what, head_dim), flops)

    def their(kernels):  # a program of the backward pass holds the forward kernel too
        (kernel,) = (x for name, x in kernels.items() if what == "forward" or "_dkv" in name)
        return per_tile(compiler.chip, kernel, (blocks.q, blocks.kv), flops)

    for head_dim, what in itertools.product(flash.HEAD_DIMS, ("forward", "backward")):
        flops = flash.flops(what, head_dim)
        row = {"op": f"flash_{what}", "head_dim": head_dim}
        program = flash.ours(what, head_dim, "mosaic_tpu")
        yield row | {"whose": "ours"} | attempt(compiler, program, ours)
        for blocks in flash.SPLASH[what] if theirs else ():
            row["blocks"] = str(blocks)
            program = flash.splash(head_dim, blocks, gradient=what == "backward")
            yield row | {"whose": "tokamax"} | attempt(compiler, program, their)


def per_tile(chip: str, kernel, tile, flops) -> dict:
    """Cycles of an unmasked and of a masked 1024 x 1024 tile, and the bundles behind them."""
    share = 2**20 / (tile[0] * tile[1])
    unmasked, masked = tpu_cost.attention_tile(chip, kernel, tile, flops)
    return {
        "unmasked": unmasked * share,
        "masked": masked * share,
        "share": share,
        "tile": tile,
    }


def matmul_rows(compiler: Compiler, theirs: bool):
    """Cycles an expert of grouped matmul at Hy3's shapes."""

    def ours(kernels):
        from pallas_kernels.grouped_matmul import tuning

        block = tuning.blocks("mosaic_matmul", tokens, jnp.bfloat16, interpret=False)
        (kernel,) = kernels.values()
        sizes = tokens, moe_decode.EMBED, moe_decode.WIDTH
        return {"cycles": tpu_cost.expert(compiler.chip, kernel, block, *sizes, aligned=True)}

    def their(kernels):
        (kernel,) = kernels.values()
        cycles = moe_decode.their_expert_cycles(compiler.chip, kernel, tokens, chosen[0])
        return {"cycles": cycles, "blocks": str(chosen[0])}

    for tokens in moe_decode.TOKENS_PER_EXPERT:
        row = {"op": "grouped_matmul", "tokens": tokens}
        program = moe_decode.matmul(tokens, "mosaic_tpu")
        yield row | {"whose": "ours"} | attempt(compiler, program, ours)
        if theirs:
            chosen: list = []
            program = moe_decode.ragged_dot(tokens, chosen)
            yield row | {"whose": "tokamax"} | attempt(compiler, program, their)


def decode_rows(compiler: Compiler):
    """Bundles of a step of the decode kernel, and the bytes that it reads."""

    def count(kernels):
        from pallas_kernels.decode_attention import tuning

        (kernel,) = kernels.values()
        block = tuning.blocks("mosaic", 128, jnp.bfloat16, interpret=False)
        step = tpu_cost.decode_step(compiler.chip, kernel, block, moe_decode.ROW_FLOPS)
        return {"cycles": step, "block_bytes": tpu_cost.step_bytes(kernel)}

    for dtype in ("bfloat16", "int8"):
        row = {"op": "decode_attention", "dtype": dtype, "whose": "ours"}
        program = moe_decode.decode(jnp.dtype(dtype), "mosaic_tpu")
        yield row | attempt(compiler, program, count)


def main(chip: str, out: str) -> None:
    compiler = Compiler(chip)
    theirs = importlib.util.find_spec("tokamax") is not None
    parts = decode_rows(compiler), matmul_rows(compiler, theirs), flash_rows(compiler, theirs)
    rows = []
    for row in itertools.chain(*parts):
        rows.append({"chip": chip} | row)
        pathlib.Path(out).write_text(json.dumps(rows))
    compiler.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
