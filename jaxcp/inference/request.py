# SPDX-License-Identifier: Apache-2.0
"""A request: a prompt, what is asked for, what has come of it, and its seat while it runs.

The life of a request, in eight sentences. `add` puts it into the queue, or refuses what can never
fit. `schedule` admits the oldest that waits once there is room for all it may come to hold: it gets
a `Seat`, whose table begins with the pages of a prefix that the tree knows. The rest of its prompt
is computed in chunks, and the last of them gives its first token. From then on it is in every plan,
with its latest token and, where there are some, drafted ones behind it. Its prompt is put into the
tree when it is computed, the answer when it ends, where its next turn finds both. If pages run out
the youngest loses its seat, goes back to the head of the queue with the tokens that it has, and
computes again what the tree has not kept. A stop token, `max_new_tokens`, `finish`, `cancel` or an
exception in a step ends it. Whatever the end, the seat is given back whole and at once.
"""

import dataclasses
import enum
import itertools
from array import array
from collections.abc import Collection, Sequence
from typing import Any

from jaxcp.inference.guesses import Guesses
from jaxcp.inference.prefix_tree import Node


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclasses.dataclass(eq=False, kw_only=True)
class Seat:
    """All that a running request holds.

    A request that is preempted and admitted anew has another seat: `Row.meant` is then False in a
    plan that was made for the one before.
    """

    row: int = -1
    """Its number among `max_rows`: the line of a batch that is its own."""
    state: int | None = None
    """Its state, where the model has layers that keep one."""
    table: list[int] = dataclasses.field(default_factory=list)
    """The page of every place."""
    lock: Node | None = None
    """The node of the tree up to which pages are shared; see `PrefixTree.lock`."""
    parting: int = 0
    """Tokens of it that were in the tree and had no snapshot near: it takes one after them."""
    computed: int = 0
    """Tokens whose computation is known to be done."""
    scheduled: int = 0
    """`computed`, and the tokens of plans in flight."""


@dataclasses.dataclass(kw_only=True)
class RequestStats:
    """Times are those that the caller passes to the scheduler, in seconds."""

    queued: float = 0.0
    admitted: float | None = None
    finished: float | None = None
    token_times: list[float] = dataclasses.field(default_factory=list, repr=False)
    """When each token of the answer came."""
    reused: int = 0
    """Tokens that were found in the tree, or on the host, at the latest admission."""
    restored: int = 0
    """Tokens of `reused` that would have been computed but for what came back from the host."""
    computed: int = 0
    """Tokens that were computed, again after a preemption too."""
    drafted: int = 0
    accepted: int = 0
    preempted: int = 0

    @property
    def queue_seconds(self) -> float | None:
        return None if self.admitted is None else self.admitted - self.queued

    @property
    def time_to_first_token(self) -> float | None:
        return self.token_times[0] - self.queued if self.token_times else None

    @property
    def seconds_between_tokens(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.token_times)]


class Request:
    """A prompt with what is asked for; `answer` grows until `status` says that it is over.

    Args:
      sampling: handed through to whoever samples.
      stop_tokens: ids that end the answer, and are not part of it.
      output: handed through to whoever reads the answer.
      in_turn: its latest token is read before the next one is planned, as a grammar needs.
      guesses: guesses its next tokens; None decodes one by one.
      after: a request with the same prompt, added before. This one waits until that is computed,
        and has its pages.
    Raises:
      ValueError: an empty prompt, or no token asked for.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Any = None,
        stop_tokens: Collection[int] = (),
        output: Any = None,
        in_turn: bool = False,
        guesses: Guesses | None = None,
        after: "Request | None" = None,
    ):
        if not len(prompt):
            raise ValueError("the prompt is empty; send at least one token")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be positive; got {max_new_tokens=}")
        self.tokens = array("i", prompt)
        self.prompt_len, self.max_new_tokens = len(self.tokens), max_new_tokens
        self.sampling, self.stop_tokens = sampling, frozenset(stop_tokens)
        self.output, self.after, self.guesses = output, after, guesses
        self._in_turn = in_turn
        self.shared = False
        if after is not None:
            after.shared = True
        self.status = Status.WAITING
        self.finish_reason: str | None = None
        self.stop_token: int | None = None
        self.error: BaseException | None = None
        self.seat: Seat | None = None
        self.arrival = -1
        self.group = self.unknown = 0  # see `Groups`
        self.stats = RequestStats()

    def __repr__(self) -> str:
        return (
            f"Request({self.status.value}, {self.prompt_len} tokens of the prompt, "
            f"{len(self.tokens) - self.prompt_len} of up to {self.max_new_tokens} of the answer)"
        )

    @property
    def in_turn(self) -> bool:
        """True if its latest token must be read before the next step is planned."""
        return self._in_turn or (self.guesses is not None and self.guesses.wanted)

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.prompt_len :].tolist()

    @property
    def waits(self) -> bool:
        """True while the prompt that it shares is being computed."""
        first = self.after
        if first is None or first.done:
            return False
        return first.seat is None or first.seat.computed < first.prompt_len

    @property
    def max_computed(self) -> int:
        """The most tokens it may come to hold: the last of its answer is not computed."""
        return self.prompt_len + self.max_new_tokens - 1

    @property
    def done(self) -> bool:
        return self.status not in (Status.WAITING, Status.RUNNING)

    def cut(self, count: int) -> None:
        """Drop the last `count` tokens of an answer that has ended at a stop string before them."""
        if count:
            del self.tokens[-count:], self.stats.token_times[-count:]
        self.finish_reason = "stop"
        self.stop_token = None if count else self.stop_token

    def extend(self, tokens: Sequence[int], now: float) -> int:
        """Append to the answer what belongs to it; how many that are."""
        for number, token in enumerate(tokens):
            if token in self.stop_tokens:
                self.finish_reason, self.stop_token = "stop", token
                return number
            self.tokens.append(token)
            self.stats.token_times.append(now)
            if len(self.tokens) > self.max_computed:
                self.finish_reason = "length"
                return number + 1
        return len(tokens)
