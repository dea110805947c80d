# SPDX-License-Identifier: Apache-2.0
"""A model ready to talk: with its tokenizer, length, strategy, and the mesh it was made under.

Requests share one pool: `add` queues one, `step` schedules, runs, and takes what came of it.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Collection, Iterator, Sequence, Set
from typing import Any

import jax
import numpy as np

from jaxcp.context_parallel import Strategy
from jaxcp.inference.batch import Geometry
from jaxcp.inference.checks import integer, token_ids
from jaxcp.inference.chunks import ChunkLimits
from jaxcp.inference.interrupts import deferred
from jaxcp.inference.pages import Pages
from jaxcp.inference.request import Request, RequestStats
from jaxcp.inference.runner import Runner
from jaxcp.inference.sampling import Sampling
from jaxcp.inference.scheduler import Limits, Scheduler
from jaxcp.inference.session import Session
from jaxcp.inference.steps import prefill
from jaxcp.text.tokenizer import Tokenizer
from pallas_kernels.dispatch import target_platform

TRIED = 64
"""Tokens of the prefill that is traced to see whether a strategy can do it."""


PAGE = {"cpu": 32, "gpu": 64, "tpu": 256}
"""Tokens of a page: a block of the decode kernel, or a part of one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Answer of a request, with how it went."""

    tokens: list[int]
    text: str | None
    """None without a tokenizer."""
    finish_reason: str | None
    """"stop" or "length"."""
    stats: RequestStats


class Engine:
    """Answers many requests over one pool, and makes sessions.

    Make it under `jax.set_mesh`; it then uses that mesh wherever it runs.

    Args:
      tokenizer: None to talk in token ids.
      max_len: tokens that a request or session holds at most, prompt and answer.
      max_rows: requests that run at a time; more wait.
      pool_tokens: tokens that the pool has room for; default 4 requests of `max_len`. The pool is
        made by the first request. Sessions have caches of their own.
      strategy: the strategy for prefill; None lets each turn choose (see `jaxcp.prefill`).
      stop_tokens: ids that end an answer (and are not part of it); None takes those of the
        checkpoint that was loaded, () none.
    Raises:
      ValueError: the model has fewer positions than `max_len`, no embedding of a stop token, or
        what `strategy` needs is not on this mesh.
      NotImplementedError: `strategy` cannot fill a cache of this model.

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
        pool_tokens: int | None = None,
    ):
        limit = getattr(model.config, "max_positions", float("inf"))
        self.max_len = integer("max_len", max_len, 1, limit, "the model's positions")
        self.model, self.tokenizer, self.strategy = model, tokenizer, strategy
        if stop_tokens is None:
            stop_tokens = getattr(model, "stop_tokens", ())
        self.stop_tokens = _stop_tokens(model, stop_tokens)
        if strategy is not None:
            _try(model, strategy, min(self.max_len, TRIED))
        self.max_rows = integer("max_rows", max_rows, 1)
        pool_tokens = 4 * self.max_len if pool_tokens is None else pool_tokens
        self.pool_tokens = integer("pool_tokens", pool_tokens, 1)
        _check_mesh(model)
        self._mesh = None if jax.sharding.get_abstract_mesh().empty else jax.sharding.get_mesh()

    def session(self, *, seed: int = 0) -> "Session":
        """A new conversation with an empty cache; `seed` is that of its sampling."""
        return Session(self, seed=seed)

    def generate(
        self, prompts: Sequence[str | Sequence[int]], sampling: Sampling | None = None
    ) -> list[Result]:
        """Answer all of the prompts, as many at a time as fit.

        Raises:
          ValueError: a prompt that is empty or can never fit; then none of them runs.
        """
        if isinstance(prompts, str | bytes):
            raise ValueError('generate takes a list of prompts; give ["one"] for one')
        requests = [self._request(prompt, sampling) for prompt in prompts]
        added: list[Request] = []
        try:
            for request in requests:
                with deferred():
                    self.scheduler.add(request, time.monotonic())
                    added.append(request)
            while not all(request.done for request in requests):
                self.step()
        finally:
            with deferred():
                for request in added:
                    self.cancel(request)
        return [self.result(request) for request in requests]

    def add(self, prompt: str | Sequence[int], sampling: Sampling | None = None) -> Request:
        """Queue a request, which `step` works on.

        Raises:
          ValueError: a prompt that is empty, has ids that are none, or can never fit.
        """
        request = self._request(prompt, sampling)
        with deferred():
            self.scheduler.add(request, time.monotonic())
            return request

    def step(self) -> list[Request]:
        """One token more for every request that runs, or a chunk of a prompt; those that it ended.

        Raises:
          Exception: the step failed. Its requests have failed, and all others compute anew.
        """
        with deferred() as allowed:
            plan = self.scheduler.schedule(time.monotonic())
            if not plan.rows:
                return []
            try:
                with allowed(), self.on_mesh():
                    sampled = self.runner.run(plan)
            except BaseException as error:
                self.scheduler.fail(plan, error, time.monotonic())
                self._start_anew()
                raise
            self.scheduler.advance(plan, sampled, time.monotonic())
            return [row.request for row in plan.rows if row.request.done]

    def _start_anew(self) -> None:
        """Forget what was computed: the pool may have gone with a step that failed."""
        self.scheduler.forget()
        with self.on_mesh():
            self.runner.reset()

    def warm_up(self) -> None:
        """Compile all that requests need, which none of them then has to wait for."""
        with deferred() as allowed:
            try:
                with allowed(), self.on_mesh():
                    self.runner.warm_up()
            except BaseException:
                self._start_anew()
                raise

    def cancel(self, request: Request) -> None:
        """End a request, and free what it holds; one that is over stays as it is.

        Raises:
          ValueError: it is no request of this engine.
        """
        if not isinstance(request, Request):
            raise ValueError(f"cancel takes what `add` gave; got {type(request).__name__}")
        with deferred():
            self.scheduler.cancel(request, time.monotonic())

    def result(self, request: Request) -> Result:
        """The answer of a request so far."""
        text = None if self.tokenizer is None else self.tokenizer.decode(request.answer)
        return Result(
            tokens=request.answer,
            text=text,
            finish_reason=request.finish_reason,
            stats=request.stats,
        )

    def _request(self, prompt, sampling) -> Request:
        sampling = Sampling() if sampling is None else sampling
        if not isinstance(sampling, Sampling):
            raise ValueError(f"sampling must be a jaxcp.Sampling; got {type(sampling).__name__}")
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("this engine has no tokenizer: give token ids")
            prompt = self.tokenizer.encode(prompt)
        ids = token_ids(self.model, list(prompt) if isinstance(prompt, Iterator) else prompt)
        if ids.ndim != 1:
            raise ValueError(f"a prompt is one sequence of ids; got the shape {ids.shape}")
        stops = self.stop_tokens
        if sampling.stop_tokens is not None:
            stops = _stop_tokens(self.model, sampling.stop_tokens)
        return Request(
            ids.tolist(),
            max_new_tokens=sampling.max_new_tokens,
            sampling=sampling,
            stop_tokens=stops,
        )

    @functools.cached_property
    def geometry(self) -> Geometry:
        """Sizes of the pool and of its batches."""
        with self.on_mesh():
            axes = jax.sharding.get_abstract_mesh().shape
            shards, page = axes.get("seq", 1), PAGE[target_platform()]
            keeps_state = _keeps_state(self.model, page)
        if axes.get("data", 1) > 1:
            raise NotImplementedError(
                f"requests share one pool, which has no groups for data={axes['data']} yet; make "
                "the mesh with data=1 and its devices along seq"
            )
        longest = -(-self.max_len // page)
        return Geometry(
            shards=shards,
            page_size=page,
            pages_per_shard=max(1, -(-self.pool_tokens // (page * shards))),
            states=4 * self.max_rows if keeps_state else 0,
            max_rows=self.max_rows,
            listed=-(-longest // shards),
            ngram=getattr(self.model.config, "ngram_width", 1),
        )

    @functools.cached_property
    def scheduler(self) -> Scheduler:
        """Who runs, and who has which page."""
        g = self.geometry
        pages = Pages(
            shards=g.shards, pages_per_shard=g.pages_per_shard, page_size=g.page_size,
            states=g.states,
        )  # fmt: skip
        chunks = ChunkLimits(sizes=self.runner.sizes, seconds=lambda count, context: 0.0)
        limits = Limits(
            max_rows=self.max_rows, max_len=self.max_len, chunks=chunks, snapshot_pages=16
        )
        return Scheduler(pages, limits)

    @functools.cached_property
    def runner(self) -> Runner:
        """The pool on devices, and what computes on it."""
        with self.on_mesh():
            return Runner(self.model, self.geometry, strategy=self.strategy)

    def on_mesh(self) -> contextlib.AbstractContextManager:
        """The mesh this engine was made under, as a context."""
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)


def _stop_tokens(model: Any, ids: Any) -> tuple[int, ...]:
    try:
        stops = token_ids(model, list(ids) if isinstance(ids, Set) else ids)
    except ValueError as error:
        raise ValueError(f"stop_tokens: {error}") from error
    if stops.ndim != 1:
        raise ValueError(f"stop_tokens must be ids, such as (2,) or () for none; got {ids!r}")
    return tuple(stops.tolist())


def _check_mesh(model: Any) -> None:
    """Raise ValueError where the model lies on a mesh that is not in scope."""
    meshes = {getattr(x.sharding, "mesh", None) for x in jax.tree.leaves(model) if _is_there(x)}
    several = [mesh for mesh in meshes if mesh is not None and mesh.size > 1]
    if several and jax.sharding.get_abstract_mesh().empty:
        raise ValueError(
            f"the model lies on a mesh of {several[0].size} devices, and none is in scope: make "
            "the engine under `jax.set_mesh`, as the model was"
        )


def _is_there(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)


def _keeps_state(model: Any, page: int) -> bool:
    pool = jax.eval_shape(lambda: model.init_pool(pages=1, page=page, states=1))
    return any(not kind.in_pages for kind in pool.layers.values())


def _try(model: Any, strategy: Strategy, tokens: int) -> None:
    """Trace a prefill by this strategy on the mesh in scope, and compute nothing.

    Raises:
      ValueError, NotImplementedError: what the strategy says of this model and mesh.
    """
    if not isinstance(strategy, Strategy):
        raise ValueError(f"strategy must be one, such as jaxcp.Ring(); got {strategy!r}")
    rows = jax.sharding.get_abstract_mesh().shape.get("data", 1)
    cache, text = model.init_cache(rows, tokens), np.zeros((rows, tokens), np.int32)
    jax.eval_shape(lambda: prefill(model, cache, text, strategy=strategy)[0])
