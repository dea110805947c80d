# SPDX-License-Identifier: Apache-2.0
"""Makes deltas of the ids that a model samples: thinking, answer and calls, as they come."""

from collections.abc import Iterable
from typing import Any

from jaxcp.text.tokenizer import Tokenizer
from jaxcp.text.tools.deltas import Delta, Message, joined
from jaxcp.text.tools.reader import Reader, Symbols


class Parser:
    """Reads one message, id by id; `Prompt.parser()` makes it.

    Nothing that a model writes raises an error: what is no thinking, no call and no text by the
    rules of its format comes as text, with `Delta.malformed`. Joined, the deltas are the same
    however the ids come in pieces.

    >>> parser = prompt.parser()
    >>> for token in request.tokens:
    ...     for delta in parser.push([token]):
    ...         print(delta.kind, delta.text, delta.call)
    >>> parser.finish()
    >>> parser.message()

    Args:
      budget: tokens of thinking after which `closing` has ids.
      closing: what ends the thinking and begins the answer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        reader: Reader,
        symbols: Symbols,
        *,
        budget: int | None = None,
        closing: Iterable[int] = (),
    ):
        self._reader, self._message = reader, Message()
        self._symbol_of = {
            tokenizer.backend.token_to_id(token): symbol for token, symbol in symbols.tokens.items()
        }
        self._text = tokenizer.detokenizer()
        self._budget, self._closing = budget, tuple(closing)
        self.reasoning_tokens = 0
        """Ids so far that were thought."""

    @property
    def reasoning(self) -> bool:
        """True while what comes is thought: no grammar and no stop string is for it."""
        return self._reader.reasoning

    @property
    def closing(self) -> tuple[int, ...]:
        """The ids with which to go on in place of sampling: the budget of thinking is spent.

        Push them like any others. None is there before that, and after it.
        """
        spent = self._budget is not None and self.reasoning_tokens >= self._budget
        return self._closing if spent and self.reasoning else ()

    @property
    def malformed(self) -> bool:
        """True if something came as malformed text."""
        return self._message.malformed

    def push(self, ids: Iterable[int]) -> list[Delta]:
        """Take the next ids, the token that ended the answer among them, and give out what is
        certain."""
        for token in ids:
            self.reasoning_tokens += self._reader.reasoning
            symbol = self._symbol_of.get(token)
            if symbol is None:
                self._feed(self._text.push(token))
            else:
                self._feed(self._text.finish() + symbol)
        return self._take()

    def finish(self) -> list[Delta]:
        """Give out the rest: no more ids come. A call that is not complete becomes text."""
        self._feed(self._text.finish())
        self._reader.finish()
        return self._take()

    def message(self) -> dict[str, Any]:
        """Return the message so far as OpenAI's clients read it.

        It has `content` (None beside thinking or calls alone), `reasoning` where there is some, and
        of `tool_calls` those that are complete once `finish` was called.
        """
        return self._message.fields()

    def _feed(self, text: str) -> None:
        if text:
            self._reader.feed(text)

    def _take(self) -> list[Delta]:
        deltas = joined(self._reader.take())
        for delta in deltas:
            self._message.add(delta)
        return deltas
