# SPDX-License-Identifier: Apache-2.0
"""Load on a server of OpenAI's interface: many conversations at once, and how long answers take.

A conversation is some turns, each of which sends all that was said before and a new text, as an
agent does. Conversations begin as fast as `concurrency` lets them, or at random moments with a mean
`rate` (a Poisson process), whatever the server does meanwhile.
"""

import asyncio
import contextlib
import dataclasses
import math
import random
import time
from collections.abc import Callable
from typing import Any

from jaxcp.data.haystack import corpus
from jaxcp.evaluate.load_client import (
    Answered,
    Endpoint,
    ask,
    new_client,
    request_of,
    served_model,
)
from jaxcp.inference.checks import integer

PROBE = 200
"""Characters of the texts that tell how many characters a token has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests to put to a server.

    Args:
      requests: conversations.
      turns: requests of a conversation, one after the other.
      concurrency: conversations at a time at most; None for no limit, which needs a `rate`.
      rate: conversations that begin a second, in the mean; None: as soon as there is room.
      prompt_tokens: tokens of the text that a turn adds, about: texts are cut at characters.
      answer_tokens: tokens of each answer.
      shared_tokens: tokens, about, with which all conversations begin.
      endpoint: None takes chats where the model has them.
      ignore_eos: answers go on behind what would end them (a field that vLLM and SGLang have too).
      seed: of texts and moments.
    Raises:
      ValueError: a number out of its range, or neither `concurrency` nor `rate`.
    """

    requests: int = 64
    turns: int = 1
    concurrency: int | None = 16
    rate: float | None = None
    prompt_tokens: int = 512
    answer_tokens: int = 64
    shared_tokens: int = 0
    endpoint: Endpoint | None = None
    ignore_eos: bool = True
    seed: int = 0

    def __post_init__(self):
        for name in ("requests", "turns", "prompt_tokens", "answer_tokens"):
            integer(name, getattr(self, name), 1)
        integer("shared_tokens", self.shared_tokens, 0)
        integer("seed", self.seed, 0)
        if self.concurrency is None and self.rate is None:
            raise ValueError("a load has a concurrency, a rate, or both; got neither")
        if self.concurrency is not None:
            integer("concurrency", self.concurrency, 1)
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise ValueError(f"rate must be conversations a second, above 0; got {self.rate}")

    @property
    def tokens(self) -> int:
        """Tokens that a conversation comes to hold, about."""
        return self.shared_tokens + self.turns * (self.prompt_tokens + self.answer_tokens)

    def moments(self) -> list[float]:
        """Seconds after which each conversation is due."""
        if self.rate is None:
            return [0.0] * self.requests
        chance, now, out = random.Random(f"moments {self.seed}"), 0.0, []
        for _ in range(self.requests):
            out.append(now)
            now += chance.expovariate(self.rate)
        return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadResult:
    """A load and all that came of it."""

    workload: Workload
    url: str
    model: str
    endpoint: Endpoint
    seconds: float
    """Time from the beginning of the first request to the end of the last."""
    answers: tuple[Answered, ...]


