# SPDX-License-Identifier: Apache-2.0
"""Compile the slowest of our programs once more, in a process that writes no machine code.

python -m benchmarks.deviceless.compile_time v6e OUT.json  # what tpu.py or gpu.py wrote
"""

import json
import pathlib
import sys

import jax.numpy as jnp

from benchmarks.deviceless import flash, moe_decode
from jaxcp.compile.machine_code import SLICES, Compiler

SLOWEST = 3


def program(row: dict, chip: str):
    """`(fn, args)` of one of our rows."""
    backend = "mosaic_tpu" if chip in SLICES else "triton"
    if row["op"].startswith("flash_"):
        return flash.ours(row["op"].removeprefix("flash_"), row["head_dim"], backend)
    if row["op"] == "decode_attention":
        return moe_decode.decode(jnp.dtype(row["dtype"]), backend)
    return moe_decode.matmul(row["tokens"], backend)


def main(chip: str, out: str) -> None:
    path = pathlib.Path(out)
    rows = json.loads(path.read_text())
    ours = [row for row in rows if "seconds" in row and row.get("whose", "ours") == "ours"]
    compiler = Compiler(chip, dumps=False)
    for row in sorted(ours, key=lambda row: -row["cpu_seconds"])[:SLOWEST]:
        done = compiler(*program(row, chip))
        row["compile_seconds"] = {"clock": done.seconds, "cpu": done.cpu_seconds}
    compiler.close()
    path.write_text(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
