# SPDX-License-Identifier: Apache-2.0
"""A model ready to talk: with its tokenizer, length, strategy, and the mesh it was made under.

Requests share one pool: `add` queues one, `step` schedules, runs, and takes what came of it.
"""

import contextlib
import functools
import threading
import time
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax

from jaxcp.context_parallel import Strategy
from jaxcp.inference.asking import Asking, checked_stop_tokens
from jaxcp.inference.awaited import Awaited
from jaxcp.inference.chat_session import begin
from jaxcp.inference.checks import check_decides_alike, check_mesh, integer, longest_wait
from jaxcp.inference.geometry import FEW, Geometry, check_memory, geometry_of
from jaxcp.inference.groups import Groups
from jaxcp.inference.interrupts import deferred
from jaxcp.inference.limits import ChunkLimits, Limits
from jaxcp.inference.logprobs import TokenLogProbs
from jaxcp.inference.loop import Loop
from jaxcp.inference.pace import Pace
from jaxcp.inference.pages import Pages
from jaxcp.inference.request import Request
from jaxcp.inference.result import Result, result_of
from jaxcp.inference.runner import Runner
from jaxcp.inference.sampling import MOST_LOGPROBS, Sampling
from jaxcp.inference.scheduler import Scheduler
from jaxcp.inference.score import score
from jaxcp.inference.session import Session
from jaxcp.inference.steps import check_strategy
from jaxcp.models.base import LanguageModel
from jaxcp.text.tokenizer import Tokenizer

MOST = 2**31 - 1
"""Tokens and rows have int32 numbers."""


