# SPDX-License-Identifier: Apache-2.0
"""GPT-2 124M at 1M tokens and Hy3-295B at 256K, trained on machines that are not here.

One step, compiled by the chip's own compiler with the state cut over the mesh
(`TrainConfig.zero=3`); nothing runs.

    python -m benchmarks.model_memory --train --out benchmarks/results

Rows in the folder that are not compiled again stay.
"""

import dataclasses
import datetime
import json
import math
import pathlib
import re
from typing import Any

import jax
import numpy as np
from rich.progress import track

import jaxcp
from benchmarks.tables import table, versions, write
from jaxcp.compile import compile_for, parse_target
from jaxcp.layers.remat import POLICIES
from jaxcp.models import config_from_dict
from jaxcp.training.flops import flops_of
from jaxcp.training.step import abstract_inputs, make_step

GIB = 1 << 30
MILLION = 1 << 20
AGAIN = 4 / 3
"""Work of a step whose layers are computed again, over that which counts."""
KEY = ("model", "target", "mesh", "tokens", "zero", "remat", "optimizer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A step of training: rows of `tokens`, one along each device of `data`."""

    model: str
    target: str
    mesh: dict[str, int]
    tokens: int
    zero: int = 3
    remat: bool | str = True
    optimizer: str = "AdamW"


CASES = (
    *(
        Case(model="GPT-2 124M", target=target, mesh={"seq": 8}, tokens=tokens)
        for target in ("v6e:2x4", "v5p:2x2x2", "rtx-pro-6000:8")
        for tokens in (MILLION // 32, MILLION // 8, MILLION)
    ),
    Case(model="GPT-2 124M", target="h200:8", mesh={"seq": 8}, tokens=MILLION),
    *(
        Case(
            model="GPT-2 124M",
            target="h200:8",
            mesh={"seq": 8},
            tokens=MILLION // 8,
            remat=remat,
        )
        for remat in (*POLICIES, False)
    ),
    Case(
        model="GPT-2 124M", target="h200:8", mesh={"seq": 8}, tokens=MILLION // 8, optimizer="Muon"
    ),
    Case(model="Hy3-295B", target="v5p:4x4x8", mesh={"data": 8, "seq": 16}, tokens=MILLION // 4),
    Case(model="Hy3-295B", target="v5p:4x4x8", mesh={"data": 4, "seq": 32}, tokens=MILLION // 4),
    Case(model="Hy3-295B", target="h200:8x8", mesh={"data": 8, "seq": 8}, tokens=MILLION // 4),
    *(
        Case(
            model="Hy3-295B",
            target="h200:8x8",
            mesh={"data": 4, "seq": 16},
            tokens=MILLION // 4,
            optimizer=optimizer,
        )
        for optimizer in ("AdamW", "Muon")
    ),
)


def model_of(case: Case, hy3: dict[str, Any]) -> Any:
    """The config of a case in bfloat16, its layers recomputed."""
    if case.model == "GPT-2 124M":
        return jaxcp.GPTConfig(
            vocab_size=50_304, max_positions=case.tokens, num_layers=12, num_heads=12,
            embed_dim=768, dtype="bfloat16", remat=case.remat,
        )  # fmt: skip
    config = config_from_dict(hy3)
    return dataclasses.replace(config, dtype="bfloat16", remat=case.remat)


def run_of(case: Case, model: Any) -> jaxcp.TrainConfig:
    """The run of a case; experts lie on the devices that hold a sequence."""
    optimizer = jaxcp.OptimizerConfig(muon_learning_rate=0.02 if case.optimizer == "Muon" else None)
    return jaxcp.TrainConfig(
        model=model, optimizer=optimizer, steps=1000,
        seq_len=case.tokens, batch_size=case.mesh.get("data", 1),
        data=jaxcp.TextSource(), out_dir="none", mesh=jaxcp.MeshConfig(**case.mesh),
        rules=jaxcp.Rules(experts="seq"), strategy=jaxcp.Ring(), zero=case.zero, loss_chunk=4096,
    )  # fmt: skip


def row(case: Case, hy3: dict[str, Any]) -> dict[str, Any]:
    """One compilation; `refused` says why there are no numbers of the program."""
    config = run_of(case, model_of(case, hy3))
    mesh = parse_target(case.target).mesh(**case.mesh)
    inputs = abstract_inputs(config, mesh)
    step = make_step(
        config.model, config.strategy, config.optimizer, config.cycles, config.loss_chunk, True,
        config.losses, config.zero, config.rules,
    )  # fmt: skip
    tpu = mesh.devices.flat[0].platform == "tpu"
    record = dataclasses.asdict(case) | {
        "parameters": sum(x.size for x in inputs[0]["params"].values()),
        "state_bytes": sum(on_device(x, mesh) for x in jax.tree.leaves(inputs[0])),
        "hbm_bytes": parse_target(case.target).chip.hbm_bytes_per_device,
        "compiler": versions("jax", "libtpu" if tpu else "jax-cuda13-plugin"),
    }
    try:
        report = compile_for(step, inputs, mesh)
    except jax.errors.JaxRuntimeError as error:
        return record | {"refused": reason(str(error))}
    sizes = ("argument_bytes", "temp_bytes", "total_bytes")
    sent = report.collectives
    return record | {name: getattr(report, name) for name in sizes} | {
        "seconds": round(report.compile_seconds, 1),
        "collectives": None if sent is None else {c.kind: [c.count, c.bytes] for c in sent},
    }  # fmt: skip


def on_device(x: jax.ShapeDtypeStruct, mesh: jax.sharding.Mesh) -> int:
    """Count the bytes of an array that a device holds."""
    size = x.size * x.dtype.itemsize
    spec = () if x.sharding is None else x.sharding.spec  # a count of steps has none
    for axis in jax.tree.leaves(tuple(spec)):
        size //= mesh.shape[axis]
    return size


def reason(error: str) -> str:
    """The sentence of a compiler that says how much memory there is not, or its first line."""
    short = re.search(r"Used [\d.]+\w+ of [\d.]+\w+ hbm.*?\.\s", error)
    return short[0].strip() if short else error.strip().splitlines()[0][:200]


def compiled(rows: list[dict[str, Any]]) -> str:
    """Table of all that was compiled."""
    head = ["model", "tokens of a row", "target", "mesh", "remat", "optimizer", "state GiB"]
    head += [
        "temporaries GiB",
        "together GiB",
        "of the device's",
        "left GiB",
        "sent GiB a device and step",
        "seconds",
    ]
    lines = []
    for r in rows:
        mesh = " ".join(f"{axis}={size}" for axis, size in r["mesh"].items())
        first = [
            r["model"],
            f"{r['tokens']:,}",
            r["target"],
            mesh,
            str(r["remat"]),
            r["optimizer"],
            f"{r['state_bytes'] / GIB:.2f}",
        ]
        if "refused" in r:
            short = (r["hbm_bytes"] - r["state_bytes"]) / GIB
            lines.append([*first, "", "", "", f"**does not fit**; beside the state {short:,.1f}",
                          r["refused"]])  # fmt: skip
            continue
        left = (r["hbm_bytes"] - r["total_bytes"]) / GIB
        kinds = (r["collectives"] or {}).items()
        lines.append(
            [
                *first,
                f"{r['temp_bytes'] / GIB:.2f}",
                f"{r['total_bytes'] / GIB:.2f}",
                f"{r['total_bytes'] / r['hbm_bytes']:.0%}",
                f"{left:.1f}" if left >= 0 else f"**{left:.1f}: does not fit**",
                ", ".join(f"{k} {size / GIB:,.1f}" for k, (_, size) in kinds) or "not read",
                r["seconds"],
            ]
        )
    return table(head, lines)


def at_best(rows: list[dict[str, Any]], hy3: dict[str, Any]) -> str:
    """Table of the least time of a step, by the peaks of the chip and its links."""
    head = ["model", "tokens of a row", "target", "mesh", "FLOPs a device", "products s"]
    head += ["ring s", "a step at best s", "tokens/s at best", "MFU at best"]
    lines = []
    for r in rows:
        if not r.get("collectives") or r["remat"] is not True or r["optimizer"] != "AdamW":
            continue
        fields = {field.name for field in dataclasses.fields(Case)}
        case = Case(**{k: v for k, v in r.items() if k in fields})
        chip, devices = parse_target(case.target).chip, math.prod(case.mesh.values())
        place = np.arange(case.tokens, dtype=np.int32)
        whole = flops_of(model_of(case, hy3), {"positions": place[None]})
        if whole is None:
            continue
        tokens = case.tokens * case.mesh.get("data", 1)
        flops = whole * case.mesh.get("data", 1) / devices
        products = flops * AGAIN / chip.bf16_flops_per_device
        ways = 1 if chip.torus_axes else chip.links
        sent = r["collectives"].get("collective-permute", [0, 0])[1]
        ring = sent / (ways * chip.link_bytes_per_second)
        step = max(products, ring)
        mesh = " ".join(f"{axis}={size}" for axis, size in case.mesh.items())
        lines.append([
            case.model, f"{case.tokens:,}", case.target, mesh, f"{flops / 1e12:,.1f} T",
            f"{products:.3f}", f"{ring:.3f}", f"{step:.3f}", f"{tokens / step:,.0f}",
            f"{flops / chip.bf16_flops_per_device / step:.0%}",
        ])  # fmt: skip
    return table(head, lines)


def report(rows: list[dict[str, Any]], hy3: dict[str, Any]) -> str:
    made = "; ".join(sorted({r["compiler"] for r in rows}))
    return f"""# Training on machines that are not here

`python -m benchmarks.model_memory --train`, {made}, {datetime.date.today()}. A step of
training: float32 parameters, first and second moments (the state; Muon keeps no second ones of
matrices), bfloat16 in the layers, the state cut over `data` and `seq` (`zero=3`), experts over
`seq`, one row a device of `data`, ring attention. Bytes a device; memory is what the compiler
allots to the program, and what a runtime keeps beside it is not in it. All layers are compiled.

Sent: all that the program may send, of the exchange of experts every round, which only the worst
choice of experts needs.

{compiled(rows)}

## A step at best

Of FLOPs as `jaxcp.training.flops` counts them (causal), {AGAIN:.2f} times because layers are
computed again in the backward pass, at the chip's peak in bfloat16; what the ring sends to the next
device, through one link of a torus, or all links to a switch. The longer of the two bounds a step
from below where transfers run beside kernels; the exchange of experts is not in it. Nothing was
run: kernels that reach half of the peak take twice the time of products.

{at_best(rows, hy3)}"""


def main(out: pathlib.Path | None, hy3: dict[str, Any], targets: tuple[str, ...]) -> None:
    """Compile the cases of some targets, of all where there are none, and write the report."""
    kept = None if out is None else out / "train_memory.json"
    records = json.loads(kept.read_text()) if kept is not None and kept.exists() else []
    records = [{"optimizer": "AdamW"} | record for record in records]
    todo = [case for case in CASES if not targets or case.target in targets]
    for case in track(todo, description="compiling steps of training"):
        new = row(case, hy3)
        by_case = {tuple(str(r[k]) for k in KEY): r for r in [*records, new]}
        known = (tuple(str(getattr(case, k)) for k in KEY) for case in CASES)
        records = [by_case[case] for case in known if case in by_case]
        if kept is not None:  # after each: a compilation may take minutes
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(records, indent=1) + "\n")
    write(out, "train_memory.md", report(records, hy3))
