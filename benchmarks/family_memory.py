# SPDX-License-Identifier: Apache-2.0
"""A layer of each kind of published models at 256K tokens on machines that are not here.

The last piece of a prompt and a step of decoding, as in `model_memory`: what the compiler allots,
and what is sent beside what the algorithms say. So every shape of these models compiles, and no
layer sends what it need not.

    python -m benchmarks.family_memory --out benchmarks/results

Rows in the folder that are not compiled again stay.
"""

import dataclasses
import datetime
import json
import pathlib
from typing import Any

import jax
import tyro
from rich.progress import track

from benchmarks.model_memory import COLUMNS, cells, in_bfloat16, mesh_of, program_of, row_of
from benchmarks.published_sizes import SIZES
from benchmarks.tables import table, write
from jaxcp.layers.expert_exchange import capacity
from jaxcp.layers.gated_delta import DeltaLayer
from jaxcp.layers.mla import LatentAttention
from jaxcp.layers.moe import MoE

DEVICES = {"v5p:4x4x4": 64, "tpu7x:4x4x2": 64, "rtx-pro-6000:8": 8}
CONTEXT, PIECE = 262_144, 16_384
KEY = ("model", "target", "program")


@dataclasses.dataclass
class Args:
    out: pathlib.Path | None = None
    """A folder for family_memory.md and family_memory.json; None prints alone."""
    targets: tuple[str, ...] = ()
    """Targets among those that the report lists; none for all."""
    models: tuple[str, ...] = ()
    """Models among `published_sizes.SIZES`; none for all."""


def mesh_for(model: str, target: str) -> dict[str, int]:
    """Lay as many devices along `model` as divide the heads of keys, at most 8, the rest `seq`."""
    fields = SIZES[model]
    heads = min(8, fields["num_key_value_heads"])
    return {"seq": DEVICES[target] // heads, "model": heads}


def must_send(r: dict[str, Any]) -> dict[str, int] | None:
    """Bytes a device by kind of collective, from the algorithms, of the last piece of a prompt.

    Attention over everything passes queries round where that sends less, else keys; a recurrent
    layer gathers what its pieces sum up to; experts exchange in as many rounds as the worst choice
    needs. A step of decoding sends a few rows a layer, which is under the allowance.
    """
    if r["program"] == "decode":
        return {"all-gather": 0, "all-reduce": 0}
    model = in_bfloat16(SIZES[r["model"]])
    stream = r["piece"] // r["mesh"]["seq"] * model.config.embed_dim * 2
    total: dict[str, int] = {}
    for block in model.layers.stacks:  # none of these is alike another
        of_layer = [("all-reduce", stream), *of_experts(block.mlp, r, stream)]
        if r["mesh"]["seq"] > 1:
            of_layer += of_attention(block.attention, r)
        for kind, size in of_layer:
            total[kind] = total.get(kind, 0) + size
    return total


Sent = list[tuple[str, int]]
"""Kinds of collectives, and bytes a device."""


def of_experts(mlp: Any, r: dict[str, Any], stream: int) -> Sent:
    """Bytes that a feed-forward sends: its sum in bfloat16, that of routed experts in float32."""
    if not isinstance(mlp, MoE):
        return [("all-reduce", stream)]
    sent = [("all-reduce", 2 * stream + stream * bool(mlp.num_shared_experts))]
    seq = r["mesh"]["seq"]
    if seq == 1:
        return sent
    tokens, k, (d, count) = r["piece"] // seq, mlp.num_experts_per_tok, mlp.router.shape[-2:]
    room = capacity(tokens * k, seq)
    rounds = -(-min(tokens * k, tokens * count // seq) // room)
    return [*sent, ("all-to-all", rounds * seq * room * (2 * d * 2 + 4))]


def of_attention(layer: Any, r: dict[str, Any]) -> Sent:
    """Bytes that attention sends: queries and results, or keys; sums of pieces; or a window."""
    seq, split, tokens = r["mesh"]["seq"], r["mesh"]["model"], r["piece"] // r["mesh"]["seq"]
    slots, others = r["context"] // seq, seq - 1
    if isinstance(layer, DeltaLayer):
        d = layer.dims
        heads, channels = d.num_value_heads, d.num_value_heads * d.value_dim
        sums = heads // split * d.key_dim * (d.key_dim + d.value_dim) * 4
        inputs = (d.taps - 1) * (2 * d.num_key_heads * d.key_dim + channels) // split * 2
        return [("all-gather", 2 * seq * (sums + inputs))]  # a shard has two pieces
    if isinstance(layer, LatentAttention):
        row = (layer.dims.kv_rank + layer.dims.rope_dim) * 2
        return [("collective-permute", others * slots * (row + 4)), ("all-gather", 0)]
    heads, key = layer.q.shape[-2:]
    if layer.window is not None:  # a few rows of it, under the allowance of `surplus`
        return [("collective-permute", 0), ("all-gather", 0)]
    heads, keys, value = heads // split, layer.k.shape[-2] // split, layer.value_dim
    ring = slots * (keys * (key + value) * 2 + 4)
    if tokens * (heads * (key * 2 + 4 * (value + 1)) + 4) > ring:
        return [("collective-permute", others * ring), ("all-gather", 0)]
    queries, answers = heads * key * 2, heads * (value + 1) * 4
    return [("all-gather", r["piece"] * queries), ("all-to-all", r["piece"] * answers)]


def compiled(rows: list[dict[str, Any]]) -> str:
    """Table of all that was compiled."""
    lines = [
        [r["model"], r["target"], mesh_of(r), str(r["layers"]), program_of(r), *cells(r, must_send)]
        for r in rows
    ]
    return table(["model", "target", "mesh", "layers", "program", *COLUMNS], lines)


def report(rows: list[dict[str, Any]]) -> str:
    made = "; ".join(sorted({r["compiler"] for r in rows}))
    return f"""# Layers of published models at {CONTEXT:,} tokens, compiled with no device

`python -m benchmarks.family_memory`, {made}, {datetime.date.today()}. Bytes a device;
weights and cache in bfloat16; a cache for {CONTEXT:,} tokens, of which prefill adds so many of the
last {PIECE:,}, as a piece of them has, decode the last token. Arguments are the embedding, the
head, these layers and their cache. Two layers are one of each kind that the model has: recurrent
and full (Qwen3-Next, Qwen3.5), Kimi delta and latent (Kimi-Linear), dense and experts (GLM-4.5,
Kimi-K2), full and dense beside a window and experts (MiMo-V2-Flash). The other columns are as in
[model_memory.md](model_memory.md).

{compiled(rows)}"""


def in_order(r: dict[str, Any]) -> tuple:
    return list(SIZES).index(r["model"]), list(DEVICES).index(r["target"]), r["program"]


def main(args: Args) -> None:
    jax.config.update("jax_platforms", "cpu")  # devices are described, not there
    kept = None if args.out is None else args.out / "family_memory.json"
    records = json.loads(kept.read_text()) if kept is not None and kept.exists() else []
    todo = [
        (model, target, program)
        for target in args.targets or DEVICES
        for model in args.models or SIZES
        for program in ("prefill", "decode")
    ]
    for model, target, program in track(todo, description="compiling"):
        axes = mesh_for(model, target)
        new = {"model": model} | row_of(SIZES[model], target, axes, program, CONTEXT, PIECE)
        others = [r for r in records if any(r[k] != new[k] for k in KEY)]
        records = sorted([*others, new], key=in_order)
        if kept is not None:  # after each: a compilation may take minutes
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(records, indent=1) + "\n")
    write(args.out, "family_memory.md", report(records))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
