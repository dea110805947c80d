# SPDX-License-Identifier: Apache-2.0
"""The cost of a checkpoint to a run: python -m benchmarks.saving --mebibytes 256

Prints the seconds that a run waits for a save, those of copying the state to the host alone, those
until it is on the disk with its hashes, and those of reading it again.
"""

import argparse
import json
import pathlib
import tempfile
import time

import jax

from jaxcp.training import checkpoint


def seconds(action) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def measure(mebibytes: int) -> dict[str, float]:
    """Save a state of so many MiB twice, the first time to import and start threads."""
    keys = jax.random.split(jax.random.key(0), mebibytes // 4)
    state = {f"{i}": jax.random.normal(key, (1024, 1024)) for i, key in enumerate(keys)}
    state = jax.block_until_ready(jax.tree.map(lambda x: x.astype("float32"), state))
    change = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = jax.block_until_ready(change(state))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        with checkpoint.Saver(folder, keep=1) as saver:
            for step in (1, 2):
                waits = seconds(lambda step=step, state=state: saver.save(step, state))
                rest = seconds(saver.wait)
                state = jax.block_until_ready(change(state))  # as no copy of it is on the host
        copies = seconds(lambda: jax.tree.map(lambda x: x.copy(), jax.device_get(state)))
        reads = seconds(lambda: checkpoint.restore(folder, state))
    return {"waits": waits, "copies": copies, "on_disk": waits + rest, "reads": reads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mebibytes", type=int, default=256)
    size = parser.parse_args().mebibytes
    times = measure(size)
    print(json.dumps({"MiB": size} | {name: round(x, 3) for name, x in times.items()}))


if __name__ == "__main__":
    main()
