# SPDX-License-Identifier: Apache-2.0
"""Hy3-295B at 256K tokens on machines that are not here: what a device holds and sends.

The last piece of a prompt and a step of decoding, compiled by the chip's own compiler for each
mesh; nothing runs. Memory is what the compiler allots, what is sent the most that any choice of
experts can need. `--layers 1 2 80`: the first layer is dense, each other one a mixture of experts,
80 are the whole model.

    python -m benchmarks.model_memory --out benchmarks/results
"""

import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from rich.progress import track

import jaxcp
from jaxcp.models import config_from_dict
from jaxcp.plan import compile_for, decode_program, parse_target, prefill_program

# target -> the mesh over its devices; experts lie on the devices that hold the sequence
MESHES = {
    "v5p:4x4x4": {"seq": 8, "model": 8},
    "tpu7x:4x4x2": {"seq": 8, "model": 8},
    "rtx-pro-6000:8": {"seq": 1, "model": 8},
    "h200:8": {"seq": 2, "model": 4},
}
HY3: dict[str, Any] = {
    "model_type": "hy_v3",
    "vocab_size": 120832,
    "hidden_size": 4096,
    "num_hidden_layers": 80,
    "first_k_dense_replace": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 13312,
    "moe_intermediate_size": 1536,
    "num_experts": 192,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "router_scaling_factor": 2.826,
    "route_norm": True,
    "moe_router_use_sigmoid": True,
    "moe_router_enable_expert_bias": True,
    "qk_norm": True,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 11158840.0},
    "max_position_embeddings": 262144,
    "enable_moe_fp32_combine": False,
    "dtype": "bfloat16",
}
GIB = 1 << 30


@dataclasses.dataclass
class Args:
    out: pathlib.Path | None = None
    """A folder for model_memory.md and model_memory.json; None prints alone."""
    targets: tuple[str, ...] = tuple(MESHES)
    layers: tuple[int, ...] = (1, 2, 3)
    context: int = 262_144
    """Tokens that the cache is made for."""
    chunk: int | None = 16_384
    """Tokens of the last piece of a prompt of `context`, the others in the cache already; None
    prefills all at once."""


def model_of(layers: int):
    """Hy3 of so many layers in bfloat16, with shapes in the place of arrays."""
    model = jaxcp.abstract_model(config_from_dict(HY3 | {"num_hidden_layers": layers}))

    def stored(leaf):
        if not isinstance(leaf, nnx.Param):
            return leaf  # a router's selection bias stays float32
        return leaf.replace(jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16))

    return jax.tree.map(stored, model, is_leaf=lambda x: isinstance(x, nnx.Variable))


def row(target: str, layers: int, program: str, args: Args) -> dict[str, Any]:
    """One compilation; `refused` says why there are no numbers."""
    axes = MESHES[target]
    mesh = parse_target(target).mesh(**axes)
    options = {"max_len": args.context, "experts": "seq"}
    if program == "prefill":
        new = args.chunk or args.context
        sizes = {"tokens": new, "held": args.context - new}
        fn, inputs = prefill_program(model_of(layers), mesh, **sizes, **options)
    else:
        fn, inputs = decode_program(model_of(layers), mesh, **options)
    found: dict[str, Any] = {"target": target, "mesh": axes, "layers": layers, "program": program}
    try:
        report = compile_for(fn, inputs, mesh)
    except jax.errors.JaxRuntimeError as error:
        return found | {"refused": str(error).strip().splitlines()[0][:200]}
    sizes = ("argument_bytes", "output_bytes", "temp_bytes", "total_bytes", "hbm_bytes")
    found |= {name: getattr(report, name) for name in sizes}
    sent = report.collectives
    return found | {
        "seconds": round(report.compile_seconds, 1),
        "collectives": None if sent is None else {c.kind: [c.count, c.bytes] for c in sent},
    }


def table(rows: list[dict[str, Any]]) -> str:
    head = ["target", "mesh", "layers", "program", "arguments GiB", "temporaries GiB"]
    head += ["together GiB", "of the device's", "sent MiB a device"]
    lines = [head, ["---"] * len(head)]
    for r in rows:
        mesh = " ".join(f"{axis}={size}" for axis, size in r["mesh"].items())
        first = [r["target"], mesh, str(r["layers"]), r["program"]]
        if "refused" in r:
            lines.append([*first, r["refused"], "", "", "", ""])
            continue
        sizes = [f"{r[f'{x}_bytes'] / GIB:.2f}" for x in ("argument", "temp", "total")]
        share = f"{r['total_bytes'] / r['hbm_bytes']:.0%}"
        kinds = r["collectives"]
        sent = (
            "not read"
            if kinds is None
            else ", ".join(
                f"{kind} {count} x, {size / (1 << 20):,.1f}"
                for kind, (count, size) in kinds.items()
            )
        )
        lines.append([*first, *sizes, share, sent])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(args: Args) -> None:
    todo = [(t, n, p) for t in args.targets for n in args.layers for p in ("prefill", "decode")]
    rows = [row(*job, args) for job in track(todo, description="compiling Hy3-295B")]
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    text = f"# Hy3-295B at {args.context:,} tokens, compiled with no device\n\n"
    text += f"`python -m benchmarks.model_memory --layers {' '.join(map(str, args.layers))}`, "
    text += (
        f"{versions}, {datetime.date.today()}. Bytes a device; weights and cache in bfloat16.\n\n"
    )
    text += table(rows) + "\n"
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "model_memory.md").write_text(text)
        (args.out / "model_memory.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
