# SPDX-License-Identifier: Apache-2.0
"""Compile a chip's layers and count them: bundles of the kernels, and the glue between them.

python -m benchmarks.cp.compiled v6e OUT.json      # one process a chip
"""

import dataclasses
import functools
import json
import pathlib
import sys
import time

import jax
from jax.sharding import Mesh

import jaxcp
from benchmarks.cp import glue, programs, skipping
from jaxcp.compile import tpu_code
from jaxcp.compile.hlo import collectives
from jaxcp.compile.machine_code import SLICES, Compiler
from jaxcp.compile.report import on_mesh
from jaxcp.compile.target import parse_target

# chip: (slice, tokens a device, strategies by name) of what is compiled. A turn of a ring is the
# same for any number of devices; a gather is not.
EVERY = ("Ring", "AllGather", "Ulysses", "Ring(fused=True)")
OURS: dict[str, tuple[tuple[str, int, tuple[str, ...]], ...]] = {
    "v5p": (("v5p:2x2x4", 2048, EVERY), ("v5p:4x4x4", 2048, ("AllGather",))),
    "v6e": (("v6e:2x4", 16384, EVERY),),
    "tpu7x": (("tpu7x:2x2x1", 16384, EVERY),),
}
# tokamax's ring is unrolled: two devices tell what a turn costs. Its mask is an array of
# tokens x tokens on the host, which bounds them.
THEIRS = {"v5p": ("v5p:2x2x1", 2048), "v6e": ("v6e:2x2", 8192), "tpu7x": ("tpu7x:2x2x1", 8192)}
THEIR_DEVICES = 2


def jobs(chip: str):
    """`(row, mesh, program)` of everything that is compiled for a chip; row names it."""
    target = parse_target(SLICES[chip])
    mesh = Mesh(target.mesh(seq=target.size).devices.flatten()[:1], ("seq",))
    row = {"chip": chip, "slice": str(target), "devices": 1, "tokens": 2048}
    yield row | {"whose": "ours", "strategy": "kernels"}, mesh, programs.kernels
    for name, tokens, strategies in OURS[chip]:
        target = parse_target(name)
        mesh = target.mesh(seq=target.size)
        row = {"chip": chip, "slice": name, "devices": mesh.size, "tokens": tokens}
        for strategy in strategies:
            kind, fused = strategy.split("(")[0], "fused" in strategy
            value = getattr(jaxcp, kind)(**{"fused": True} if fused else {})
            program = functools.partial(programs.ours, value, mesh, tokens=tokens)
            yield row | {"whose": "ours", "strategy": strategy}, mesh, program
    name, tokens = THEIRS[chip]
    target = parse_target(name)
    devices = target.mesh(seq=target.size).devices.flatten()[:THEIR_DEVICES]
    mesh = Mesh(devices, ("seq",))
    row = {"chip": chip, "slice": name, "devices": THEIR_DEVICES, "tokens": tokens}
    program = functools.partial(programs.tokamax_ring, mesh, tokens=tokens)
    yield row | {"whose": "tokamax", "strategy": "ring"}, mesh, program


def count(compiler: Compiler, mesh: Mesh, program) -> dict:
    start = time.process_time()
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            fn, arguments = program()
            traced = jax.jit(fn).trace(*on_mesh(arguments, mesh))
            compiled = traced.lower(lowering_platforms=("tpu",)).compile()
        kernels = tpu_code.kernels(compiler.folder)
        skips = skipping.read(compiler.folder, kernels) if mesh.size == 1 else {}
        text = compiled.as_text()
        between, sent = glue.read(text), collectives(text)
    except Exception as error:  # one that fails is a line of the table
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:
        for path in compiler.folder.iterdir():
            path.unlink()
    return {
        "cpu_seconds": time.process_time() - start,
        "kernels": {name: dataclasses.asdict(kernel) for name, kernel in kernels.items()},
        "skips": skips,
        "glue": {
            which: {part: dataclasses.asdict(value) for part, value in parts.items()}
            for which, parts in between.items()
        },
        "collectives": [dataclasses.asdict(x) for x in sent],
    }


def main(chip: str, out: str) -> None:
    compiler, rows = Compiler(chip), []
    for row, mesh, program in jobs(chip):
        rows.append(row | count(compiler, mesh, program))
        pathlib.Path(out).write_text(json.dumps(rows))
    compiler.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
