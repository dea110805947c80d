# SPDX-License-Identifier: Apache-2.0
"""Attention on CPU, where tests and demo run: beside dense XLA and the `ringattention` package.

    python benchmarks/cpu_attention.py                      # a few minutes, on a quiet machine
    python benchmarks/cpu_attention.py --tokens 1024 2048   # only these
    python benchmarks/cpu_attention.py --smoke              # seconds; its times mean nothing

Forward and backward, float32, causal. Contenders take turns, so that a busy moment hits both; a
ratio is of medians. Memory is what the compiler reserves for temporaries. `ringattention` comes
with `pip install ringattention einops`; without it its row says so. Exits with 1 below a bar.
"""

import argparse
import functools
import importlib
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import flash_attention

BATCH, HEADS, HEAD_DIM = 1, 8, 64
TOKENS = (1024, 2048, 4096, 8192, 16384)
RING = dict(shards=4, tokens=2048, heads=4, head_dim=64)
DENSE_BAR, FROM, RING_BAR = 1.0, 2048, 0.6
MIB = 1 << 20


def ours(q, k, v):
    return flash_attention(q, k, v, implementation="xla")[0]


def dense(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")


def with_gradients(attend):
    """`attend` and its gradient, as one compiled function of q, k, v and the output's cotangent."""

    @jax.jit
    def both(q, k, v, g):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(g)

    return both


def inputs(tokens, heads, head_dim):
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (BATCH, tokens, heads, head_dim)) for key in keys]


def medians(functions, arrays, rounds):
    """Median seconds of each function, called in turn."""
    for function in functions:
        jax.block_until_ready(function(*arrays))
    seconds = [[] for _ in functions]
    for _ in range(rounds):
        for function, times in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function(*arrays))
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def against_dense(tokens, rounds):
    arrays = inputs(tokens, HEADS, HEAD_DIM)
    compiled = [with_gradients(f).lower(*arrays).compile() for f in (ours, dense)]
    blockwise, whole = (c.memory_analysis().temp_size_in_bytes for c in compiled)
    row = {"tokens": tokens, "temp_bytes": blockwise, "dense_temp_bytes": whole}
    if theirs > 0.6 * available_bytes():
        (row["seconds"],) = medians(compiled[:1], arrays, rounds)
        return row | {"note": "the dense scores do not fit in this machine's memory: not run"}
    row["seconds"], row["dense_seconds"] = medians(compiled, arrays, rounds)
    return row | {"ratio": row["seconds"] / row["dense_seconds"]}


