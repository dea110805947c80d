# SPDX-License-Identifier: Apache-2.0
"""Requests over one pool, beside one at a time; an agent's turns, beside a prefill of everything.

The shipped checkpoint on 8 emulated CPU devices, all in one run, everything compiled before. The
seconds are those of this machine: the ratios are what it is for.

    python -m benchmarks.inference --out benchmarks/results
"""

import dataclasses
import datetime
import pathlib
import time
from pydoc_data.topics import topics

import jax
import tyro
from rich.progress import track

import jaxcp
from benchmarks.tables import table, versions, write
from jaxcp.checkpoints import NEEDLE


@dataclasses.dataclass
class Args:
    out: pathlib.Path | None = None
    """A folder for inference.md; None prints alone."""
    seq: int = 8
    requests: int = 32
    new_tokens: int = 32
    turns: int = 40
    """Turns of the agent, each with `output` bytes of a tool and `new_tokens` of an answer."""
    output: int = 200
    agents: int = 8
    system: int = 2_000
    """Bytes of the prompt that all agents begin with."""


def timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def batch_rows(engine, args: Args, text: bytes):
    """Seconds of many requests, one after the other and together."""
    prompts = [list(text[i * 500 : i * 500 + 100 + 10 * i]) for i in range(args.requests)]
    sampling = jaxcp.Sampling(max_new_tokens=args.new_tokens)

    def alone():
        return [engine.generate([ids], sampling)[0].tokens for ids in track(prompts, "alone")]

    answers = {}
    seconds = {}
    for name, run in (
        ("one at a time", alone),
        ("together", lambda: [x.tokens for x in engine.generate(prompts, sampling)]),
    ):
        engine.scheduler.tree.clear()
        seconds[name] = timed(lambda name=name, run=run: answers.update({name: run()}))
    assert answers["one at a time"] == answers["together"]
    for name, taken in seconds.items():
        rate = args.requests / taken
        ratio = seconds["one at a time"] / taken
        yield name, f"{taken:.1f}", f"{rate:.2f} requests/s", f"{ratio:.1f}"


def conversation(engine, args: Args, text: bytes, agents: int, *, keep: bool) -> int:
    """Run the turns of so many agents at once; the tokens that were computed."""
    sampling, computed = jaxcp.Sampling(max_new_tokens=args.new_tokens), 0
    histories = [list(text[: args.system]) for _ in range(agents)]
    for turn in track(range(args.turns), f"{agents} agents, {'kept' if keep else 'anew'}"):
        for number, history in enumerate(histories):
            first = args.system + (turn * agents + number) * args.output
            history.extend(text[first : first + args.output])
        if not keep:
            engine.scheduler.tree.clear()
        # at first they come one by one: who comes at once computes the beginning at once, too
        batches = [histories] if turn else [[history] for history in histories]
        results = [x for batch in batches for x in engine.generate(batch, sampling)]
        for history, result in zip(histories, results, strict=True):
            history.extend(result.tokens)
            computed += result.stats.computed
    return computed


def agent_rows(engine, args: Args, text: bytes):
    """Seconds and computed tokens of agents whose histories grow."""
    first = None
    for name, agents, keep in (
        ("prefill anew each turn", 1, False),
        ("prefix kept", 1, True),
        (f"{args.agents} agents, prefix shared", args.agents, True),
    ):
        engine.scheduler.tree.clear()
        start = time.perf_counter()
        computed = conversation(engine, args, text, agents, keep=keep)
        seconds = (time.perf_counter() - start) / agents
        first = first or seconds
        cells = f"{seconds:.1f}", f"{computed / agents:,.0f}", f"{first / seconds:.1f}"
        yield name, *cells


def main(args: Args) -> None:
    text = "\n\n".join(topics.values()).encode()
    with jax.set_mesh(jaxcp.make_mesh(seq=args.seq)):
        model, tokenizer = jaxcp.load(NEEDLE)
        longest = args.system + args.turns * (args.output + args.new_tokens)
        engine = jaxcp.Engine(
            model, tokenizer, max_len=longest, max_rows=args.requests, stop_tokens=(),
            pool_tokens=longest * (args.agents + 1),
        )  # fmt: skip
        warm = timed(engine.warm_up)
        batch = list(batch_rows(engine, args, text))
        agents = list(agent_rows(engine, args, text))
    write(args.out, "inference.md", report(args, warm, batch, agents))


def report(args: Args, warm: float, batch, agents) -> str:
    sizes = f"of 100 to {90 + 10 * args.requests} bytes, {args.new_tokens} new ones each"
    turns = f"{args.output} a turn, {args.new_tokens} new ones"
    return f"""# Requests over one pool

{datetime.date.today()}, {versions("jax")}, {args.seq} emulated CPU devices.
`python -m benchmarks.inference`; {warm:.0f} s of compiling came before.

{args.requests} requests {sizes}; the answers are the same:

{table(("", "seconds", "", "times as fast"), batch)}

An agent of {args.turns} turns: {args.system:,} bytes to begin with, {turns}:

{table(("", "seconds an agent", "tokens computed an agent", "times as fast"), agents)}
"""


if __name__ == "__main__":
    jaxcp.emulate_devices(8)
    main(tyro.cli(Args))
