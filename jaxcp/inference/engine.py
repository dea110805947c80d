# SPDX-License-Identifier: Apache-2.0
"""A model ready to talk: with its tokenizer, length, strategy, and the mesh it was made under."""

import contextlib
from collections.abc import Collection, Set
from typing import Any

import jax
import numpy as np

from jaxcp.context_parallel import Strategy
from jaxcp.inference.checks import integer, token_ids
from jaxcp.inference.session import Session
from jaxcp.inference.steps import prefill
from jaxcp.text.tokenizer import Tokenizer

TRIED = 64
"""Tokens of the prefill that is traced to see whether a strategy can do it."""


class Engine:
    """Makes sessions. Make it under `jax.set_mesh`; sessions then use that mesh wherever they run.

    Args:
      tokenizer: None to talk in token ids.
      max_len: tokens that a session holds at most, prompts and answers.
      strategy: the strategy for prefill; None lets each turn choose (see `jaxcp.prefill`).
      stop_tokens: ids that end an answer (and are not part of it); None takes those of the
        checkpoint that was loaded, () none.
    Raises:
      ValueError: the model has fewer positions than `max_len`, no embedding of a stop token, or
        what `strategy` needs is not on this mesh.
      NotImplementedError: `strategy` cannot fill a cache of this model.

    >>> engine = jaxcp.Engine(model, tokenizer, max_len=131_072)
    >>> answer = "".join(engine.session().send("The needle is"))
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer | None,
        *,
        max_len: int,
        strategy: Strategy | None = None,
        stop_tokens: Collection[int] | None = None,
    ):
        limit = getattr(model.config, "max_positions", float("inf"))
        self.max_len = integer("max_len", max_len, 1, limit, "the model's positions")
        self.model, self.tokenizer, self.strategy = model, tokenizer, strategy
        if stop_tokens is None:
            stop_tokens = getattr(model, "stop_tokens", ())
        self.stop_tokens = _stop_tokens(model, stop_tokens)
        if strategy is not None:
            _try(model, strategy, min(self.max_len, TRIED))
        self._mesh = None if jax.sharding.get_abstract_mesh().empty else jax.sharding.get_mesh()

    def session(self, *, seed: int = 0) -> "Session":
        """A new conversation with an empty cache; `seed` is that of its sampling."""
        return Session(self, seed=seed)

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