def available_bytes():
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def against_ringattention(rounds, tokens):
    """Four emulated devices; ours in its zigzag layout, theirs contiguous at its best chunks."""
    import jaxcp

    heads, head_dim = RING["heads"], RING["head_dim"]
    arrays = inputs(tokens, heads, head_dim)
    mesh = jaxcp.make_mesh(seq=RING["shards"])
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P(None, "seq"))
        order = jaxcp.Zigzag().order(tokens, RING["shards"])
        positions = jax.device_put(jnp.asarray(order, jnp.int32)[None], sharding)
        laid_out = jax.device_put([x[:, order] for x in arrays], sharding)
        theirs = jax.device_put(arrays, sharding)
        ring = with_gradients(functools.partial(zigzag_ring, positions=positions))
        row = {"shards": RING["shards"], "tokens": tokens, "rounds": rounds}
        try:
            import_ringattention()
        except (ImportError, AttributeError) as error:
            (row["seconds"],) = medians([ring], laid_out, rounds)
            return row | {"note": f"ringattention cannot be imported: {error}"}
        chunks = [c for c in (64, 128, 256, 512) if c <= tokens // RING["shards"]]
        others = {c: with_gradients(ringattention(c)) for c in chunks}
        expected = next(iter(others.values()))(*theirs)
        for x, y in zip(expected, ring(*laid_out), strict=True):
            np.testing.assert_allclose(np.asarray(x)[:, order], y, atol=2e-5, rtol=2e-4)
        call = [lambda *_, f=f: f(*theirs) for f in others.values()]
        row["seconds"], *seconds = medians([ring, *call], laid_out, rounds)
    best = min(zip(seconds, others, strict=True))
    row |= {"their_seconds": best[0], "their_chunk": best[1]}
    return row | {"ratio": row["seconds"] / best[0]}


def import_ringattention():
    """ringattention 0.1.2 asks `jax.lib` for `xla_bridge`, which jax 0.10 no longer has there."""
    import jax.extend.backend

    if not hasattr(jax.lib, "xla_bridge"):
        jax.lib.xla_bridge = jax.extend.backend  # get_backend() is all that it takes of it
    importlib.import_module("ringattention.ringattention_jax")


def zigzag_ring(q, k, v, positions):
    import jaxcp

    return jaxcp.context_parallel_attention(q, k, v, positions, implementation="xla")


def ringattention(chunk):
    from ringattention.ringattention_jax import ring_attention

    options = dict(
        causal_block_size=1,
        query_chunk_size=chunk,
        key_chunk_size=chunk,
        deterministic=True,
        dropout_rng=None,
        attn_pdrop=0.0,
        dtype=jnp.float32,
        policy=jax.checkpoint_policies.nothing_saveable,
        precision=None,
        prevent_cse=True,
    )
    spec = P(None, "seq")

    def local(q, k, v):
        return ring_attention(q, k, v, None, None, None, "seq", True, options)

    return jax.shard_map(local, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)


def in_a_process(arguments):
    """The number of emulated devices is settled once a process: the ring has one of its own."""
    command = [sys.executable, __file__, "--ring", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def markdown(report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = ["# Attention on CPU, forward and backward", "", versions, ""]
    lines += ["| tokens | ours, s | dense, s | ratio | bar | ours, MiB | dense, MiB | |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in report["dense"]:
        bar = f"{DENSE_BAR}" if row["tokens"] >= FROM else "none"
        cells = [
            f"{row['tokens']:,}",
            f"{row['seconds']:.3f}",
            f"{row['dense_seconds']:.3f}" if "ratio" in row else "",
            f"{row['ratio']:.2f}" if "ratio" in row else "",
            bar,
            f"{row['temp_bytes'] / MIB:,.1f}",
            f"{row['dense_temp_bytes'] / MIB:,.1f}",
            row.get("note", ""),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if ring := report.get("ring"):
        lines += [
            "",
            f"A ring of {ring['shards']}, S{ring['tokens']} H4 D64: {ring['seconds']:.4f} s",
        ]
        lines[-1] += (
            f"; `ringattention`, chunks of {ring['their_chunk']}: {ring['their_seconds']:.4f} s; "
            f"ratio {ring['ratio']:.2f}, bar {RING_BAR}"
            if "ratio" in ring
            else f"; {ring['note']}"
        )
    return "\n".join(lines)


def missed(report) -> list[str]:
    lines = [
        f"{row['tokens']} tokens: {row['ratio']:.2f} of dense"
        for row in report["dense"]
        if row["tokens"] >= FROM and row.get("ratio", 0) > DENSE_BAR
    ]
    if (ring := report.get("ring")) and ring.get("ratio", RING_BAR + 1) > RING_BAR:
        lines.append(f"ring: {ring.get('ratio', 'not compared')}")
    return lines


def versions() -> dict:
    names = {"jax": jax.__version__, "jaxlib": jax.lib.__version__}
    for name in ("ringattention", "flax"):
        try:
            names[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            names[name] = "not installed"
    return {"python": platform.python_version(), **names, "cores": os.cpu_count()}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="tiny, two rounds")
    parser.add_argument("--ring", action="store_true", help="only the ring, as a line of JSON")
    parser.add_argument("--out", type=pathlib.Path, help="folder for cpu.json and cpu.md")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    rounds = 2 if args.smoke else args.rounds
    if args.ring:
        jax.config.update("jax_num_cpu_devices", RING["shards"])
        tokens = 256 if args.smoke else RING["tokens"]
        print(json.dumps(against_ringattention(4 * rounds, tokens)))
        return 0
    report = {
        "versions": versions(),
        "dense": [against_dense(t, rounds) for t in ((256,) if args.smoke else args.tokens)],
        "ring": in_a_process(["--smoke"] if args.smoke else ["--rounds", str(rounds)]),
    }
    print(markdown(report))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "cpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (args.out / "cpu.md").write_text(markdown(report) + "\n")
    for line in (bars := missed(report)):
        print(f"missed: {line}", file=sys.stderr)
    return int(bool(bars))


if __name__ == "__main__":
    sys.exit(main())
