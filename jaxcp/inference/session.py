# SPDX-License-Identifier: Apache-2.0
"""One conversation: text in, pieces of text out, over the pool of an engine.

A turn is a request whose prompt is all that was said. The engine finds what it has computed of
that before, so a turn computes its own tokens and nothing else; so does a fork, and a conversation
whose pages had to go is computed again.
"""

import contextlib
import dataclasses
import time
from array import array
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from jaxcp.inference.checks import integer
from jaxcp.inference.request import Request
from jaxcp.inference.sampling import Sampling


@dataclasses.dataclass(kw_only=True)
class Stats:
    """Numbers of a session; those from `prefilled` to `decode_seconds` are of its latest turn."""

    tokens: int = 0
    """In the pool: the last token of an answer joins it with the next turn."""
    prefilled: int = 0
    """Tokens this turn computed: its own text, and the last token of the answer before."""
    reused: int = 0
    """Tokens this turn found in the pool, or on the host."""
    restored: int = 0
    """Tokens of `reused` that would have been computed but for the host."""
    lost: int = 0
    """Tokens that were in the pool and did not serve this turn: a template dropped or changed what
    stood before them, or their pages had to go."""
    generated: int = 0
    drafted: int = 0
    """Tokens that were guessed, of an engine with `drafts`."""
    accepted: int = 0
    """Guesses that were right."""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    cache_bytes_per_device: int = 0
    """Bytes of the pool that these tokens take, on the device with the most."""
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
        self.seed = integer("seed", seed, 0, 2**32 - 1)
        self.stats = Stats()
        self._tokens = array("i")
        self._turn: Request | None = None  # of the latest `send`

    @property
    def tokens(self) -> list[int]:
        """Ids of the conversation, stop tokens that ended an answer among them."""
        return list(self._tokens)

    def send(
        self,
        text: str | Sequence[int],
        **options: Any,
    ) -> Iterator[Any]:
        """Append `text` to the conversation and yield the answer in pieces as it is made.

        Pieces are text that never splits a character; token ids where the engine has no
        tokenizer (then `text` is a sequence of ids). Leaving the loop early is fine, and so is an
        error or an interruption: the conversation then holds what was yielded, and if that is
        nothing, is as it was before.

        Args:
          options: as `Sampling` has them, such as `max_new_tokens`, `temperature`, `stop`; the seed
            is the session's. Greedy unless `temperature` is positive.

        Raises (at the call, not at the first piece):
          ValueError: an empty prompt, ids that are no integers or out of range, an option of
            sampling out of range, or more tokens than `max_len` or the pool leave room for.
        """
        sampling = Sampling(**({"seed": self.seed} | options))
        ids, new = self.engine.ids(text), sampling.max_new_tokens
        self._check_room(
            len(self._tokens) + len(ids) + new - 1,
            f"{len(self._tokens)} so far, {len(ids)} of the prompt, up to {new} of the answer",
        )
        turn = self.engine.request([*self._tokens, *ids], sampling)
        before, self._turn = self._turn, turn
        tokens, tokenizer = self._answer(turn, before), self.engine.tokenizer
        return tokens if tokenizer is None else tokenizer.stream(tokens, stop=sampling.stop)

    def fork(self) -> "Session":
        """A second conversation with the same past, which is neither computed nor kept twice."""
        child = Session(self.engine, seed=self.seed)
        child._tokens, child.stats = self._tokens[:], dataclasses.replace(self.stats)
        return child

    def _check_room(self, needed: int, parts: str) -> None:
        if needed > self.engine.max_len:
            raise ValueError(
                f"the conversation would hold {needed} tokens: {parts}; "
                f"max_len={self.engine.max_len}. Shorten the prompt, "
                "ask for fewer new tokens, or make the engine with a larger max_len"
            )

    def _answer(self, turn: Request, before: Request | None) -> Generator[int, None, None]:
        self._check_turn(turn)
        self._leave(before)
        with contextlib.closing(self.engine.stream(turn)) as answer:
            start = time.perf_counter()
            token = next(answer, None)
            self._begin(turn, time.perf_counter() - start)
            while token is not None:
                self._hold(turn, token)
                yield token
                self._check_turn(turn)
                start = time.perf_counter()
                token = next(answer, None)
                self.stats.decode_seconds += time.perf_counter() - start
        self.stats.drafted, self.stats.accepted = turn.stats.drafted, turn.stats.accepted
        if turn.stop_token is not None:
            self._tokens.append(turn.stop_token)

    def _leave(self, turn: Request | None) -> None:
        """End a turn that nobody reads any more."""
        if turn is not None and not turn.done and turn.arrival >= 0:
            self.engine.cancel(turn)

    def _begin(self, turn: Request, seconds: float) -> None:
        """Hold and count the prompt of a turn, which is computed."""
        self._tokens, stats = turn.tokens[: turn.prompt_len], self.stats
        stats.turns, stats.reused = stats.turns + 1, turn.stats.reused
        stats.restored = turn.stats.restored
        stats.lost = max(0, stats.tokens - stats.reused)
        stats.prefilled = turn.prompt_len - turn.stats.reused
        stats.prefill_seconds = seconds
        stats.generated, stats.decode_seconds = 0, 0.0
        stats.tokens = turn.prompt_len
        stats.cache_bytes_per_device = self.engine.bytes_per_device(stats.tokens)

    def _hold(self, turn: Request, token: int) -> None:
        """Hold a token that is yielded, and count it."""
        self._tokens.append(token)
        stats = self.stats
        stats.generated, stats.tokens = stats.generated + 1, len(self._tokens) - 1
        stats.drafted, stats.accepted = turn.stats.drafted, turn.stats.accepted
        stats.cache_bytes_per_device = self.engine.bytes_per_device(stats.tokens)

    def _check_turn(self, turn: Request) -> None:
        if turn is not self._turn:
            raise RuntimeError(
                "an answer cannot go on after a later send: its tokens would enter the "
                "conversation twice. Read an answer to the end, or leave it, before the next send"
            )
