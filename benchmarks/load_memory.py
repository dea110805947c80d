# SPDX-License-Identifier: Apache-2.0
"""Host memory of `jaxcp.load` over that of the shards: a 4 GB checkpoint on 8 emulated devices.

    python -m benchmarks.load_memory                                # 4 GB of disk, 3 minutes
    python -m benchmarks.load_memory --out benchmarks/results       # and writes it there
    python -m benchmarks.load_memory --layers 1                     # smaller

Each load has a process of its own. Its peak is the kernel's (VmHWM, pages of mapped files
included) over what the process held before, with JAX started and the model's shapes traced. What
shards hold are the distinct buffers of its devices. "whole" reads a leaf whole and then places it.
The bar: a peak of at most 1.5 of the largest tensor over what shards hold. Exits with 1 above it.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata

import ml_dtypes
import numpy as np

DEVICES, BAR, MIB, FILE_BYTES = 8, 1.5, 1 << 20, 1_000_000_000
MESHES = ({"expert": 8}, {"expert": 2, "model": 4}, {"seq": 2, "model": 4}, {"seq": 8})
RUNS = [(axes, "stream") for axes in MESHES] + [(MESHES[0], "whole")]


def config(layers: int):
    from jaxcp.models.hybrid_moe.config import HybridMoEConfig

    return HybridMoEConfig(
        vocab_size=32768, num_layers=layers, embed_dim=2048, num_heads=16, num_kv_heads=8,
        head_dim=128, mlp_dim=8192, moe_dim=1024, num_experts=32, num_experts_per_tok=4,
        dtype="bfloat16",
    )  # fmt: skip


def write(folder: pathlib.Path, layers: int) -> None:
    """Random tensors under Hy3's names, in files of about FILE_BYTES, and an index."""
    from flax import nnx
    from safetensors.numpy import save_file

    from jaxcp import models, weights
    from jaxcp.models.weight_table import sources

    made = config(layers)
    state = nnx.to_flat_state(nnx.state(weights.abstract_model(made)))
    leaves = {".".join(map(str, keys)): leaf.shape for keys, leaf in state}
    chosen = sources(models.family_of(made).table(made), leaves)
    shapes = {name: source.shape for source in chosen.values() for name in source.names}
    rng, weight_map, tensors, size = np.random.default_rng(0), {}, {}, 0

    def flush():
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(tensors, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))
        tensors.clear()

    for name, shape in shapes.items():
        tensors[name] = rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
        size += tensors[name].nbytes
        if sum(x.nbytes for x in tensors.values()) > FILE_BYTES:
            flush()
    flush()
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(models.config_to_dict(made)))


def status(field: str) -> int:
    """Bytes, of this process."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(folder: pathlib.Path, axes: dict[str, int], way: str) -> dict:
    """One load, in this process."""
    import jax

    import jaxcp
    from jaxcp import weights
    from jaxcp.mesh import MeshConfig
    from jaxcp.weights import loading
    from jaxcp.weights import stream as streaming
    from jaxcp.weights.files import open_checkpoint

    if way == "whole":
        loading.stream = whole
    made = jaxcp.load_config(folder)
    weights.abstract_model(made)
    with jax.set_mesh(MeshConfig(**axes).make()):
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before, start = status("VmRSS"), time.monotonic()
        model, _ = jaxcp.load(folder)
        arrays = jax.block_until_ready(jax.tree.leaves(model))
        seconds, peak = time.monotonic() - start, status("VmHWM") - before
    shards = [s.data for x in arrays for s in x.addressable_shards]
    nbytes = sum({x.unsafe_buffer_pointer(): x.nbytes for x in shards}.values())
    checkpoint = open_checkpoint(folder)
    largest = max(checkpoint.read(name).nbytes for name in checkpoint.shapes)
    row = {"mesh": axes, "way": way, "seconds": seconds, "peak": peak, "shards": nbytes}
    row |= {"largest": largest, "chunk": streaming.CHUNK, "tensors": len(checkpoint.shapes)}
    return row | {"over": (peak - nbytes) / largest}


def whole(pieces, shape, dtype, sharding):
    """Put a leaf as `jaxcp.weights.stream.stream` does, but whole on the host first."""
    import collections

    import jax

    leaf = np.empty(shape, dtype)
    for piece in pieces:
        values = piece.values()
        index = zip(piece.start, values.shape, strict=True)
        leaf[tuple(slice(first, first + size) for first, size in index)] = values
    assert np.isfinite(leaf).all()
    return jax.device_put(leaf, sharding), collections.Counter()


def markdown(report: dict) -> str:
    v = report["versions"]
    rows = report["rows"]
    lines = [
        "# Host memory of loading",
        "",
        "`python -m benchmarks.load_memory --out benchmarks/results`: "
        f"{report['bytes'] / 1e9:.2f} GB in {rows[0]['tensors']} tensors, "
        f"the largest {rows[0]['largest'] / MIB:.0f} MiB; "
        f"{DEVICES} emulated devices; Python {v['python']}, jax {v['jax']}.",
        "",
        "Peak resident memory (mapped pages included) over what the process held before. "
        f"Over: what exceeds the shards, in largest tensors; the bar is {BAR}. "
        "Devices of one host with the same values share memory where the CPU backend lets them.",
        "",
        "| Mesh | Way | Shards hold MiB | Peak MiB | Over | Seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        mesh = " x ".join(f"{k}={v}" for k, v in row["mesh"].items())
        lines.append(
            f"| {mesh} | {row['way']} | {row['shards'] / MIB:.0f} | {row['peak'] / MIB:.0f} "
            f"| {row['over']:.2f} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=9, help="of the model; 9 make 4 GB")
    parser.add_argument("--out", type=pathlib.Path, help="folder for load_memory.{md,json}")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        folder, axes, way = given.one
        print(json.dumps(measure(pathlib.Path(folder), json.loads(axes), way)))
        return 0
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write(folder, given.layers)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        rows = [one(folder, axes, way) for axes, way in RUNS]
    versions = {"python": platform.python_version(), "jax": metadata.version("jax")}
    report = {"bytes": size, "versions": versions, "rows": rows}
    print(markdown(report))
    if given.out is not None:
        (given.out / "load_memory.json").write_text(json.dumps(report, indent=1) + "\n")
        (given.out / "load_memory.md").write_text(markdown(report) + "\n")
    missed = [row for row in rows if row["way"] == "stream" and row["over"] > BAR]
    print("\n".join(f"over the bar: {row}" for row in missed))
    return bool(missed)


def one(folder: pathlib.Path, axes: dict[str, int], way: str) -> dict:
    arguments = ["--one", str(folder), json.dumps(axes), way]
    command = [sys.executable, "-m", "benchmarks.load_memory", *arguments]
    print(f"{axes} {way}", file=sys.stderr, flush=True)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
