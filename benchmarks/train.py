# SPDX-License-Identifier: Apache-2.0
"""Training on the CPU of this machine: beside PyTorch, over devices, its loss, its saves, its loop.

    python -m benchmarks.train --out benchmarks/results

Five minutes. PyTorch (`pip install torch`) trains nanoGPT's model, written in `torch_gpt.py`, from
the same weights on the same batches to the same losses; without it that row says so.
"""

import dataclasses
import datetime
import importlib.util
import os
import pathlib
import platform
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import tyro

from benchmarks import saving, train_loop
from benchmarks.tables import table, versions, write
from benchmarks.train_speed import Setting, beside_torch, over_devices
from jaxcp.training.loss import chunked_cross_entropy

GIB = 1 << 30
VOCABULARY = 1 << 17
Row = tuple[str, ...]


@dataclasses.dataclass
class Args:
    out: pathlib.Path | None = None
    """A folder for train.md; None prints alone."""
    setting: tyro.conf.OmitArgPrefixes[Setting] = dataclasses.field(default_factory=Setting)
    seq: int = 8
    """Emulated devices that share a sequence, as long as theirs together."""
    loss_tokens: tuple[int, ...] = (4_096, 32_768, 131_072)
    loss_width: int = 768
    mebibytes: int = 256
    """Size of the state that is saved."""


def verdict(value: float, goal: float, *, at_most: bool) -> str:
    met = value <= goal if at_most else value >= goal
    return f"{'at most' if at_most else 'at least'} {goal:g}: {'met' if met else '**missed**'}"


def spread(ratio: tuple[float, float, float], digits: int = 2) -> str:
    return " ({:.{d}f} to {:.{d}f})".format(*ratio[1:], d=digits)


def torch_row(setting: Setting) -> Row:
    """Tokens a second, ours and PyTorch's."""
    name = (
        f"GPT, {setting.layers} x {setting.width}, context {setting.context}, batch {setting.rows}"
    )
    if importlib.util.find_spec("torch") is None:
        return name, "PyTorch is not installed: not measured"
    race = beside_torch(setting)
    tokens = setting.tokens * setting.steps
    ours, theirs = (f"{tokens / seconds:,.0f} tokens/s" for seconds in race.medians())
    ratio = race.ratio()
    goal = verdict(ratio[0], 1.0, at_most=False)
    return name, ours, f"PyTorch eager {theirs}", f"{ratio[0]:.2f}{spread(ratio)}", goal


def devices_row(setting: Setting, devices: int) -> Row:
    """CPU seconds of a step, of one device and of several that share the sequence."""
    rows = max(1, setting.rows // devices)
    steps, context = max(1, setting.steps // 2), setting.context * devices
    longer = dataclasses.replace(setting, context=context, rows=rows, steps=steps)
    race = over_devices(longer, devices)
    one, several = (seconds / longer.steps for seconds in race.medians("cpu_seconds"))
    ratio = race.ratio("cpu_seconds")
    return (
        f"seq={devices} emulated, context {longer.context:,}, batch {rows}: CPU time of a step",
        f"{several:.2f} s", f"one device {one:.2f} s", f"{ratio[0]:.2f}{spread(ratio)}",
        verdict(ratio[0], 1.25, at_most=True),
    )  # fmt: skip


def loss_memory(tokens: int, width: int, vocabulary: int) -> tuple[int, int]:
    """Bytes that the loss and its gradient hold beside arguments and results: ours, and naively."""

    def ours(x, head, targets):
        total, weight = chunked_cross_entropy(x, head, targets, jnp.ones(targets.shape))
        return total / weight

    def naive(x, head, targets):
        logits = jax.nn.log_softmax(jnp.einsum("btd,dv->btv", x, head))
        return -jnp.take_along_axis(logits, targets[..., None], -1).mean()

    def held(loss) -> int:
        x = jax.ShapeDtypeStruct((1, tokens, width), jnp.float32)
        head = jax.ShapeDtypeStruct((width, vocabulary), jnp.float32)
        targets = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, head, targets).compile()
        return program.memory_analysis().temp_size_in_bytes

    return held(ours), held(naive)


def loss_rows(args: Args) -> Iterator[Row]:
    """Memory of the loss; the goal is for a long context."""
    for tokens in args.loss_tokens:
        ours, naive = loss_memory(tokens, args.loss_width, VOCABULARY)
        name = f"loss of {tokens:,} tokens of {args.loss_width} over {VOCABULARY:,} words: held"
        ratio = ours / naive
        goal = verdict(ratio, 0.1, at_most=True) if tokens >= 32_768 else ""
        yield name, f"{ours / GIB:.2f} GiB", f"naive {naive / GIB:.2f} GiB", f"{ratio:.3f}", goal


def saving_row(mebibytes: int) -> Row:
    """Measure what a run waits for a save, beside what the save takes until it is on the disk."""
    times = saving.measure(mebibytes)
    return (
        f"a save of {mebibytes} MiB: the run waits", f"{times['waits']:.2f} s",
        f"on the disk, hashed, after {times['on_disk']:.2f} s; a copy on the host alone takes "
        f"{times['copies']:.2f} s",
        f"{times['waits'] / times['on_disk']:.2f}",
    )  # fmt: skip


def loop_row(setting: Setting) -> Row:
    """The part of a run that its steps do not take."""
    pairs = train_loop.in_process(setting)
    part = train_loop.overhead(pairs)
    step = sum(pair.bare for pair in pairs) / len(pairs) / train_loop.EVERY
    least, greatest = part[1] * 100, part[2] * 100
    return (
        f"the loop outside the step, a record every {train_loop.EVERY} steps",
        f"{part[0]:.1%}", f"of steps of {step * 1000:.0f} ms",
        f"{part[0]:.3f} ({least:.1f} % to {greatest:.1f} %)",
        verdict(part[0], 0.03, at_most=True),
    )  # fmt: skip


def rows_of(args: Args) -> Iterator[Row]:
    yield torch_row(args.setting)
    yield devices_row(args.setting, args.seq)
    yield from loss_rows(args)
    yield saving_row(args.mebibytes)
    yield loop_row(args.setting)


def main(args: Args) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes that are started
    jax.config.update("jax_platforms", "cpu")
    rows = []
    for row in rows_of(args):
        print(" | ".join(row), flush=True)
        rows.append(row)
    cores = args.setting.threads or len(os.sched_getaffinity(0))
    text = f"""# Training on a CPU, {datetime.date.today()}

`python -m benchmarks.train --out benchmarks/results`; {versions("jax", "torch")}; {cores} cores of
{platform.machine()}, load {os.getloadavg()[2]:.1f} in the quarter of an hour before; float32.
Sides take turns; a ratio is the median of {args.setting.rounds} rounds (least to greatest). Steps
are forward, backward, clipping and AdamW; both sides start from the same weights, and every round
checks that their losses are the same. Memory is the compiler's own count; nothing of it is run.

{table(["what", "ours", "beside", "ratio", "goal"], rows)}"""
    write(args.out, "train.md", text)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
