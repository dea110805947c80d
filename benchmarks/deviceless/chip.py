# SPDX-License-Identifier: Apache-2.0
"""Compile one chip's kernels, ours and tokamax's, and count them. One process a chip.

python -m benchmarks.deviceless.chip v6e OUT.json
"""

import dataclasses
import functools
import importlib.util
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator

import jax.numpy as jnp

from benchmarks.deviceless import programs
from jaxcp.compile.gpu_code import Kernel as GpuKernel
from jaxcp.compile.machine_code import SLICES, Compiler
from jaxcp.tune import tpu_cost
from jaxcp.tune.parts import attention_flops
from pallas_kernels.decode_attention import tuning as decode_tuning
from pallas_kernels.flash_attention import tuning as flash_tuning
from pallas_kernels.grouped_matmul import tuning as matmul_tuning

ROW_FLOPS = 4 * 8 * 128  # of a row of the cache: scores and values of 8 query heads


def attempt(compiler: Compiler, program: Callable, count: Callable) -> dict:
    """`{"cpu_seconds", "kernels"}` and what `count(kernels)` says; or `{"error"}`."""
    try:
        done = compiler(*program())
        kernels = {name: as_json(kernel) for name, kernel in done.kernels.items()}
        with compiler.here():
            numbers = count(done.kernels)
        return {"cpu_seconds": done.cpu_seconds, "kernels": kernels} | numbers
    except Exception as error:  # one that fails is a line of the table
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def as_json(kernel) -> dict:
    values = dataclasses.asdict(kernel)
    if isinstance(kernel, GpuKernel):
        values["loops"] = [
            {"instructions": x.instructions, "matrix": x.matrix} for x in kernel.loops
        ]
    return values


def rows(compiler: Compiler) -> Iterator[dict]:
    """A row a program: decode, grouped matmul and attention, forward and backward."""
    tpu = compiler.chip in SLICES
    backend = "mosaic_tpu" if tpu else "triton"
    theirs = tpu and importlib.util.find_spec("tokamax") is not None

    def counted(row, program, *args, count=None):
        program = functools.partial(program, *args)
        return row | attempt(compiler, program, count if tpu and count else lambda kernels: {})

    for dtype in ("bfloat16", "int8"):
        row = {"op": "decode_attention", "dtype": dtype, "whose": "ours"}
        step = functools.partial(decode_step, compiler.chip)
        yield counted(row, programs.decode, dtype, backend, count=step)
    for tokens in programs.TOKENS_PER_EXPERT:
        row = {"op": "grouped_matmul", "tokens": tokens}
        count = functools.partial(expert, compiler.chip, tokens)
        yield counted(row | {"whose": "ours"}, programs.matmul, tokens, backend, count=count)
        if theirs:
            chosen: list = []
            count = functools.partial(their_expert, compiler.chip, tokens, chosen)
            yield counted(
                row | {"whose": "tokamax"}, programs.ragged_dot, tokens, chosen, count=count
            )
    for by_channel in (False, True):
        row = {"op": "gated_delta", "by_channel": by_channel, "whose": "ours"}
        yield counted(row, programs.gated_delta, by_channel, backend, count=delta)
    for head_dim, what in itertools.product(programs.HEAD_DIMS, ("forward", "backward")):
        row = {"op": f"flash_{what}", "head_dim": head_dim}
        count = functools.partial(tiles, compiler.chip, what, head_dim, None)
        yield counted(row | {"whose": "ours"}, programs.flash, what, head_dim, backend, count=count)
        for blocks in programs.SPLASH[what] if theirs else ():
            count = functools.partial(tiles, compiler.chip, what, head_dim, blocks)
            row |= {"whose": "tokamax", "blocks": str(blocks)}
            yield counted(row, programs.splash, what, head_dim, blocks, count=count)


def tiles(chip: str, what: str, head_dim: int, blocks, kernels) -> dict:
    """Cycles of an unmasked and of a masked 1024 x 1024 tile, of our kernel without `blocks`.

    tokamax's program of the backward pass holds its forward kernel too.
    """
    (kernel,) = (
        x for name, x in kernels.items() if what == "forward" or blocks is None or "_dkv" in name
    )
    if blocks is None:
        blocks = flash_tuning.blocks(f"mosaic_{what}", head_dim, jnp.bfloat16, interpret=False)
    share = 2**20 / (blocks.q * blocks.kv)
    flops = attention_flops(f"mosaic_{what}", head_dim)
    unmasked, masked = tpu_cost.attention_tile(chip, kernel, (blocks.q, blocks.kv), flops)
    return {"unmasked": unmasked * share, "masked": masked * share, "share": share}


def expert(chip: str, tokens: int, kernels) -> dict:
    """Cycles an expert of our grouped matmul."""
    (kernel,) = kernels.values()
    block = matmul_tuning.blocks("mosaic_matmul", tokens, jnp.bfloat16, interpret=False)
    sizes = tokens, programs.EXPERTS["embed"], programs.EXPERTS["width"]
    return {"cycles": tpu_cost.expert(chip, kernel, block, *sizes, aligned=True)}


def their_expert(chip: str, tokens: int, chosen: list, kernels) -> dict:
    """Cycles an expert of tokamax's kernel, by its code for the least number of rows that fits."""
    (kernel,) = kernels.values()
    tile, embed, width = chosen[0], programs.EXPERTS["embed"], programs.EXPERTS["width"]
    flops = 2 * min(tokens, tile.tile_m) * min(tile.tile_n, width) * min(tile.tile_k, embed)
    fitting = [h for h in kernel.hot if tpu_cost.holds(chip, h, flops)]
    if not fitting:
        raise ValueError(f"tokamax has no region that does {flops:.3g} FLOPs")
    steps = -(-width // tile.tile_n) * -(-embed // tile.tile_k) * -(-tokens // tile.tile_m)
    hot = min(tpu_cost.cycles(chip, h, flops) for h in fitting)
    return {"cycles": steps * (kernel.around + hot), "blocks": str(tile)}


def decode_step(chip: str, kernels) -> dict:
    """Bundles of a step of the decode kernel, and the bytes that it reads."""
    (kernel,) = kernels.values()
    block = decode_tuning.blocks("mosaic", 128, jnp.bfloat16, interpret=False)
    step = tpu_cost.decode_step(chip, kernel, block, ROW_FLOPS)
    return {"cycles": step, "block_bytes": tpu_cost.step_bytes(kernel)}


def delta(kernels) -> dict:
    """Bundles of a chunk in the kernels that work it, and what the MXU alone would need."""
    hot = {
        name: (sum(x.bundles for x in kernel.hot), sum(x.floors["MXU"] for x in kernel.hot))
        for name, kernel in kernels.items()
    }
    local = {name: numbers for name, numbers in hot.items() if "local" in name}
    bundles, floor = (sum(x) for x in zip(*local.values(), strict=True))
    return {"bundles": bundles, "mxu": floor, "hot": hot}


def main(chip: str, out: str) -> None:
    compiler, counts = Compiler(chip), []
    for row in rows(compiler):
        counts.append({"chip": chip} | row)
        pathlib.Path(out).write_text(json.dumps(counts))
    compiler.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
