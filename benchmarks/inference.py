# SPDX-License-Identifier: Apache-2.0
"""Requests over one pool; an agent's turns, rung by rung; steps of decoding; a long conversation.

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
from benchmarks import decode, ladder, long_agent
from benchmarks.tables import table, versions, write
from jaxcp.checkpoints import NEEDLE
from jaxcp.evaluate.agent import make_trace


@dataclasses.dataclass
class Args:
    out: pathlib.Path | None = None
    """A folder for inference.md; None prints alone."""
    seq: int = 8
    requests: int = 32
    new_tokens: int = 32
    turns: int = 40
    """Turns of the ladder, each of `output` characters of a tool and `new_tokens` of an answer."""
    output: int = 200
    agents: int = 8
    system: int = 2_000
    """Bytes of the prompt that all agents begin with."""
    drafts: int = 7
    rows: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Rows of the steps of decoding."""
    contexts: tuple[int, ...] = (1_024, 4_096, 16_384, 65_536)
    steps: int = 20
    """Steps that are timed for each of them."""
    host: int = 8
    """Rows of the steps whose host time is taken."""
    long: int = 495
    """Turns of the long conversation."""
    checked: tuple[int, ...] = (1, 100)
    """Turns, beside the last, whose answer is compared with that of a fresh prefill."""


def timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def batch_rows(engine, args: Args, text: bytes):
    """Seconds of many requests, one after the other and together."""
    prompts = [list(text[i * 500 : i * 500 + 100 + 10 * i]) for i in range(args.requests)]
    sampling = jaxcp.Sampling(max_new_tokens=args.new_tokens)

    def alone():
        return [
            engine.generate([ids], sampling)[0].tokens
            for ids in track(prompts, "alone", transient=True)
        ]

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


def requests(model, tokenizer, args: Args, text: bytes) -> str:
    """Report on many requests at a time."""
    longest = 100 + 10 * args.requests + args.new_tokens
    engine = jaxcp.Engine(
        model, tokenizer, max_len=longest, max_rows=args.requests, stop_tokens=(),
        pool_tokens=longest * args.requests,
    )  # fmt: skip
    engine.warm_up()
    lines = table(("", "seconds", "", "times as fast"), batch_rows(engine, args, text))
    return f"""{args.requests} requests of 100 to {90 + 10 * args.requests} bytes, \
{args.new_tokens} new ones each; the answers are the same:

{lines}"""


def climb(model, tokenizer, args: Args) -> str:
    """Report on the ladder."""
    agents = ladder.Agents(
        agents=args.agents, turns=args.turns, system=args.system, output=args.output,
        new_tokens=args.new_tokens,
    )  # fmt: skip
    rungs = list(ladder.climb(model, tokenizer, agents, drafts=args.drafts))
    return f"""An agent of {args.turns} turns: {args.system:,} bytes to begin with, \
{args.output} characters a turn, {args.new_tokens} new tokens. Every rung adds to the one before. \
Seconds, tokens and the MiB of pages on a device are those an agent; tokens/s are those of the \
conversation at its end, however often they were computed:

{table(ladder.HEAD, ladder.rows(rungs))}"""


def decoding(model, tokenizer, args: Args) -> str:
    """Report on steps of decoding, and on the host's part of them."""
    longest, rows = max(args.contexts), max(*args.rows, args.host)
    room = longest + args.steps + 8 * rows + 8
    engine = jaxcp.Engine(
        model, tokenizer, max_len=room, max_rows=rows, stop_tokens=(),
        pool_tokens=2 * longest + rows * (room - longest + 2_048),
    )  # fmt: skip
    engine.warm_up()
    sizes = {"rows": args.rows, "contexts": args.contexts, "steps": args.steps}
    measured = list(decode.measure(engine, **sizes))
    host = decode.host_seconds(engine, rows=args.host, context=min(args.contexts), steps=args.steps)
    heads = "context", *(f"{count} rows" for count in args.rows)
    return f"""Milliseconds of a step of decoding, the median of {args.steps}; programs have \
{", ".join(map(str, engine.geometry.row_sizes))} rows:

{table(heads, decode.step_rows(measured))}

A fit: {decode.fit(measured)}.

The host's part of a step of {args.host} rows after {min(args.contexts):,} tokens; to send a \
program to emulated devices is also to wait for a part of it:

{table(("", "ms", "of the step"), decode.host_rows(host))}"""


def conversation(model, tokenizer, args: Args) -> str:
    """Report on the long conversation."""
    sizes = {"outputs": (args.output,), "new_tokens": args.new_tokens, "system": args.system}
    trace = make_trace(args.long, **sizes)
    long = long_agent.converse(model, tokenizer, trace, {*args.checked, args.long})
    said = (f"{n} {'the same' if same else 'ANOTHER'}" for n, same in long.same.items())
    heads = "MiB after", "the first turn", "the one in the middle", "the last"
    return f"""A conversation of {args.long} turns and {long.tokens:,} tokens. Beside a prefill of \
all that was said, the answer of turn {", ".join(said)}:

{table(heads, long_agent.rows(long))}

The host gains {long.slope:,.0f} bytes a turn."""


def main(args: Args) -> None:
    text = "\n\n".join(topics.values()).encode()
    with jax.set_mesh(jaxcp.make_mesh(seq=args.seq)):
        model, tokenizer = jaxcp.load(NEEDLE)
        parts = [
            requests(model, tokenizer, args, text),
            climb(model, tokenizer, args),
            decoding(model, tokenizer, args),
            conversation(model, tokenizer, args),
        ]
    about = f"{datetime.date.today()}, {versions('jax')}, {args.seq} emulated CPU devices."
    command = "`python -m benchmarks.inference`; what is compiled is compiled before."
    write(args.out, "inference.md", "\n\n".join(["# Inference", f"{about}\n{command}", *parts]))


if __name__ == "__main__":
    jaxcp.emulate_devices(8)
    main(tyro.cli(Args))
