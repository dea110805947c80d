# SPDX-License-Identifier: Apache-2.0
"""Climbs from a prefill of everything in each turn to guesses in a batch over a pool in 8 bits.

Every rung adds one thing to the rung before it, and runs the same turns of the same agents.
"""

import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.progress import track

import jaxcp
from jaxcp.data.haystack import corpus
from jaxcp.evaluate.agent import make_trace

NOWHERE = math.log(1.1)
"""The logarithm of a gain that may be noise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agents:
    """Agents that begin with the same prompt, and whose tools say different things."""

    agents: int
    turns: int
    system: int
    output: int
    new_tokens: int

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation."""
        said = max(sum(map(len, outputs)) for outputs in self.said())
        return len(self.system_prompt()) + said + self.turns * self.new_tokens

    def system_prompt(self) -> list[int]:
        """Ids of the beginning, of a tokenizer of bytes."""
        return list(corpus()[: self.system])

    def said(self) -> list[list[list[int]]]:
        """Ids of what each agent's tool says in each turn."""
        sizes = {"outputs": (self.output,), "new_tokens": self.new_tokens, "system": 0}
        traces = [make_trace(self.turns, **sizes, seed=agent) for agent in range(self.agents)]
        return [[list(turn.text.encode()) for turn in trace] for trace in traces]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """A way to run the agents; `options` are those of `Engine`."""

    name: str
    shared: bool = True
    """All agents; False: the first alone."""
    keep: bool = True
    batched: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rung:
    """Measurements of a way. Seconds, tokens and bytes are those an agent."""

    name: str
    seconds: float
    tokens: float
    """Tokens of the conversation at its end, however often they were computed."""
    computed: float
    bytes: float
    """Bytes of the pages that hold the conversations at their end, on the device with the most."""
    answers: list[list[int]]
    """The first agent's, turn by turn."""


def ways(agents: int, drafts: int) -> tuple[Way, ...]:
    """The rungs, from the lowest."""
    guesses = {"drafts": drafts}
    return (
        Way(name="prefill anew each turn", shared=False, keep=False),
        Way(name="cache kept", shared=False),
        Way(name=f"beginning shared by {agents}, one by one"),
        Way(name=f"{agents} in a batch", batched=True),
        Way(name=f"{drafts} guesses", batched=True, options=guesses),
        Way(name="int8 cache", batched=True, options=guesses | {"cache_dtype": "int8"}),
    )


def climb(model, tokenizer, agents: Agents, *, drafts: int) -> Iterable[Rung]:
    """Run every way; those with the same options of `Engine` share one. Compiling is not timed."""
    engines: dict[str, jaxcp.Engine] = {}
    for way in ways(agents.agents, drafts):
        key = repr(way.options)
        if key not in engines:
            engines.clear()  # and its pool
            engines[key] = jaxcp.Engine(
                model, tokenizer, max_len=agents.longest, max_rows=agents.agents, stop_tokens=(),
                pool_tokens=agents.longest * (agents.agents + 1), **way.options,
            )  # fmt: skip
            engines[key].warm_up()
        yield run(engines[key], agents, way)


def run(engine, agents: Agents, way: Way) -> Rung:
    """Run the turns of all agents, or of the first alone."""
    said = agents.said()[: agents.agents if way.shared else 1]
    histories = [agents.system_prompt() for _ in said]
    sampling = jaxcp.Sampling(max_new_tokens=agents.new_tokens)
    answers, computed = [], 0
    engine.scheduler.tree.clear()
    start = time.perf_counter()
    for turn in track(range(agents.turns), way.name, transient=True):
        for history, outputs in zip(histories, said, strict=True):
            history.extend(outputs[turn])
        if not way.keep:
            engine.scheduler.tree.clear()
        # at first they come one by one: who comes at once computes the beginning at once, too
        one_by_one = not way.batched or turn == 0
        batches = [[history] for history in histories] if one_by_one else [histories]
        results = [x for batch in batches for x in engine.generate(batch, sampling)]
        answers.append(results[0].tokens)
        computed += sum(result.stats.computed for result in results)
        for history, result in zip(histories, results, strict=True):
            history.extend(result.tokens)
    seconds, count = time.perf_counter() - start, len(said)
    return Rung(
        name=way.name,
        seconds=seconds / count,
        tokens=sum(map(len, histories)) / count,
        computed=computed / count,
        bytes=page_bytes(engine) / count,
        answers=answers,
    )


def page_bytes(engine) -> int:
    """Bytes of the pages that are in use or kept, on the device with the most."""
    most = max(pool.size - pool.free for pool in engine.scheduler.pages.pools)
    return engine.runner.pool.bytes_of(most / engine.geometry.pages_per_shard, 0)


def alike(answers: list[list[int]], reference: list[list[int]]) -> str:
    """Say how many turns of a rung have the answer of the lowest one."""
    same = sum(x == y for x, y in zip(answers, reference, strict=True))
    return "all" if same == len(reference) else f"{same} of {len(reference)}"


def rows(rungs: Sequence[Rung]) -> Iterable[tuple[str, ...]]:
    """Lines of the table: each rung beside the one before, and its share of the whole climb.

    Rungs multiply, so shares are those of the logarithm; one that is slower has a negative one.
    Of a climb that leads nowhere there are none.
    """
    first, last = rungs[0], rungs[-1]
    whole = math.log(first.seconds / last.seconds)
    for before, rung in zip([first, *rungs], rungs, strict=False):
        gain = before.seconds / rung.seconds
        yield (
            rung.name,
            f"{rung.seconds:.2f}",
            f"{rung.tokens / rung.seconds:,.0f}",
            f"{rung.computed:,.0f}",
            f"{rung.bytes / 2**20:.2f}",
            f"{gain:.2f}",
            f"{first.seconds / rung.seconds:.2f}",
            f"{100 * math.log(gain) / whole:.0f} %" if abs(whole) > NOWHERE else "",
            alike(rung.answers, first.answers),
        )


HEAD = (
    "", "seconds", "tokens/s", "tokens computed", "MiB a device", "times the rung before",
    "times the first", "share", "turns with the first's answer",
)  # fmt: skip
