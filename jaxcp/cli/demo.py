# SPDX-License-Identifier: Apache-2.0
"""`jaxcp demo`: the main job on what the package ships, over eight emulated devices.

Every number it prints was measured while it ran.
"""

import dataclasses
import json
import math
import pathlib
import time

import jax
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jaxcp.checkpoints import NEEDLE
from jaxcp.context_parallel import Ring
from jaxcp.evaluate.needle import Result, evaluate_needle, plot_heat_map
from jaxcp.evaluate.pictures import draw_if_possible
from jaxcp.mesh import MeshConfig, emulate_devices, make_mesh
from jaxcp.models.gpt.config import GPTConfig
from jaxcp.training import OptimizerConfig, TextSource, TrainConfig, plot_loss, train
from jaxcp.training.loop import Result as Trained
from jaxcp.training.metrics import read_metrics
from jaxcp.weights import load

DEVICES = 8
ROWS, ROW = 8, 256  # rows of a training batch, tokens of a row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    lengths: tuple[int, ...]
    needles: int
    train_steps: int
    """Steps of training, an even number: it stops half-way, and a fresh call goes on."""


FULL = Size(lengths=(32_768, 131_072), needles=10, train_steps=60)
SMOKE = Size(lengths=(1_024, 2_048), needles=2, train_steps=8)


def run(out: pathlib.Path, *, smoke: bool = False) -> None:
    """Find needles in long text, then train a small GPT; a table and two pictures in `out`."""
    console, size = Console(), SMOKE if smoke else FULL
    out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    emulate_devices(DEVICES)
    console.print(f"[bold]jaxcp demo[/bold]: {DEVICES} emulated devices, jax {jax.__version__}")
    result = _find_needles(console, size)
    pictures = [draw_if_possible(plot_heat_map, result, out / "needle.png")]
    first, resumed = _train(console, size, out)
    pictures += [draw_if_possible(plot_loss, resumed.metrics_path, out / "loss.png")]
    console.print(_table(result, first, resumed))
    measured = result.as_json() | {"final_loss": resumed.final_loss}
    (out / "demo.json").write_text(json.dumps(measured, indent=1))
    console.print(
        f"pictures: {', '.join(dict.fromkeys(pictures))}   "
        f"({time.perf_counter() - begin:.0f} s in all)"
    )


def _find_needles(console: Console, size: Size) -> Result:
    with jax.set_mesh(make_mesh(seq=DEVICES)):
        model, tokenizer = load(NEEDLE)
        parameters = sum(x.size for x in jax.tree.leaves(model))
        console.print(
            f"\n[bold]1. Long context[/bold]: a hybrid MoE of {parameters:,} parameters reads "
            f"CPython's documentation, the sequence zigzag over seq={DEVICES}, by ring attention"
        )
        bar = Progress(
            TextColumn("   {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        results = []
        with bar:
            for length in size.lengths:
                task = bar.add_task(f"{length:>7,} bytes: needles", total=size.needles)
                results.append(_evaluate(model, tokenizer, size, length, bar, task))
    result = Result(
        answers=sum((r.answers for r in results), ()), reads=sum((r.reads for r in results), ())
    )
    shown = next(a for a in result.answers if a.length == size.lengths[-1])
    read = result.reads[-1]
    console.print(
        f'   "\\[key {shown.key:04d} is" -> {shown.answered} '
        f"({'right' if shown.correct else f'wrong, it is {shown.expected}'}; "
        f"{100 * shown.depth:.0f} % deep)"
    )
    console.print(
        f"   a later question of the same conversation prefilled {read.later_prefilled} tokens "
        f"and reused {read.reused:,}"
    )
    return result


def _evaluate(model, tokenizer, size: Size, length: int, bar: Progress, task) -> Result:
    def advance(_):
        bar.advance(task)

    return evaluate_needle(
        model,
        tokenizer,
        lengths=[length],
        needles=size.needles,
        on_answer=advance,
    )


def _train(console: Console, size: Size, out: pathlib.Path) -> tuple[Trained, Trained]:
    """Train half of the steps, then resume in a fresh call for the others."""
    steps, half = size.train_steps, size.train_steps // 2
    console.print(
        f"\n[bold]2. Training[/bold]: a GPT on the same text, seq=4 x data=2: {steps} steps of "
        f"{ROWS * ROW:,} tokens. It is stopped and saved at step {half}, and a fresh call goes on"
    )
    config = TrainConfig(
        model=GPTConfig(
            vocab_size=256, max_positions=ROW, num_layers=2, num_heads=4, embed_dim=128
        ),
        mesh=MeshConfig(seq=4, data=2),
        strategy=Ring(),
        seq_len=ROW,
        batch_size=ROWS,
        steps=steps,
        data=TextSource(),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=4),
        out_dir=_fresh(out / "train"),
        checkpoint_every=steps,
        log_every=1,
    )
    first = train(dataclasses.replace(config, stop_after=half), progress=True)
    resumed = train(config, progress=True)
    [start, *_] = read_metrics(resumed.metrics_path)
    console.print(
        f"   stopped and saved at step {first.steps} of {steps}; resumed from step "
        f"{resumed.resumed_from}, ended at step {resumed.steps}"
    )
    console.print(
        f"   loss {start['loss']:.2f} at step 1, {first.final_loss:.2f} where it stopped, "
        f"{resumed.final_loss:.2f} at the end: nats a byte, {math.log(256):.2f} is a blind guess"
    )
    return first, resumed


def _fresh(folder: pathlib.Path) -> pathlib.Path:
    """Name a folder that does not exist yet, so that every demo trains from the start."""
    number = 1
    while (numbered := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return numbered


COLUMNS = (
    "tokens",
    "seconds",
    "tok/s",
    "MiB/dev",
    "reused",
    "dec/s",
    "exact",
)


def _table(result: Result, first: Trained, resumed: Trained) -> Table:
    caption = "train: loss; MiB/dev: cache of a device; reused: tokens; dec/s: decoded tokens"
    table = Table("", title="measured in this run", caption=caption, box=box.SIMPLE_HEAD)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for read in result.reads:
        table.add_row(
            f"{read.length // 1024}K bytes",
            f"{read.tokens:,}",
            f"{read.prefill_seconds:.1f}",
            f"{read.tokens / read.prefill_seconds:,.0f}",
            f"{read.cache_bytes_per_device / 2**20:.1f}",
            f"{read.reused:,}",
            f"{read.decode_tokens_per_second:.1f}",
            f"{100 * result.accuracy(read.length):.0f} %",
        )
    tokens, seconds = resumed.steps * ROWS * ROW, first.seconds + resumed.seconds
    trained = (f"{tokens:,}", f"{seconds:.1f}", f"{tokens / seconds:,.0f}")
    table.add_row(f"train {resumed.final_loss:.2f}", *trained)
    return table
