# SPDX-License-Identifier: Apache-2.0
"""Hy3-295B at 256K tokens on machines that are not here: what a device holds and sends.

The last piece of a prompt and a step of decoding, compiled by the chip's own compiler for each
mesh; nothing runs. Memory is what the compiler allots, what is sent the most that any choice of
experts can need, beside what the algorithm says must be sent. The first layer is dense, each other
one a mixture of experts; all 80 are compiled, as one program of two blocks.

    python -m benchmarks.model_memory --out benchmarks/results

Rows in the folder that are not compiled again stay, so one target a run makes the same report.
"""

import dataclasses
import datetime
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from rich.progress import track

import jaxcp
from benchmarks import train_memory
from benchmarks.tables import table, versions, write
from jaxcp.compile import compile_for, decode_program, parse_target, prefill_program
from jaxcp.layers.expert_exchange import capacity
from jaxcp.models import config_from_dict

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
GIB, MIB = 1 << 30, 1 << 20
KEY = ("target", "layers", "program", "context", "new")


@dataclasses.dataclass
class Args:
    out: pathlib.Path | None = None
    """A folder for model_memory.md and model_memory.json; None prints alone."""
    targets: tuple[str, ...] = ()
    """Targets among those that the report lists; none for all."""
    layers: tuple[int, ...] = (HY3["num_hidden_layers"],)
    context: int = 262_144
    """Tokens that the cache is made for."""
    train: bool = False
    """Compile steps of training instead (`train_memory`)."""
    chunk: int | None = 16_384
    """Tokens of the last piece of a prompt of `context`, the others in the cache already; None
    prefills all at once."""


def in_bfloat16(fields: dict[str, Any]):
    """The model of a config.json in bfloat16, with shapes in the place of arrays."""
    model = jaxcp.abstract_model(config_from_dict(fields | {"dtype": "bfloat16"}))

    def stored(leaf):
        if not isinstance(leaf, nnx.Param):
            return leaf  # a router's selection bias stays float32
        return leaf.replace(jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16))

    return jax.tree.map(stored, model, is_leaf=lambda x: isinstance(x, nnx.Variable))


def row(target: str, layers: int, program: str, args: Args) -> dict[str, Any]:
    """One compilation of Hy3; `refused` says why there are no numbers."""
    fields = HY3 | {"num_hidden_layers": layers}
    return row_of(fields, target, MESHES[target], program, args.context, args.chunk)


def row_of(
    fields: dict[str, Any], target: str, axes: dict[str, int], program: str, context: int,
    chunk: int | None,
) -> dict[str, Any]:  # fmt: skip
    """One compilation of the model of a config.json; `refused` says why there are no numbers."""
    mesh = parse_target(target).mesh(**axes)
    options = {"max_len": context, "rules": jaxcp.Rules(experts="seq")}
    model, layers, new = in_bfloat16(fields), fields["num_hidden_layers"], 1
    if program == "prefill":
        new = chunk or context
        sizes = {"tokens": new, "held": context - new}
        fn, inputs = prefill_program(model, mesh, **sizes, **options)
    else:
        fn, inputs = decode_program(model, mesh, **options)
    record: dict[str, Any] = {"target": target, "mesh": axes, "layers": layers, "program": program}
    record["piece"] = inputs[2].shape[-1] if program == "prefill" else 1
    tpu = mesh.devices.flat[0].platform == "tpu"
    compiler = versions("jax", "libtpu" if tpu else "jax-cuda13-plugin")
    record |= {"context": context, "new": new, "compiler": compiler}
    try:
        report = compile_for(fn, inputs, mesh)
    except jax.errors.JaxRuntimeError as error:
        return record | {"refused": str(error).strip().splitlines()[0][:200]}
    sizes = ("argument_bytes", "output_bytes", "temp_bytes", "total_bytes", "hbm_bytes")
    record |= {name: getattr(report, name) for name in sizes}
    sent = report.collectives
    return record | {
        "seconds": round(report.compile_seconds, 1),
        "collectives": None if sent is None else {c.kind: [c.count, c.bytes] for c in sent},
    }


