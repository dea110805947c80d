# SPDX-License-Identifier: Apache-2.0
"""A model ready to talk: with its tokenizer, length, strategy, and the mesh it was made under."""

import contextlib
from typing import Any

import jax

from jaxcp.context_parallel import Strategy
from jaxcp.inference.session import Session
from jaxcp.tokenizer import Tokenizer


class Engine:
    """Makes sessions. Make it under `jax.set_mesh`; sessions then use that mesh wherever they run.

    Args:
      tokenizer: None to talk in token ids.
      max_len: tokens that a session holds at most, prompts and answers.
      attention: the strategy for prefill; None lets each turn choose (see `jaxcp.prefill`).
      stop_tokens: ids that end an answer (and are not part of it).
    Raises:
      ValueError: the model has fewer positions than `max_len`.

    >>> engine = jaxcp.Engine(model, tokenizer, max_len=131_072)
    >>> answer = "".join(engine.session().send("The needle is"))
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer | None,
        *,
        max_len: int,
        attention: Strategy | None = None,
        stop_tokens: tuple[int, ...] = (),
    ):
        limit = getattr(model.config, "max_positions", max_len)
        if not 1 <= max_len <= limit:
            raise ValueError(
                f"max_len must be in 1..{limit} (the model's positions); got {max_len}"
            )
        self.model, self.tokenizer, self.max_len = model, tokenizer, max_len
        self.attention, self.stop_tokens = attention, tuple(stop_tokens)
        self._mesh = None if jax.sharding.get_abstract_mesh().empty else jax.sharding.get_mesh()

    def session(self, *, seed: int = 0) -> "Session":
        """A new conversation with an empty cache; `seed` is that of its sampling."""
        return Session(self, seed=seed)

    def on_mesh(self) -> contextlib.AbstractContextManager:
        """The mesh this engine was made under, as a context."""
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)
