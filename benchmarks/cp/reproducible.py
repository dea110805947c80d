# SPDX-License-Identifier: Apache-2.0
"""The cost of `FixedOrder()`: time, memory and bytes beside the other strategies, on CPU.

    python -m benchmarks.cp.reproducible --out benchmarks/results   # minutes, on a quiet machine
    python -m benchmarks.cp.reproducible --smoke                    # its times mean nothing

Four emulated devices, float32, causal, zigzag. Plain and reproducible take turns, so that a busy
moment hits both; a ratio is of medians. Memory is what the compiler reserves for temporaries, sent
what a device sends by the compiled program: forward and backward are one program, and what both
gather is gathered once. Writes cp_reproducible.json and cp_reproducible.md.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxcp
from jaxcp.compile import collectives
from jaxcp.context_parallel import Traffic

SHARDS, HEADS, KV_HEADS, HEAD_DIM, TOKENS = 4, 8, 4, 64, 4096
STRATEGIES = (jaxcp.Ring, jaxcp.AllGather, jaxcp.Ulysses)
MIB = 1 << 20


def inputs(tokens: int):
    """q, k, v, the output's cotangent and positions, in zigzag order on the mesh in scope."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = HEADS, KV_HEADS, KV_HEADS, HEADS
    arrays = [
        jax.random.normal(key, (1, tokens, n, HEAD_DIM)) for key, n in zip(keys, heads, strict=True)
    ]
    arrays.append(jnp.arange(tokens, dtype=jnp.int32)[None])
    return jax.device_put(jaxcp.Zigzag().permute(arrays, SHARDS), P(None, "seq"))


def programs(strategy, arrays):
    """`forward` and `forward + backward` of `(q, k, v, dout, positions)`, compiled."""

    def forward(q, k, v, _, positions):
        return jaxcp.context_parallel_attention(q, k, v, positions, strategy=strategy)

    def both(q, k, v, dout, positions):
        out, pull = jax.vjp(lambda q, k, v: forward(q, k, v, None, positions), q, k, v)
        return out, *pull(dout)

    return {
        "forward": jax.jit(forward).lower(*arrays).compile(),
        "forward + backward": jax.jit(both).lower(*arrays).compile(),
    }


def sent(compiled) -> int:
    """Bytes that a device sends."""
    found = collectives(compiled.as_text())
    return sum(Traffic(c.kind, c.count, c.bytes, SHARDS).sent for c in found)


def seconds(functions, arrays, rounds: int) -> list[float]:
    """Median of each function, called in turn."""
    for function in functions:
        jax.block_until_ready(function(*arrays))
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, samples in zip(functions, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function(*arrays))
            samples.append(time.perf_counter() - start)
    return [statistics.median(samples) for samples in times]


def compare(kind, arrays, rounds: int) -> list[dict]:
    """A row for each program of a strategy; raises where the two results are not alike."""
    plain, same = (programs(x, arrays) for x in (kind(), jaxcp.FixedOrder()))
    rows = []
    for name in plain:
        pair = plain[name], same[name]
        for a, b in zip(*(jax.tree.leaves(f(*arrays)) for f in pair), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-4)
        row = {"strategy": kind.__name__, "program": name}
        row["seconds"] = seconds(pair, arrays, rounds)
        row["ratio"] = row["seconds"][1] / row["seconds"][0]
        row["temp_bytes"] = [f.memory_analysis().temp_size_in_bytes for f in pair]
        rows.append(row | {"sent_bytes": [sent(f) for f in pair]})
    return rows


def markdown(report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = ["# What reproducible attention costs, on CPU", "", report["shape"], "", versions, ""]
    lines += [
        "| strategy | | plain, s | reproducible, s | ratio | temporaries, MiB a device: plain | "
        "reproducible | sent, MiB a device: plain | reproducible |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for row in report["rows"]:
        cells = [row["strategy"], row["program"], *(f"{x:.3f}" for x in row["seconds"])]
        cells.append(f"{row['ratio']:.2f}")
        cells += [f"{x / MIB:,.1f}" for x in (*row["temp_bytes"], *row["sent_bytes"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=TOKENS, help="a multiple of 16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--smoke", action="store_true", help="256 tokens, one round")
    parser.add_argument("--out", type=pathlib.Path, help="folder for cp_reproducible.json and .md")
    args = parser.parse_args()
    jaxcp.emulate_devices(SHARDS)
    tokens, rounds = (256, 1) if args.smoke else (args.tokens, args.rounds)
    shape = f"{SHARDS} emulated devices, {tokens:,} tokens, {HEADS} heads ({KV_HEADS} KV) of "
    report = {
        "shape": f"{shape}{HEAD_DIM}, float32, causal; medians of {rounds}, in turns",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jax.lib.__version__,
            "cores": os.cpu_count(),
        },
    }
    # one axis: over others, of one device each, gradients would be summed in name
    mesh = jax.make_mesh((SHARDS,), ("seq",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        arrays = inputs(tokens)
        report["rows"] = [row for kind in STRATEGIES for row in compare(kind, arrays, rounds)]
    print(markdown(report))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "cp_reproducible.json").write_text(json.dumps(report, indent=1) + "\n")
        (args.out / "cp_reproducible.md").write_text(markdown(report) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