def must_send(r: dict[str, Any]) -> dict[str, int] | None:
    """Bytes a device by kind of collective, from the algorithm: what exceeds them is unexpected.

    `piece` are the tokens of the program: a turn is cut into pieces of few widths a shard
    (`jaxcp.inference.turns`), so that one of 16,384 may be two of 8,192.

    A piece of a prompt that is short beside its cache passes queries round, experts exchange in as
    many rounds as the worst choice needs. A step of decoding sends a few rows a layer. None where
    no formula is written: a prompt in one piece.
    """
    seq, tokens, c = r["mesh"]["seq"], r["piece"] // r["mesh"]["seq"], HY3
    sparse = r["layers"] - c["first_k_dense_replace"]
    if r["program"] == "decode":
        return {"all-gather": 0, "all-reduce": 0}  # under the allowance of `unexpected`
    if r["new"] * 2 > r["context"]:
        return None
    d, k, heads = c["hidden_size"], c["num_experts_per_tok"], c["num_attention_heads"]
    heads //= r["mesh"]["model"]
    stream = tokens * d * 2  # bfloat16
    # attention and dense feed-forward or shared expert; routed experts are summed in float32
    sent = {"all-reduce": r["layers"] * 2 * stream + sparse * 2 * stream}
    if seq == 1:
        return sent
    queries, answers = c["head_dim"] * 2, (c["head_dim"] + 1) * 4  # outputs and lse in float32
    sent["all-gather"] = r["layers"] * r["piece"] * heads * queries
    room = capacity(tokens * k, seq)
    rounds = -(-min(tokens * k, tokens * c["num_experts"] // seq) // room)
    exchange = rounds * seq * room * (2 * d * 2 + 4)  # there and back, and the experts' numbers
    sent["all-to-all"] = r["layers"] * r["piece"] * heads * answers + sparse * exchange
    return sent


def unexpected(r: dict[str, Any]) -> str:
    """Kinds that send more than `must_send` says: by over 1 % and a MiB a layer."""
    return surplus(r, must_send(r))


def surplus(r: dict[str, Any], expected: dict[str, int] | None) -> str:
    """Kinds that send more than `expected` bytes: by over 1 % and a MiB a layer."""
    kinds = r["collectives"]
    if expected is None or kinds is None:
        return "not compared"
    over = {kind: size - expected.get(kind, 0) for kind, (_, size) in kinds.items()}
    more = [
        f"{kind} {size / MIB:,.1f} MiB more"
        for kind, size in over.items()
        if kind not in expected or size > 0.01 * expected[kind] + r["layers"] * MIB
    ]
    return ", ".join(more) or "none"


COLUMNS = ["arguments GiB", "temporaries GiB", "together GiB", "of the device's", "left GiB"]
COLUMNS += ["sent: times, MiB a device", "unexpected", "seconds"]


def compiled(rows: list[dict[str, Any]]) -> str:
    """Table of all that was compiled."""
    head = ["target", "mesh", "layers", "program"]
    lines = [
        [r["target"], mesh_of(r), str(r["layers"]), program_of(r), *cells(r, must_send)]
        for r in rows
    ]
    return table(head + COLUMNS, lines)


def program_of(r: dict[str, Any]) -> str:
    """The program of a row, and how many tokens it adds."""
    return f"{r['program']} {r['piece']:,}"


def mesh_of(r: dict[str, Any]) -> str:
    """The mesh of a row in words."""
    return " ".join(f"{axis}={size}" for axis, size in r["mesh"].items())


def cells(r: dict[str, Any], must_send: Callable) -> list[str]:
    """Cells of `COLUMNS`, or the reason why there are none."""
    if "refused" in r:
        return [r["refused"]]
    sizes = [f"{r[f'{x}_bytes'] / GIB:.2f}" for x in ("argument", "temp", "total")]
    sizes.append(f"{r['total_bytes'] / r['hbm_bytes']:.0%}")
    left = (r["hbm_bytes"] - r["total_bytes"]) / GIB
    sizes.append(f"{left:.1f}" if left >= 0 else f"**{left:.1f}: does not fit**")
    kinds = r["collectives"]
    sent = "not read"
    if kinds is not None:
        listed = (f"{k} {count} x, {size / MIB:,.1f}" for k, (count, size) in kinds.items())
        sent = ", ".join(listed)
    return [*sizes, sent, surplus(r, must_send(r)), str(r["seconds"])]


def report(rows: list[dict[str, Any]], args: Args) -> str:
    made = "; ".join(sorted({r["compiler"] for r in rows}))
    return f"""# Hy3-295B at {args.context:,} tokens, compiled with no device

`python -m benchmarks.model_memory`, {made}, {datetime.date.today()}. Bytes a device;
weights and cache in bfloat16; a cache for {args.context:,} tokens, of which prefill adds so many of
the last {args.chunk or args.context:,}, as a piece of them has, decode the last token. Layer 1
is dense, the others are mixtures of 192 experts. Memory is what the compiler allots to the program;
what a runtime keeps beside it is not in it.

Sent: times and MiB, all that the program may send: of the exchange of experts every round, which
only the worst choice of experts needs. Unexpected: a kind that the algorithm has not, or one that
sends over 1 % and 1 MiB a layer more than it must (`must_send`).

{compiled(rows)}"""


def in_order(r: dict[str, Any]) -> tuple:
    return list(MESHES).index(r["target"]), r["layers"], r["program"]


def main(args: Args) -> None:
    jax.config.update("jax_platforms", "cpu")  # devices are described, not there
    if args.train:
        train_memory.main(args.out, HY3, args.targets)
        return
    kept = None if args.out is None else args.out / "model_memory.json"
    records = []
    if kept is not None and kept.exists():
        records = json.loads(kept.read_text())
    todo = [
        (t, n, p)
        for t in args.targets or MESHES
        for n in args.layers
        for p in ("prefill", "decode")
    ]
    for job in track(todo, description="compiling Hy3-295B"):
        new = row(*job, args)
        others = [r for r in records if any(r[k] != new[k] for k in KEY)]
        records = sorted([*others, new], key=in_order)
        if kept is not None:  # after each: a compilation may take minutes
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(records, indent=1) + "\n")
    write(args.out, "model_memory.md", report(records, args))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
