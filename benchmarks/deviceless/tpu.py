# SPDX-License-Identifier: Apache-2.0
"""Compile one TPU's kernels, ours and tokamax's, and count their bundles. One process a chip.

python -m benchmarks.deviceless.tpu v6e OUT.json
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time

from benchmarks.deviceless import bundles

SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


class Compiler:
    """Compiles programs for one device of a chip, and reads what libtpu wrote of each."""

    def __init__(self, chip: str):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="bundles-"))
        os.environ["LIBTPU_INIT_ARGS"] = bundles.init_args(self.folder)
        os.environ["JAX_PLATFORMS"] = "cpu"
        # both only now: jax and libtpu read the environment when they are loaded
        import jax
        import jax.numpy as jnp
        from jax.sharding import Mesh

        from jaxcp.plan import parse_target

        target = parse_target(SLICES[chip])
        devices = target.mesh(seq=target.size).devices.flat[:1]
        self.mesh = Mesh(devices.reshape(1), ("seq",))
        one = jax.ShapeDtypeStruct((8, 128), jnp.float32)
        self(jnp.sin, (one,), dict)  # the first program pays for loading libtpu

    def __call__(self, fn, args, count) -> dict:
        """`{"seconds", "cpu_seconds", "kernels": {name: bundles.Kernel}}` and what `count` makes
        of it under the chip's mesh; or `{"error"}`."""
        import jax

        from jaxcp.plan import compile_for

        cpu, start = time.process_time(), time.perf_counter()
        try:
            compile_for(fn, args, self.mesh)
            seconds = time.perf_counter() - start
            found = {"seconds": seconds, "cpu_seconds": time.process_time() - cpu}
            found["kernels"] = {
                name: dataclasses.asdict(kernel)
                for name, kernel in bundles.kernels(self.folder).items()
            }
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return found | count(found["kernels"])
        except Exception as error:  # one that fails is a line of the table
            return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        finally:
            for path in self.folder.iterdir():
                path.unlink() if path.is_file() else shutil.rmtree(path)


def flash_rows(compiler: Compiler, theirs: bool):
    """Bundles a 1024 x 1024 tile of attention, forward and backward, ours and tokamax's best."""
    from benchmarks.deviceless import flash

    def ours(kernels):
        return per_tile(kernels, {name: flash.tile(name, head_dim) for name in kernels})

    def their(kernels):  # a program of the backward pass holds the forward kernel too
        part = {name: x for name, x in kernels.items() if what == "forward" or "_dkv" in name}
        return {"kernels": part} | per_tile(part, dict.fromkeys(part, (blocks.q, blocks.kv)))

    for head_dim in flash.HEAD_DIMS:
        for what, program in (("forward", flash.forward), ("backward", flash.backward)):
            row = {"op": f"flash_{what}", "head_dim": head_dim}
            yield row | {"whose": "ours"} | compiler(*program(head_dim, "mosaic_tpu"), ours)
            for blocks in flash.SPLASH[what] if theirs else ():
                row["blocks"] = str(blocks)
                program_of = flash.splash(head_dim, blocks, gradient=what == "backward")
                yield row | {"whose": "tokamax"} | compiler(*program_of, their)


def per_tile(kernels: dict, tiles: dict) -> dict:
    """Bundles of an unmasked and of a masked 1024 x 1024 tile, all kernels together."""
    sums = {"unmasked": 0.0, "masked": 0.0}
    for name, kernel in kernels.items():
        q, kv = tiles[name]
        hot = [h["bundles"] * 2**20 / (q * kv) for h in kernel["hot"]]
        if len(hot) < 2:
            raise ValueError(f"{name}: expected an unmasked and a masked part; got {len(hot)}")
        sums["unmasked"] += hot[0]
        sums["masked"] += hot[1]
    return sums | {"tiles": tiles}


def matmul_rows(compiler: Compiler, theirs: bool):
    """Cycles an expert of grouped matmul at Hy3's shapes."""
    import jax.numpy as jnp

    from benchmarks.deviceless import moe_decode

    def ours(kernels):
        from pallas_kernels.grouped_matmul import tuning

        block = tuning.blocks("mosaic_matmul", tokens, jnp.bfloat16, interpret=False)
        (kernel,) = kernels.values()
        return {"cycles": moe_decode.our_expert_cycles(kernel, tokens, block)}

    def their(kernels):
        (kernel,) = kernels.values()
        cycles = moe_decode.their_expert_cycles(kernel, tokens, chosen[0])
        return {"cycles": cycles, "blocks": str(chosen[0])}

    for tokens in moe_decode.TOKENS_PER_EXPERT:
        row = {"op": "grouped_matmul", "tokens": tokens}
        found = {"error": "not there"}
        if moe_decode.there("grouped_matmul", "mosaic_tpu"):
            found = compiler(*moe_decode.matmul(tokens, "mosaic_tpu"), ours)
        yield row | {"whose": "ours"} | found
        if theirs:
            chosen: list = []
            yield (
                row | {"whose": "tokamax"} | compiler(*moe_decode.ragged_dot(tokens, chosen), their)
            )


def decode_rows(compiler: Compiler):
    """Bundles of a step of the decode kernel, and the bytes that it reads."""
    import jax.numpy as jnp

    from benchmarks.deviceless import moe_decode

    def count(kernels):
        from pallas_kernels.decode_attention import tuning

        (kernel,) = kernels.values()
        nbytes = moe_decode.block_bytes(kernel["windows"])
        block = tuning.blocks("mosaic", 128, jnp.bfloat16, interpret=False)
        return {"cycles": moe_decode.step_cycles(kernel, block), "block_bytes": nbytes}

    for dtype in ("bfloat16", "int8"):
        row = {"op": "decode_attention", "dtype": dtype, "whose": "ours"}
        if moe_decode.there("decode_attention", "mosaic_tpu"):
            yield row | compiler(*moe_decode.decode(jnp.dtype(dtype), "mosaic_tpu"), count)
        else:
            yield row | {"error": "not there"}


def main(chip: str, out: str) -> None:
    compiler = Compiler(chip)
    theirs = importlib.util.find_spec("tokamax") is not None
    parts = decode_rows(compiler), matmul_rows(compiler, theirs), flash_rows(compiler, theirs)
    rows = []
    for row in itertools.chain(*parts):
        rows.append({"chip": chip} | row)
        pathlib.Path(out).write_text(json.dumps(rows))
    shutil.rmtree(compiler.folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
