# SPDX-License-Identifier: Apache-2.0
"""A conversation by the checkpoint's own chat template: messages in, thinking, text and calls out.

Each turn renders all of it anew. The template decides what of earlier turns is still there, and the
engine finds what it has computed of what is: `Stats` says how much that was.
"""

import contextlib
import copy
import dataclasses
import itertools
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from jaxcp.inference.request import Request
from jaxcp.inference.sampling import GRAMMARS, Sampling
from jaxcp.inference.session import Session
from jaxcp.text.answer import Answer, Call, Piece, calls_of
from jaxcp.text.constrained import AnswerGrammar, Constrained
from jaxcp.text.known_ids import in_known_ids

MOST_NEW_TOKENS = 4096
"""Tokens of an answer at most, thinking among them, where nobody says how many."""


class ChatSession(Session):
    """A conversation of messages; `Engine.session()` makes it where there is a chat template.

    `thinking`, `system` and `tools` may be changed between turns, and are for all that follows.

    >>> session = engine.session(thinking="low", system="Answer in one word.")
    >>> for piece in session.send("Who is Pierre?", reasoning=True):
    ...     print(piece, end="" if piece.kind == "text" else "\\r")

    Args:
      thinking: one of the template's levels, such as "no_think", "low" or "high"; a number of
        tokens after which the thinking is closed; None for what the template does by itself.
      system: the system message.
      tools: functions with JSON schemas, in OpenAI's form; calls of those with `"strict": True`
        follow their schemas.
    Raises:
      ValueError: the template refuses one of them.
    """

    def __init__(
        self,
        engine: Any,
        *,
        thinking: str | int | None = None,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        seed: int = 0,
    ):
        super().__init__(engine, seed=seed)
        self.thinking, self.system, self.tools = thinking, system, tools
        self._history: list[dict[str, Any]] = []
        self._answered: Answer | None = None  # follows the history
        self._later_part: Request | None = None  # of a turn that takes two requests
        self._prompt([{"role": "user", "content": "?"}])

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation in OpenAI's form, reasoning that templates drop included."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return copy.deepcopy(system + self._said())

    @property
    def calls(self) -> list[Call]:
        """Calls of tools that the last answer ends with; `reply` gives their results."""
        said = self._said()
        return calls_of(said[-1]) if said else []

    def send(  # type: ignore[override]  # a message, not ids
        self, text: str, *, reasoning: bool = False, **options: Any
    ) -> Iterator[Piece]:
        """Say `text` and yield the pieces of the answer as they are made.

        Leaving the loop early is fine, and so is an error or an interruption: the conversation then
        holds what was yielded, and if that is nothing, is as it was before.

        Args:
          reasoning: yield what is thought as well; `Piece.kind` is "reasoning" or "text".
          options: as `Sampling` has them; the seed is the session's. `max_new_tokens` count
            thinking and answer, by default as many as there is room for up to 4,096. Stop strings
            and grammars are for the answer alone.

        Raises (at the call, not at the first piece):
          ValueError: no text, what the template refuses, an option of sampling out of range, or
            more tokens than `max_len` or the pool leave room for.
        """
        if not text:
            raise ValueError("the prompt is empty; send some text")
        return self._ask([{"role": "user", "content": text}], reasoning, options)

    def reply(
        self, results: Sequence[Any], *, reasoning: bool = False, **options: Any
    ) -> Iterator[Piece]:
        """Give the results of `calls`, in their order, and yield the answer as `send` does.

        Args:
          results: one for each call: text, or data that is written as JSON.
        Raises:
          ValueError: there are more or fewer results than calls; and as `send`.
        """
        calls = self.calls
        if isinstance(results, str) or len(results) != len(calls):
            raise ValueError(
                f"needed a list of {len(calls)} results, one for each of `session.calls`; got "
                f"{results!r:.100}"
            )
        messages = [
            {"role": "tool", "tool_call_id": call.id, "content": _written(result)}
            for call, result in zip(calls, results, strict=True)
        ]
        return self._ask(messages, reasoning, options)

    def fork(self) -> "ChatSession":
        """A second conversation with the same past, which is neither computed nor kept twice."""
        child = copy.copy(self)
        child._tokens, child.stats = self._tokens[:], dataclasses.replace(self.stats)
        child._history, child._answered, child._turn = self._said(), None, None
        return child

    def undo(self) -> str:
        """Take back the latest `send` and all that came of it; return its text.

        Raises:
          ValueError: nothing was sent.
        """
        said = self._said()
        sent = [i for i, message in enumerate(said) if message["role"] == "user"]
        if not sent:
            raise ValueError("there is nothing to take back: nothing was sent")
        self._leave(self._turn)
        self._history, self._answered, self._turn = said[: sent[-1]], None, None
        return said[sent[-1]]["content"]

    def _said(self) -> list[dict[str, Any]]:
        return self._history + ([] if self._answered is None else [self._answered.message()])

    def _prompt(self, history: list[dict[str, Any]]) -> Any:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.engine.tokenizer.chat.prompt(system + history, self.tools, self.thinking)

    def _ask(
        self, new: list[dict[str, Any]], reasoning: bool, options: dict[str, Any]
    ) -> Iterator[Piece]:
        engine, history = self.engine, self._said() + new
        prompt = self._prompt(history)
        ends = sorted({*engine.stop_tokens, *prompt.stop_tokens})
        ids = in_known_ids(engine.tokenizer, prompt.ids, self._tokens, ends)
        end = len(engine.tokenizer.chat.closing) if isinstance(self.thinking, int) else 0
        room = engine.max_len - len(ids) - end + 1
        given = {
            "seed": self.seed, "stop_tokens": ends,
            "max_new_tokens": max(1, min(room, MOST_NEW_TOKENS)),
        }  # fmt: skip
        sampling = Sampling(**(given | options))
        self._check_room(
            len(ids) + end + sampling.max_new_tokens - 1,
            f"{len(ids)} as the template writes it with this turn, up to "
            f"{sampling.max_new_tokens} of the answer"
            + f", {end} that end its thinking"
            * bool(end),
        )
        grammar = _grammar(prompt, sampling)
        answer = Answer(prompt.parser(grammar), sampling.stop)
        closing = answer.closing  # where a prompt begins to think, and the budget is nothing
        answer.push(closing)
        constrained = Constrained(answer, grammar, ends)
        turn = engine.request([*ids, *closing], _part(sampling, constrained))
        before, self._turn = self._turn, turn
        pieces = self._pieces(turn, before, answer, sampling, constrained)
        return self._turned(pieces, answer, history, reasoning)

    def _turned(
        self,
        pieces: Generator[Piece, None, None],
        answer: Answer,
        history: list[dict[str, Any]],
        reasoning: bool,
    ) -> Iterator[Piece]:
        """Yield what is wanted of the pieces, and hold the turn from the first of them on."""
        tokens, stats, held = self._tokens, vars(self.stats) | {}, False
        try:
            with contextlib.closing(pieces):
                for piece in itertools.chain(pieces, [None]):
                    if not held and (piece is None or reasoning or piece.kind == "text"):
                        self._history, self._answered, held = history, answer, True
                    if piece is not None and (reasoning or piece.kind == "text"):
                        yield piece
        finally:
            if not held:
                self._tokens = tokens
                vars(self.stats).update(stats)

    def _pieces(
        self,
        turn: Request,
        before: Request | None,
        answer: Answer,
        sampling: Sampling,
        constrained: Constrained,
    ) -> Generator[Piece, None, None]:
        """Yield all pieces of a turn; another request goes on where thinking is closed, or where it
        begins or ends before an answer by a grammar."""
        goes_on = True
        while goes_on:
            goes_on = False
            with contextlib.closing(self._answer(turn, before)) as tokens:
                for token in tokens:
                    yield from answer.push([token])
                    if answer.stopped:
                        return
                    moved = constrained.moved() or bool(answer.closing)
                    goes_on = moved and self.stats.generated < sampling.max_new_tokens
                    if goes_on:
                        break
            if goes_on:
                closing = answer.closing
                yield from answer.push(closing)
                constrained.moved()
                before = turn
                part = _part(sampling, constrained, self.stats.generated)
                turn = self._go_on(before, closing, part)
        if turn.stop_token is not None:
            yield from answer.push([turn.stop_token])
        yield from answer.finish()

    def _go_on(self, before: Request, closing: Sequence[int], sampling: Sampling) -> Request:
        """Begin the request that goes on with a turn behind `closing`, and counts on."""
        turn = self.engine.request([*self._tokens, *closing], sampling)
        turn.stats.drafted, turn.stats.accepted = before.stats.drafted, before.stats.accepted
        self._turn = self._later_part = turn
        return turn

    def _begin(self, turn: Request, seconds: float) -> None:
        if turn is not self._later_part:
            super()._begin(turn, seconds)
            return
        self._tokens, stats = turn.tokens[: turn.prompt_len], self.stats
        stats.prefilled += turn.prompt_len - turn.stats.reused
        stats.decode_seconds += seconds


