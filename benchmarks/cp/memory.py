# SPDX-License-Identifier: Apache-2.0
"""Measures what each strategy holds beside its arguments, by the compiler's count; runs nothing.

python -m benchmarks.cp.memory --out benchmarks/results
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.progress import track

import jaxcp
from benchmarks.tables import table, versions, write
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
    "FixedOrder()": jaxcp.FixedOrder(),
    f"Halo(), window {WINDOW}": jaxcp.context_parallel.Halo(checked=False),
}


@dataclasses.dataclass
class Args:
    out: pathlib.Path | None = None
    """A folder for cp_memory.md; None prints alone."""
    chip: str = "rtx-pro-6000"
    """A GPU of pallas_kernels.devices."""


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


def mib(name: str, sizes) -> list[str]:
    return [name, *(f"{size / MIB:,.0f}" for size in sizes)]


def main(args: Args) -> None:
    jax.config.update("jax_platforms", "cpu")  # devices are described, not there
    shards, lengths, numbers = 8, CONTEXTS, (2, 4, 8, 16)
    jobs = [(name, shards, length) for name in STRATEGIES for length in lengths]
    jobs += [("Ring()", n, n * each) for n in numbers for each in (CONTEXTS[0], WIDER // n)]
    sizes = {
        job: held(STRATEGIES[job[0]], f"{args.chip}:{job[1]}", job[2])
        for job in track(list(dict.fromkeys(jobs)), description="compiling")
    }
    kept = (HEADS + 2 * KV_HEADS) * HEAD_DIM * 2 // shards
    by_length = [mib("q, k and v, for comparison", [kept * length for length in lengths])]
    by_length += [mib(x, [sizes[x, shards, length] for length in lengths]) for x in STRATEGIES]
    whole = mib(f"{WIDER >> 10}K tokens in all", [sizes["Ring()", n, WIDER] for n in numbers])
    each = [sizes["Ring()", n, n * CONTEXTS[0]] for n in numbers]
    parts = [
        "# What attention holds beside its arguments",
        "`python -m benchmarks.cp.memory --out benchmarks/results`. MiB a device: temporaries and\n"
        "the result of one forward pass, as the compiler counts them. Nothing was run.",
        f"{args.chip}, {HEADS} query heads, {KV_HEADS} KV heads of {HEAD_DIM}, bfloat16, one row; "
        f"{versions('jax', 'jax-cuda13-plugin')}.",
        f"## {shards} devices",
        table(["tokens in all", *(f"{length >> 10}K" for length in lengths)], by_length),
        "## Ring(), on more devices",
        table(
            ["devices", *map(str, numbers)],
            [whole, mib(f"{CONTEXTS[0] >> 10}K tokens a device", each)],
        ),
    ]
    write(args.out, "cp_memory.md", "\n\n".join(parts))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
