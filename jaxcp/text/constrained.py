# SPDX-License-Identifier: Apache-2.0
"""Answers by a grammar behind thinking that is free, whether the prompt has opened it or the model.

An answer is made by up to three requests: one whose grammar begins the answer or opens the
thinking, one that thinks, and one whose grammar begins where the thinking ended.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, Protocol

from jaxcp.text.tools import harmony
from jaxcp.text.tools.rules import ANY_TEXT, Rules
from jaxcp.text.tools.tagged import Tags

BANNED = -100.0
"""Bias of a token that must not come."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerGrammar:
    """Grammars of an answer, in llguidance's Lark."""

    first: str
    """Grammar from the end of the prompt on: the answer, or what opens the thinking alone."""
    later: str
    """Grammar from the end of the thinking on."""
    banned: tuple[int, ...] = ()
    """Ids that would leave the thinking in another way than by its end."""
    closing: tuple[int, ...] = ()
    """Ids that close thinking whose budget is spent, so that `later` may follow."""


Answer = Callable[[Rules], str]
"""Adds the rules of an answer, and names the first of them."""
Kind = Literal["text", "call", "either"]
"""The kind of an answer: "either" is text with calls in it."""


def between_tags(rules: Rules, tags: Tags, answer: Answer, *, opens: bool) -> tuple[str, str]:
    """Write the grammars `first` and `later` of a format with tags.

    Args:
      opens: the model may begin to think by itself.
    """
    body = answer(rules)
    later = rules.grammar(body)
    if not (opens and tags.think):
        return later, later
    return rules.grammar(f"{rules.written(tags.think)} | {body}"), later


def on_channels(rules: Rules, answer: Answer, *, header: str, kind: Kind) -> tuple[str, str]:
    """Write the grammars `first` and `later` of harmony.

    Args:
      header: what the prompt has of the message that the model goes on with, behind its author.
      kind: the answer has headers of its own, but for a text.
    """
    body, own = answer(rules), f"{harmony.CHANNEL}final{harmony.MESSAGE}"
    whole = f"{rules.written(own)} {body}" if kind == "text" else body
    later = rules.grammar(f"{rules.written(harmony.AUTHOR)} {whole}")
    if harmony.MESSAGE in header:  # within a message
        after = f"{rules.written(f'{harmony.END}{harmony.AUTHOR}')} {whole}"
        text = rules.add_terminal(ANY_TEXT)
        first = {"text": body, "call": after, "either": f"{text} | {text} {after}"}[kind]
        return rules.grammar(first), later
    thought = rules.written(f"{harmony.CHANNEL}analysis{harmony.MESSAGE}")
    return rules.grammar(f"{thought} | {whole}"), later


class Thinks(Protocol):
    """A parser, or an answer, that is being read."""

    @property
    def reasoning(self) -> bool:
        """True while what comes is thought."""


class Constrained:
    """The part of an answer that is being made, and the options of the request that makes it.

    Args:
      read: reads the answer.
      grammar: None for an answer without one.
      ends: ids that end an answer, which must not end its thinking.
    """

    def __init__(self, read: Thinks, grammar: AnswerGrammar | None, ends: Collection[int]):
        self._read, self._grammar, self._ends = read, grammar, tuple(ends)
        self._part: Literal["first", "thinking", "later"] = "first"
        self.moved()

    def moved(self) -> bool:
        """Tell whether another part has begun with what was read last: it has its own request."""
        before = self._part
        if self._grammar is not None and self._part == "first" and self._read.reasoning:
            self._part = "thinking"
        elif self._part == "thinking" and not self._read.reasoning:
            self._part = "later"
        return self._part != before

    def options(self, logit_bias: Mapping[int, float]) -> dict[str, Any]:
        """Fields of `Sampling` for the request that goes on from here.

        Args:
          logit_bias: that of the answer.
        """
        if self._grammar is None:
            return {}
        if self._part == "thinking":
            banned = dict.fromkeys((*self._ends, *self._grammar.banned), BANNED)
            return {"logit_bias": {**logit_bias, **banned}}
        return {"grammar": getattr(self._grammar, self._part)}
