# SPDX-License-Identifier: Apache-2.0
"""Host memory of `jaxcp.load` over that of the shards: a 4 GB checkpoint on 8 emulated devices.

    python -m benchmarks.load_memory --out benchmarks/results       # 4 GB of disk, 5 minutes
    python -m benchmarks.load_memory --layers 1                     # smaller

Each load has a process of its own. Its peak is the kernel's (VmHWM, pages of mapped files
included) over what the process held before, with JAX started and the model's shapes traced. What
shards hold are the distinct buffers of its devices. The bar: a peak of at most 1.5 of the largest
tensor over what shards hold. Exits with 1 above it.
"""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

import ml_dtypes
import numpy as np
import tyro

from benchmarks import tables

DEVICES, BAR, MIB, FILE_BYTES = 8, 1.5, 1 << 20, 1_000_000_000
MESHES = ({"expert": 8}, {"expert": 2, "model": 4}, {"seq": 2, "model": 4}, {"seq": 8})


@dataclasses.dataclass
class Args:
    out: pathlib.Path | None = None
    """A folder for load_memory.md; None prints alone."""
    layers: int = 9
    """Layers of the model; 9 make 4 GB."""


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


def measure(folder: pathlib.Path, axes: dict[str, int]) -> dict:
    """One load, in this process."""
    import jax

    import jaxcp
    from jaxcp import weights
    from jaxcp.mesh import MeshConfig
    from jaxcp.weights.files import open_checkpoint

    weights.abstract_model(jaxcp.load_config(folder))
    with jax.set_mesh(MeshConfig(**axes).make()):
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before, start = status("VmRSS"), time.monotonic()
        model, _ = jaxcp.load(folder)
        arrays = jax.block_until_ready(jax.tree.leaves(model))
        seconds, peak = time.monotonic() - start, status("VmHWM") - before
    shards = [s.data for x in arrays for s in x.addressable_shards]
    nbytes = sum({x.unsafe_buffer_pointer(): x.nbytes for x in shards}.values())
    checkpoint = open_checkpoint(folder)
    sizes = [checkpoint.read(name).nbytes for name in checkpoint.shapes]
    row = {"mesh": axes, "seconds": seconds, "peak": peak, "shards": nbytes, "sizes": sizes}
    return row | {"over": (peak - nbytes) / max(sizes)}


def markdown(rows: list[dict]) -> str:
    sizes = rows[0]["sizes"]
    lines = [
        [
            " x ".join(f"{k}={v}" for k, v in row["mesh"].items()),
            f"{row['shards'] / MIB:.0f}",
            f"{row['peak'] / MIB:.0f}",
            f"{row['over']:.2f}",
            f"{row['seconds']:.1f}",
        ]
        for row in rows
    ]
    parts = [
        "# Host memory of loading",
        "`python -m benchmarks.load_memory --out benchmarks/results`: "
        f"{sum(sizes) / 1e9:.2f} GB in {len(sizes)} tensors, the largest {max(sizes) / MIB:.0f} "
        f"MiB; {DEVICES} emulated devices; {tables.versions('jax')}.",
        "Peak resident memory (mapped pages included) over what the process held before. "
        f"Over: what exceeds the shards, in largest tensors; the bar is {BAR}. "
        "Devices of one host with the same values share memory where the CPU backend lets them.",
        tables.table(("Mesh", "Shards hold MiB", "Peak MiB", "Over", "Seconds"), lines),
    ]
    return "\n\n".join(parts)


def main(args: Args) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    fresh = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write(folder, args.layers)
        with ProcessPoolExecutor(1, fresh, max_tasks_per_child=1) as one:
            rows = list(one.map(measure, [folder] * len(MESHES), MESHES))
    tables.write(args.out, "load_memory.md", markdown(rows))
    return int(any(row["over"] > BAR for row in rows))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