class Texts:
    """Texts of about so many tokens, pieces of CPython's documentation in ASCII.

    Args:
      characters: of a token, in the mean.
    """

    def __init__(self, characters: float, seed: int):
        self._characters, self._seed = characters, seed
        self._text = corpus().decode("utf-8").encode("ascii", "replace").decode("ascii")

    def text(self, name: str, tokens: int) -> str:
        """The text of this name, the same for the same seed."""
        length = round(tokens * self._characters)
        text = self._text * (1 + length // len(self._text))
        begin = random.Random(f"{self._seed} {name}").randrange(len(text) - length + 1)
        return text[begin : begin + length]


def measure_load(
    url: str,
    workload: Workload,
    *,
    model: str | None = None,
    key: str | None = None,
    timeout: float = 600.0,
    on_answer: Callable[[Answered], Any] | None = None,
) -> LoadResult:
    """Send a load to a server, and wait for its end. What fails is counted and stops nothing.

    Two requests go before, whose usage tells how long texts must be; they are not counted.

    Args:
      url: as http://127.0.0.1:8000.
      model: by the name under which it is served; None takes the first.
      key: an API key.
      timeout: seconds without news after which a request has failed.
    Raises:
      ValueError: there is no such server, or it refuses the requests that go before.
      ModuleNotFoundError: httpx2 is not installed.
    """
    return asyncio.run(_measured(url, workload, model, key, timeout, on_answer))


async def _measured(url, workload, model, key, timeout, on_answer) -> LoadResult:
    async with new_client(url, key, timeout) as client:
        described = await served_model(client)
        name = model or described["id"]
        endpoint: Endpoint = workload.endpoint or (
            "completions" if described.get("chat") is False else "chat"
        )
        texts = Texts(await _characters(client, name, endpoint, workload), workload.seed)
        load = _Load(client, workload, name, endpoint, texts, on_answer)
        answers = await load.run()
    last = max(answer.due + answer.end for answer in answers)
    return LoadResult(
        workload=workload, url=url, model=name, endpoint=endpoint, seconds=last,
        answers=tuple(answers),
    )  # fmt: skip


async def _characters(client: Any, model: str, endpoint: Endpoint, workload: Workload) -> float:
    """Ask for two texts, and tell by the tokens of both how many characters a token has."""
    texts, counts = Texts(1.0, workload.seed), []
    for length in (PROBE, 2 * PROBE):
        probe = Answered(conversation=-1, turn=0)
        said = [texts.text("probe", length)]
        path, body = request_of(endpoint, model, said, 1, ignore_eos=workload.ignore_eos)
        await ask(client, path, body, probe, time.monotonic())
        if probe.error is not None:
            raise ValueError(
                f"the server at {client.base_url} refuses {path}: {probe.error}"
                + ". Perhaps it knows no ignore_eos" * workload.ignore_eos
            )
        counts.append(probe.prompt_tokens)
    if counts[1] <= counts[0]:
        raise ValueError(
            f"the server at {client.base_url} does not count tokens in streams: "
            f"stream_options.include_usage gave {counts}"
        )
    return PROBE / (counts[1] - counts[0])


class _Load:
    def __init__(self, client, workload, model, endpoint, texts, on_answer):
        self.client, self.workload, self.texts = client, workload, texts
        self.model, self.endpoint, self.on_answer = model, endpoint, on_answer
        self.answers: list[Answered] = []
        limit = workload.concurrency
        self.room: Any = contextlib.nullcontext() if limit is None else asyncio.Semaphore(limit)

    async def run(self) -> list[Answered]:
        self.began = time.monotonic()
        moments = self.workload.moments()
        await asyncio.gather(*(self._conversation(i, due) for i, due in enumerate(moments)))
        return sorted(self.answers, key=lambda answer: (answer.conversation, answer.turn))

    async def _conversation(self, number: int, due: float) -> None:
        """Take the turns of one conversation, up to one that fails."""
        workload = self.workload
        await asyncio.sleep(max(0.0, due - self._now()))
        async with self.room:
            text = self.texts.text(f"{number} 0", workload.prompt_tokens)
            said = [self.texts.text("shared", workload.shared_tokens) + text]
            for turn in range(workload.turns):
                due = self._now() if turn or workload.rate is None else due
                answered = Answered(conversation=number, turn=turn, due=due)
                path, body = request_of(
                    self.endpoint, self.model, said, workload.answer_tokens,
                    ignore_eos=workload.ignore_eos,
                )  # fmt: skip
                await ask(self.client, path, body, answered, self.began + due)
                self.answers.append(answered)
                if self.on_answer:
                    self.on_answer(answered)
                if answered.error is not None:
                    return
                next_text = self.texts.text(f"{number} {turn + 1}", workload.prompt_tokens)
                said = [*said, answered.text, next_text]

    def _now(self) -> float:
        return time.monotonic() - self.began