class Engine:
    """Answers many requests over one pool, and makes sessions.

    Make it under `jax.set_mesh`; it then uses that mesh wherever it runs. Several threads may use
    one engine: each `step` goes on with the requests of all.

    Args:
      tokenizer: None to talk in token ids.
      max_len: tokens that a request or session holds at most, prompt and answer.
      max_rows: requests that run at a time; more wait.
      max_wait: seconds that chunks of prompts may add to a step in which other rows decode: they
        are as long as that allows, by how long others took. None: 0.25; no bound in several
        processes, which have no clock together.
      drafts: tokens of a row that are guessed in a step at most, up to 7, from what followed the
        same words before, or by the model's own MTP layer where it has one: the answers stay the
        same, and come faster where guesses are right.
      pool_tokens: tokens that the pool has room for, of all requests and sessions; default
        `max_len`, or up to 4 times as many where these are no more than 32,768. The pool is made
        by the first request.
      memory: instead of `pool_tokens`: bytes of a device that the pool and what is beside it for
        sampling take (an integer), or a fraction of what is free there by then. The log says how
        many tokens that is.
      cache_dtype: "int8" or "float8_e4m3fn" keeps keys and values of layers that see everything in
        8 bits, with a float32 scale for each token's head: at a head dim of 128 a byte of the pool
        holds 1.9 times the tokens that it holds in bfloat16. Windows stay as they are. None: the
        dtype of the model.
      host_memory: bytes of the host for pages and snapshots that are evicted: who needs them again
        gets them back where that takes less time than to compute them. None: no bytes.
      strategy: the strategy for prefill; None lets each turn choose (see `jaxcp.prefill`).
      stop_tokens: ids that end an answer (and are not part of it); None takes those of the
        checkpoint that was loaded, () none.
    Raises:
      ValueError: the model has fewer positions than `max_len`, no embedding of a stop token, what
        `strategy` needs is not on this mesh, `host_memory` has no room for a page, or several
        processes would decide by a clock or by memory of their own (`max_wait`, `memory`).
      NotImplementedError: `strategy` cannot fill a cache of this model, what its layers keep has no
        form in 8 bits, or `host_memory` in several processes.

    >>> engine = jaxcp.Engine(model, tokenizer, max_len=131_072)
    >>> answer = "".join(engine.session().send("The needle is"))
    >>> one, two = engine.generate(["The needle is", "A needle"], Sampling(max_new_tokens=8))
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer | None,
        *,
        max_len: int,
        strategy: Strategy | None = None,
        stop_tokens: Collection[int] | None = None,
        max_rows: int = 16,
        drafts: int = 0,
        max_wait: float | None = None,
        pool_tokens: int | None = None,
        memory: int | float | None = None,
        cache_dtype: str | None = None,
        host_memory: int | None = None,
    ):
        if not isinstance(model, LanguageModel):
            raise ValueError(
                f"model must be a language model, the first of what `jaxcp.load` gives; got "
                f"{type(model).__name__}"
            )
        if not isinstance(tokenizer, Tokenizer | None):
            raise ValueError(
                "tokenizer must be the second of what `jaxcp.load` gives, or None for token ids; "
                f"got {type(tokenizer).__name__}"
            )
        limit = getattr(model.config, "max_positions", MOST)
        self.max_len = integer("max_len", max_len, 1, limit, "the model's positions")
        self.model, self.tokenizer, self.strategy = model, tokenizer, strategy
        stops = getattr(model, "stop_tokens", ()) if stop_tokens is None else stop_tokens
        self.stop_tokens = checked_stop_tokens(model, stops)
        self.max_wait = longest_wait(max_wait)
        self.drafts = integer("drafts", drafts, 0, FEW - 1)
        self._asking = Asking(model, tokenizer, self.stop_tokens, self.drafts)
        if strategy is not None:
            check_strategy(model, strategy, self.max_len)
        self.max_rows = integer("max_rows", max_rows, 1, MOST)
        if pool_tokens is not None:
            pool_tokens = integer("pool_tokens", pool_tokens, 1, MOST)
        check_memory(memory, pool_tokens)
        self.pool_tokens, self.memory, self.cache_dtype = pool_tokens, memory, cache_dtype
        self.host_memory = integer("host_memory", 0 if host_memory is None else host_memory, 0)
        check_mesh(model)
        check_decides_alike(memory, self.host_memory)
        self._lock = threading.RLock()
        self._awaited = Awaited(queue=self.queue, step=self.step, cancel=self.cancel)
        self._mesh = None if jax.sharding.get_abstract_mesh().empty else jax.sharding.get_mesh()
        if cache_dtype is not None or memory is not None or drafts or self.host_memory:
            _ = self.geometry  # says what is wrong with them

    def session(
        self,
        *,
        seed: int = 0,
        thinking: str | int | None = None,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        plain: bool = False,
    ) -> Session:
        """Begin a conversation: a `ChatSession` where the checkpoint has a chat template.

        Args:
          seed: of the sampling.
          thinking, system, tools: as `ChatSession` has them.
          plain: send texts as they are, template or not.
        Raises:
          ValueError: the seed is none; the template refuses `thinking`, `system` or `tools`, or
            there is none for them.
        """
        chat = {"thinking": thinking, "system": system, "tools": tools}
        return begin(self, seed=seed, plain=plain, **chat)

    def generate(
        self, prompts: Sequence[str | Sequence[int]], sampling: Sampling | None = None
    ) -> list[Result]:
        """Answer all of the prompts, as many at a time as fit; `n` answers of each in a row.

        Raises:
          ValueError: a prompt that is empty or can never fit, or options that this model or
            tokenizer cannot honour; then none of them runs.
          FloatingPointError: the logits of one are not finite.
        """
        if isinstance(prompts, str | bytes) or not hasattr(prompts, "__iter__"):
            raise ValueError('generate takes a list of prompts; give ["one"] for one')
        requests = [one for prompt in prompts for one in self._asking.requests(prompt, sampling)]
        added: list[Request] = []
        try:
            for request in requests:
                with self._lock, deferred():
                    self.groups.add(request, time.monotonic())
                    added.append(request)
            while not all(request.done for request in requests):
                self.step()
        finally:
            with deferred():
                for request in added:
                    self.cancel(request)
        for request in requests:
            if request.error is not None:
                raise request.error
        return [self.result(request) for request in requests]

    def add(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> Request:
        """Queue a request, which `step` works on.

        Raises:
          ValueError: a prompt that is empty, has ids that are none, or can never fit; options that
            this model or tokenizer cannot honour; `n` above 1.
        """
        request = self.request(prompt, sampling)
        self.queue(request)
        return request

    def queue(self, request: Request) -> None:
        """Queue a request that `request` or `requests` gave, which `step` works on.

        Raises:
          ValueError: it was queued before, or is no request of this engine.
        """
        self._check_own("queue", request)
        with self._lock, deferred():
            self.groups.add(request, time.monotonic())

    def request(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> Request:
        """A request that is not queued yet, for `stream` or `queue`.

        Raises:
          ValueError: as `add`.
        """
        request, *others = self.requests(prompt, sampling)
        if others:
            raise ValueError(
                f"this is for one answer, not n={len(others) + 1}: take each of `sampling.each()`"
            )
        return request

    def requests(
        self, prompt: str | Sequence[int], sampling: Sampling | None = None
    ) -> list[Request]:
        """A request for each of `n` answers, not queued yet: give them to `queue` in this order.

        The first computes the prompt, the others wait for that and share its pages.

        Raises:
          ValueError: as `add`, but for `n`.
        """
        requests = self._asking.requests(prompt, sampling)
        for request in requests:
            self.groups.check_size(request)
        return requests

    def stream(self, request: Request) -> Iterator[int]:
        """Queue a request and yield the tokens of its answer as they come; leaving cancels it.

        Every other request goes on as well meanwhile.

        Raises:
          ValueError: it was queued before, or is no request of this engine.
          FloatingPointError: its logits are not finite.
        """
        self._check_own("stream", request)
        added = False
        try:
            with self._lock, deferred():
                self.groups.add(request, time.monotonic())
                added = True
            given = request.prompt_len
            while not request.done or given < len(request.tokens):
                if given < len(request.tokens):
                    yield request.tokens[given]
                    given += 1
                else:
                    self.step()
        finally:
            if added:
                self.cancel(request)
        if request.error is not None:
            raise request.error

    def astream(self, request: Request) -> AsyncIterator[int]:
        """Do as `stream` does, for `async for`: steps run in threads, and coroutines share them."""
        self._check_own("astream", request)
        return self._awaited.stream(request)

    def score(self, prompt: str | Sequence[int], *, best: int = 0) -> list[TokenLogProbs]:
        """Log-probabilities of the tokens of a prompt after the first, each by all those before it,
        with as many of the most probable in its place, up to 20; see `jaxcp.inference.score`.

        Raises:
          ValueError: as `ids`; more tokens than `max_len`; `best` is out of range.
          FloatingPointError: one is NaN.
        """
        ids = self.ids(prompt)
        integer("the number of tokens", len(ids), 1, self.max_len, "max_len")
        best = integer("best", best, 0, min(MOST_LOGPROBS, self.model.config.vocab_size))
        with self.on_mesh():
            return score(self.model, ids, best, strategy=self.strategy, alone=self._lock)

    def ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt.

        Raises:
          ValueError: it is empty, has ids that are none, or is text and there is no tokenizer.
        """
        return self._asking.ids(prompt)

    def step(self) -> list[Request]:
        """One token more for every request that runs, or a chunk of a prompt; those that ended.

        The step is sent while the one before may still run; then what that one sampled is read.

        Raises:
          Exception: the step failed. Its requests have failed, and all others compute anew.
        """
        with self._lock:
            return self.loop.step()

    def warm_up(self) -> None:
        """Compile all that requests need, which none of them then has to wait for."""
        with self._lock:
            self.loop.warm_up()

    def cancel(self, request: Request) -> None:
        """End a request, and free what it holds; one that is over stays as it is.

        Raises:
          ValueError: it is no request of this engine.
        """
        _check_request("cancel", request)
        with self._lock, deferred():
            self.groups.cancel(request, time.monotonic())

    def result(self, request: Request) -> Result:
        """The answer of a request so far.

        Raises:
          ValueError: it is no request.
        """
        _check_request("result", request)
        return result_of(request, self.tokenizer)

    @functools.cached_property
    def geometry(self) -> Geometry:
        """Sizes of the pool and of its batches."""
        with self.on_mesh():
            return geometry_of(
                self.model, max_len=self.max_len, max_rows=self.max_rows,
                pool_tokens=self.pool_tokens, memory=self.memory, cache_dtype=self.cache_dtype,
                drafts=self.drafts, host_memory=self.host_memory,
            )  # fmt: skip

    @property
    def scheduler(self) -> Scheduler:
        """Who runs, and who has which page; ValueError where `groups` has several."""
        if len(self.groups.schedulers) > 1:
            raise ValueError("the mesh has several groups of devices: see Engine.groups")
        return self.groups.schedulers[0]

    @functools.cached_property
    def groups(self) -> Groups:
        """A scheduler for every group of devices along the mesh's `data`."""
        g = self.geometry
        chunks = ChunkLimits(
            sizes=self.runner.sizes, seconds=self._pace.seconds, max_wait=self.max_wait,
            together=self._pace.together(self.runner.together),
        )  # fmt: skip
        limits = Limits(
            max_rows=g.max_rows, max_len=self.max_len, chunks=chunks, snapshot_pages=16,
            host=self.runner.host.limits(),
        )  # fmt: skip
        sizes = {
            "shards": g.shards, "pages_per_shard": g.pages_per_shard, "page_size": g.page_size,
            "states": g.states,
        }  # fmt: skip
        return Groups([Scheduler(Pages(**sizes), limits) for _ in range(g.groups)])

    @functools.cached_property
    def _pace(self) -> Pace:
        return Pace(self.runner.sizes)

    @functools.cached_property
    def loop(self) -> Loop:
        """The steps, one after the other."""
        return Loop(self.groups, self.runner, self._pace, self.on_mesh)

    @functools.cached_property
    def runner(self) -> Runner:
        """The pool on devices, and what computes on it."""
        with self.on_mesh():
            return Runner(self.model, self.geometry, strategy=self.strategy)

    def _check_own(self, method: str, request: Any) -> None:
        _check_request(method, request)
        if request not in self._asking.made:
            raise ValueError(
                f"this request is another engine's: {method} takes what `request` gave"
            )

    def bytes_per_device(self, tokens: int) -> int:
        """Bytes of the pool that a sequence of so many tokens takes, where it takes most."""
        pages = self.groups.schedulers[0].pages
        share = pages.on_shard(pages.places(tokens), 0) / self.geometry.pages_per_shard
        return self.runner.pool.bytes_of(share, 1 / max(1, self.geometry.states))

    def on_mesh(self) -> contextlib.AbstractContextManager:
        """The mesh this engine was made under, as a context."""
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)


def _check_request(method: str, request: Any) -> None:
    if not isinstance(request, Request):
        raise ValueError(f"{method} takes what `add` gave; got {type(request).__name__}")