def begin(engine: Any, *, seed: int, plain: bool, **chat: Any) -> Session:
    """Begin a conversation on an engine: see `Engine.session`."""
    if not plain and getattr(engine.tokenizer, "chat", None) is not None:
        return ChatSession(engine, seed=seed, **chat)
    if given := [name for name, value in chat.items() if value is not None]:
        why = "plain=True sends texts as they are" if plain else "this one has none"
        raise ValueError(
            f"needed a checkpoint with a chat template for {' and '.join(given)}; {why}. Leave "
            f"{'it' if len(given) == 1 else 'them'} out, and write the text as the model reads it"
        )
    return Session(engine, seed=seed)


def _grammar(prompt: Any, sampling: Sampling) -> AnswerGrammar | None:
    """Give the grammars of an answer that thinking may precede."""
    strict = prompt.strict_grammar(several=True)
    for kind in GRAMMARS:
        if (text := getattr(sampling, kind)) is not None:
            if strict is not None:
                raise ValueError(f"an answer follows one grammar; got {kind} and strict tools")
            return prompt.text_grammar(kind, text)
    return strict


def _part(sampling: Sampling, constrained: Constrained, done: int = 0) -> Sampling:
    """The options of a request that makes what is left of an answer; `Answer` stops at strings."""
    own: dict[str, Any] = dict.fromkeys(GRAMMARS) | constrained.options(sampling.logit_bias)
    left = sampling.max_new_tokens - done
    return dataclasses.replace(sampling, stop=(), max_new_tokens=left, **own)


def _written(result: Any) -> str:
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
