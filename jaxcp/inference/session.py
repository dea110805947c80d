# SPDX-License-Identifier: Apache-2.0
"""One conversation: text in, pieces of text out, a cache that only grows.

A turn prefills its own tokens and nothing else. The last token of an answer joins the cache with
the next turn.

Steps donate the cache. One that fails or is interrupted may take it along: the session knows its
tokens, and the next turn computes them again.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxcp.inference.checks import integer, token_ids
from jaxcp.inference.sampling import Sampler, sample
from jaxcp.inference.steps import decode_step, prefill


@dataclasses.dataclass(kw_only=True)
class Stats:
    """Numbers of a session; `prefilled`, `reused`, `generated` and seconds of its latest turn."""

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
        """The rate of the tokens after the first, which the prefill gives."""
        return (self.generated - 1) / self.decode_seconds if self.decode_seconds else 0.0


class Session:
    """A conversation on an `Engine`; `Engine.session()` makes it."""

    def __init__(self, engine: Any, *, seed: int = 0):
        self.engine = engine
        seed = integer("seed", seed, 0, 2**32 - 1)  # jax.random.key drops what is above
        with engine.on_mesh():
            self.cache = engine.model.init_cache(1, engine.max_len)
            self._key = jax.random.key(seed)
        self._cached: list[int] = []  # the tokens in the cache
        self._pending: list[int] = []  # answered, not yet in the cache
        self._shared = False
        self._turn: object = None  # the latest `send`
        self.stats = Stats(cache_bytes_per_device=self.cache.bytes_per_device())

    @property
    def tokens(self) -> list[int]:
        """Ids of the conversation: those in the cache, then what the next turn will add to it."""
        return [*self._cached, *self._pending]

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
        tokenizer (then `text` is a sequence of ids). Leaving the loop early is fine, and so is an
        error or an interruption: the conversation then holds what was yielded, and if that is
        nothing, is as it was before. Greedy unless `temperature` is positive.

        Raises (at the call, not at the first piece):
          ValueError: an empty prompt, ids that are no integers or out of range, an option of
            sampling out of range, or more tokens than `max_len` leaves room for.
        """
        sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p)
        ids = self._encode(text)
        max_new_tokens = integer("max_new_tokens", max_new_tokens, 1)
        needed = self.stats.tokens + len(self._pending) + len(ids) + max_new_tokens - 1
        if needed > self.engine.max_len:
            raise ValueError(
                f"the conversation would hold {needed} tokens: {self.stats.tokens} in the cache, "
                f"{len(ids)} of the prompt, up to {max_new_tokens} of the answer; "
                f"max_len={self.engine.max_len}. Shorten the prompt, "
                "ask for fewer new tokens, or make the engine with a larger max_len"
            )
        self._turn = turn = object()
        tokens = self._generate(turn, ids, max_new_tokens, sampler)
        return tokens if self.engine.tokenizer is None else self.engine.tokenizer.stream(tokens)

    def fork(self) -> "Session":
        """A second conversation with the same past. Copies nothing; the first to go on copies."""
        child = object.__new__(Session)
        child.__dict__.update(self._state())
        self._shared = child._shared = True
        return child

    def _encode(self, text) -> list[int]:
        if isinstance(text, str):
            if self.engine.tokenizer is None:
                raise ValueError("this engine has no tokenizer: send token ids")
            text = self.engine.tokenizer.encode(text)
        ids = token_ids(self.engine.model, list(text) if isinstance(text, Iterator) else text)
        if ids.ndim != 1:
            raise ValueError(f"a prompt is one sequence of ids; got the shape {ids.shape}")
        if not ids.size:
            raise ValueError("the prompt is empty; send at least one token")
        return ids.tolist()

    def _generate(
        self, turn: object, ids: list[int], count: int, sampler: Sampler
    ) -> Iterator[int]:
        self._check_turn(turn)
        self._restore_cache()
        ids, reused, stats = [*self._pending, *ids], self.stats.tokens, self.stats
        start = time.perf_counter()
        with self._unless_it_fails():
            token = self._step(prefill, [ids], sampler, strategy=self.engine.strategy)
        stats.turns, stats.reused, stats.prefilled = stats.turns + 1, reused, len(ids)
        stats.prefill_seconds = time.perf_counter() - start
        stats.generated, stats.decode_seconds = 0, 0.0
        for number in range(count):
            if number:
                self._check_turn(turn)
                start = time.perf_counter()
                token = self._step(decode_step, [token], sampler)
                stats.decode_seconds += time.perf_counter() - start
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

    def _step(self, step, tokens: list, sampler: Sampler, **options) -> int:
        """Run one step over `tokens`, which join the cache; the next token."""
        array = np.asarray(tokens, np.int32)
        added, length = array.ravel().tolist(), self.stats.tokens + array.size
        with self.engine.on_mesh():
            logits, self.cache = step(
                self.engine.model, self.cache, array, donate=not self._shared, **options
            )
            # no call in between: what interrupts comes before all of these or after
            self._cached += added
            self._shared, self._pending, self.stats.tokens = False, [], length
            self._key, key = jax.random.split(self._key)
            token = int(draw(logits, key, sampler.options())[0])
            self._pending = [token]
            return token

    def _state(self) -> dict[str, Any]:
        """All of a conversation, with copies of what a step changes in place."""
        copies = {"_cached": list(self._cached), "stats": dataclasses.replace(self.stats)}
        return self.__dict__ | copies

    @contextlib.contextmanager
    def _unless_it_fails(self) -> Iterator[None]:
        """Should what is inside fail, everything is as it was, but for a cache that is donated."""
        before = self._state()
        try:
            yield
        except BaseException:
            vars(self.stats).update(vars(before.pop("stats")))
            self.__dict__.update(before)
            raise

    def _restore_cache(self) -> None:
        """Make all tokens pending again if a step that failed has taken the cache with it."""
        if _length(self.cache) == len(self._cached):
            return
        with self.engine.on_mesh():
            self.cache = self.engine.model.init_cache(1, self.engine.max_len)
        self._cached, self._pending = [], self.tokens
        self._shared, self.stats.tokens = False, 0


draw = jax.jit(sample)
"""`sample`, compiled."""


def _length(cache: Any) -> int | None:
    """Tokens in a cache; None where it was given away or the computation that made it failed."""
    if any(x.is_deleted() for x in jax.tree.leaves(cache)):
        return None
    try:
        return int(np.asarray(cache.lengths)[0])
    except jax.errors.JaxRuntimeError:
        return None
