# SPDX-License-Identifier: Apache-2.0
"""One conversation: text in, pieces of text out, a cache that only grows.

A turn prefills its own tokens and nothing else. The last token of an answer is not in the cache
until the next turn needs it.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxcp.inference.steps import check_ids, decode_step, prefill
from jaxcp.sampling import Sampler

if TYPE_CHECKING:
    from jaxcp.inference.engine import Engine


@dataclasses.dataclass(kw_only=True)
class Stats:
    """Of a session; `prefilled`, `reused`, `generated` and the seconds are of its latest turn."""

    tokens: int = 0
    """In the cache."""
    prefilled: int = 0
    """Tokens this turn computed: its own text, and the last token of the answer before."""
    reused: int = 0
    """Tokens this turn found in the cache."""
    generated: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    cache_bytes_per_device: int = 0
    turns: int = 0

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prefilled / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Of the tokens after the first, which the prefill gives."""
        return (self.generated - 1) / self.decode_seconds if self.decode_seconds else 0.0


class Session:
    """Made by `Engine.session()`."""

    def __init__(self, engine: "Engine", *, seed: int = 0):
        self.engine = engine
        with engine.on_mesh():
            self._cache = engine.model.init_cache(1, engine.max_len)
            self._key = jax.random.key(seed)
        self._pending: list[int] = []  # answered, not yet in the cache
        self._shared = False
        self._turn: object = None  # the latest `send`
        self.stats = Stats(cache_bytes_per_device=self._cache.bytes_per_device())

    def send(
        self,
        text: str | Sequence[int],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
    ) -> Iterator[Any]:
        """Append `text` to the conversation and yield the answer in pieces as it is made.

        Pieces are text that never splits a character; token ids where the engine has no
        tokenizer (then `text` is a sequence of ids). Leaving the loop early is fine: the
        conversation then holds what was yielded. Greedy unless `temperature` is positive.

        Raises (at the call, not at the first piece):
          ValueError: an empty prompt, ids out of range, or more tokens than `max_len` leaves
            room for.
        """
        sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p)
        ids = self._encode(text)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
        needed = self.stats.tokens + len(self._pending) + len(ids) + max_new_tokens - 1
        if needed > self.engine.max_len:
            raise ValueError(
                f"the conversation would hold {needed} tokens: {self.stats.tokens} in the cache, "
                f"{len(ids)} of the prompt, up to {max_new_tokens} of the answer; "
                f"max_len={self.engine.max_len}. Shorten the prompt, "
                "ask for fewer new tokens, or make the engine with a larger max_len"
            )
        self._turn = turn = object()
        tokens = self._generate(turn, [*self._pending, *ids], max_new_tokens, sampler)
        return tokens if self.engine.tokenizer is None else self.engine.tokenizer.stream(tokens)

    def fork(self) -> "Session":
        """A second conversation with the same past. Copies nothing; the first to go on copies."""
        child = object.__new__(Session)
        child.__dict__.update(self.__dict__)
        child._pending, child.stats = list(self._pending), dataclasses.replace(self.stats)
        self._shared = child._shared = True
        return child

    def _encode(self, text) -> list[int]:
        if isinstance(text, str):
            if self.engine.tokenizer is None:
                raise ValueError("this engine has no tokenizer: send token ids")
            text = self.engine.tokenizer.encode(text)
        ids = [int(i) for i in text]
        if not ids:
            raise ValueError("the prompt is empty; send at least one token")
        check_ids(self.engine.model, np.asarray(ids))
        return ids

    def _generate(
        self, turn: object, ids: list[int], count: int, sampler: Sampler
    ) -> Iterator[int]:
        self._check_turn(turn)
        stats = self.stats
        stats.turns, stats.reused, stats.prefilled = stats.turns + 1, stats.tokens, len(ids)
        stats.generated, stats.decode_seconds = 0, 0.0
        start = time.perf_counter()
        token = self._step(
            prefill, np.asarray([ids], np.int32), sampler, attention=self.engine.attention
        )
        stats.prefill_seconds = time.perf_counter() - start
        for number in range(count):
            if number:
                self._check_turn(turn)
                start = time.perf_counter()
                token = self._step(decode_step, np.asarray([token], np.int32), sampler)
                stats.decode_seconds += time.perf_counter() - start
            self._pending = [token]
            if token in self.engine.stop_tokens:
                return
            stats.generated += 1
            yield token

    def _check_turn(self, turn: object) -> None:
        if turn is not self._turn:
            raise RuntimeError(
                "an answer cannot go on after a later send: its tokens would enter the "
                "conversation twice. Read an answer to the end, or leave it, before the next send"
            )

    def _step(self, step, tokens: np.ndarray, sampler: Sampler, **options) -> int:
        """Run one step over `tokens`; the next token."""
        with self.engine.on_mesh():
            logits, self._cache = step(
                self.engine.model, self._cache, tokens, donate=not self._shared, **options
            )
            self._shared, self._pending = False, []
            self.stats.tokens += tokens.size
            self._key, key = jax.random.split(self._key)
            return int(_sample(logits, key, sampler)[0])


@functools.partial(jax.jit, static_argnums=2)
def _sample(logits, key, sampler):
    return sampler(logits, key)
