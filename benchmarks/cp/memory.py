# SPDX-License-Identifier: Apache-2.0
"""Measures what each strategy holds beside its arguments, by the compiler's count; runs nothing.

python -m benchmarks.cp.memory --out benchmarks/results
"""

import argparse
import os
import pathlib
from importlib import metadata

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.progress import track

import jaxcp
from jaxcp.compile import compile_for, parse_target
from jaxcp.compile.report import MIB

HEADS, KV_HEADS, HEAD_DIM, WINDOW = 32, 8, 128, 4096
CONTEXTS = 1 << 15, 1 << 17, 1 << 19, 1 << 20
WIDER = 1 << 18  # tokens in all of a ring on more devices
STRATEGIES = {
    "Ring()": jaxcp.Ring(),
    "AllGather()": jaxcp.AllGather(),
    "AllGather(chunks=4)": jaxcp.AllGather(chunks=4),
    "Ulysses()": jaxcp.Ulysses(),
    "USP(ulysses=2)": jaxcp.USP(ulysses=2),
    "RingPassQ()": jaxcp.RingPassQ(),
    f"Halo(), window {WINDOW}": jaxcp.context_parallel.Halo(checked=False),
}


def held(strategy: jaxcp.context_parallel.Strategy, target: str, context: int) -> int:
    """Bytes of temporaries and of the result on one device, forward, in bfloat16."""
    devices = parse_target(target).mesh(seq=parse_target(target).size).devices.reshape(-1)
    mesh = Mesh(devices, ("seq",), axis_types=(AxisType.Explicit,))
    window = WINDOW if isinstance(strategy, jaxcp.context_parallel.Halo) else None

    def like(*width, dtype=jnp.bfloat16):
        sharding = NamedSharding(mesh, P(None, "seq"))
        return jax.ShapeDtypeStruct((1, context, *width), dtype, sharding=sharding)

    def attend(q, k, v, positions):
        q, k, v = (x.reshape(*x.shape[:2], -1, HEAD_DIM) for x in (q, k, v))
        out = jaxcp.context_parallel_attention(q, k, v, positions, strategy=strategy, window=window)
        return out.reshape(*out.shape[:2], -1)

    k = like(KV_HEADS * HEAD_DIM)
    arrays = like(HEADS * HEAD_DIM), k, k, like(dtype=jnp.int32)
    report = compile_for(attend, arrays, mesh)
    return report.temp_bytes + report.output_bytes


def table(first: str, columns: list[str], rows: dict[str, list[int]]) -> list[str]:
    lines = [f"| {first} | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name, sizes in rows.items():
        lines.append(f"| {name} | {' | '.join(f'{size / MIB:,.0f}' for size in sizes)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    parser.add_argument("--chip", default="rtx-pro-6000", help="a GPU of pallas_kernels.devices")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"  # devices are described, not there
    shards, lengths, numbers = 8, CONTEXTS, (2, 4, 8, 16)
    jobs = [(name, shards, length) for name in STRATEGIES for length in lengths]
    jobs += [("Ring()", n, n * each) for n in numbers for each in (CONTEXTS[0], WIDER // n)]
    sizes = {
        job: held(STRATEGIES[job[0]], f"{args.chip}:{job[1]}", job[2])
        for job in track(list(dict.fromkeys(jobs)), description="compiling")
    }
    kept = (HEADS + 2 * KV_HEADS) * HEAD_DIM * 2 // shards
    texts = [f"{length >> 10}K" for length in lengths]
    lines = [
        "# What attention holds beside its arguments",
        "",
        "`python -m benchmarks.cp.memory --out benchmarks/results`. MiB a device: temporaries and",
        "the result of one forward pass, as the compiler counts them. Nothing was run.",
        "",
        f"{args.chip}, {HEADS} query heads, {KV_HEADS} KV heads of {HEAD_DIM}, bfloat16, one row; "
        f"jax {jax.__version__}, jax-cuda13-plugin {metadata.version('jax-cuda13-plugin')}.",
        "",
        f"## {shards} devices",
        "",
        *table(
            "tokens in all",
            texts,
            {"q, k and v, for comparison": [kept * length for length in lengths]}
            | {name: [sizes[name, shards, length] for length in lengths] for name in STRATEGIES},
        ),
        "",
        "## Ring(), on more devices",
        "",
        *table(
            "devices",
            [str(n) for n in numbers],
            {
                f"{WIDER >> 10}K tokens in all": [sizes["Ring()", n, WIDER] for n in numbers],
                f"{CONTEXTS[0] >> 10}K tokens a device": [
                    sizes["Ring()", n, n * CONTEXTS[0]] for n in numbers
                ],
            },
        ),
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "cp_memory.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
