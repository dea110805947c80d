# SPDX-License-Identifier: Apache-2.0
"""An agent of many turns: each appends what a tool said and computes that alone.

python examples/agent_loop.py                                 # 8 emulated CPU devices
python examples/agent_loop.py --folder src --checkpoint DIR   # a tool that reads your files
python examples/agent_loop.py --drafts 7 --cache-dtype int8   # guesses, and a pool in 8 bits
"""

import dataclasses
import pathlib
import sysconfig
import time

import jax
import rich
import tyro
from rich.progress import track
from rich.table import Table

import jaxcp
from jaxcp.checkpoints import NEEDLE
from jaxcp.cli.terminal import one_line_errors

SYSTEM = "Files are read one after the other. Answer with what comes next in each.\n"


@dataclasses.dataclass
class Args:
    checkpoint: pathlib.Path = NEEDLE
    folder: pathlib.Path = pathlib.Path(sysconfig.get_path("stdlib"))  # the tool reads its *.py
    turns: int = 40
    output: int = 400  # characters of a file that the tool gives
    new_tokens: int = 24
    drafts: int = 4  # tokens guessed in a step at most; 0 guesses none
    cache_dtype: str | None = None  # int8 or float8_e4m3fn; default: the checkpoint's


def tool_outputs(args):
    """Say what the tool does in each turn: a name, and the beginning of that file."""
    files = sorted(args.folder.glob("*.py"))
    if not files:
        raise ValueError(f"--folder needs *.py files; {args.folder} has none")
    for turn in range(args.turns):
        number, part = turn % len(files), turn // len(files)
        text = files[number].read_text(encoding="utf-8", errors="replace")
        begin = part * args.output % max(1, len(text))
        yield f"\n# {files[number].name}\n{text[begin : begin + args.output]}"


def run(args):
    """The last answer, and the numbers and seconds of each turn."""
    with jax.set_mesh(jaxcp.make_mesh(seq=jax.device_count())):
        model, tokenizer = jaxcp.load(args.checkpoint)
        turns = list(tool_outputs(args))
        turns[0] = SYSTEM + turns[0]
        longest = sum(len(tokenizer.encode(turn)) + args.new_tokens for turn in turns)
        engine = jaxcp.Engine(
            model, tokenizer, max_len=longest, max_rows=1, drafts=args.drafts,
            cache_dtype=args.cache_dtype,
        )  # fmt: skip
        engine.warm_up()  # compiles: no turn waits for that
        session, numbers = engine.session(), []
        for turn in track(turns, "turns", transient=True):
            start = time.perf_counter()
            answer = "".join(session.send(turn, max_new_tokens=args.new_tokens))
            numbers.append((dataclasses.replace(session.stats), time.perf_counter() - start))
    return answer, numbers


def table(numbers):
    shown = Table("")
    for name in ("first turn", "last turn", "all turns"):
        shown.add_column(name, justify="right")
    for name, field in (
        ("tokens computed", "prefilled"), ("tokens reused", "reused"),
        ("tokens generated", "generated"), ("guesses", "drafted"), ("accepted", "accepted"),
    ):  # fmt: skip
        column = [getattr(stats, field) for stats, _ in numbers]
        shown.add_row(name, *(f"{x:,}" for x in (column[0], column[-1], sum(column))))
    taken = [seconds for _, seconds in numbers]
    shown.add_row("seconds", *(f"{x:.2f}" for x in (taken[0], taken[-1], sum(taken))))
    return shown


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__.splitlines()[0])
    if args.turns < 1:
        raise SystemExit("--turns must be at least 1")
    jax.config.update("jax_num_cpu_devices", 8)  # where there is no accelerator
    with one_line_errors():  # JAXCP_DEBUG=1 shows where they come from
        answer, numbers = run(args)
        print(f"the last answer: {answer!r}")
        rich.print(table(numbers))
