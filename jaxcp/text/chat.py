# SPDX-License-Identifier: Apache-2.0
"""Puts a conversation into a model's own form, and reads what the model answers.

One object for servers and sessions: `tokenizer.chat.prompt(messages)` gives the ids of a prompt,
its `parser()` reads the answer. Messages and tools are in OpenAI's form.
"""

import functools
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jaxcp.text import thinking as levels_of_thinking
from jaxcp.text.constrained import Answer, AnswerGrammar, Kind, between_tags, on_channels
from jaxcp.text.control import (
    Control,
    plain_ids,
    strings_of,
    unescaped,
    unused_marks,
    without_marks,
)
from jaxcp.text.grammar import checked_grammar, lark
from jaxcp.text.messages import (
    checked_messages,
    checked_tools,
    one_call_each,
    schemas_of,
    taken_strict,
)
from jaxcp.text.parser import Parser
from jaxcp.text.tokenizer import Tokenizer
from jaxcp.text.tools import harmony
from jaxcp.text.tools.forced import (
    Schemas,
    harmony_calls,
    harmony_messages,
    tagged_calls,
    text_or_tagged_calls,
)
from jaxcp.text.tools.formats import DSML, HARMONY
from jaxcp.text.tools.harmony import HarmonyReader
from jaxcp.text.tools.reader import Reader, Symbols
from jaxcp.text.tools.rules import Rules
from jaxcp.text.tools.tagged import TaggedReader, Tags

SET_HERE = "messages", "tools", "add_generation_prompt"
"""Variables of a template that are a conversation's own."""


class Renderer(Protocol):
    """A template or an encoder: writes a conversation as text."""

    @property
    def variables(self) -> frozenset[str]:
        """Names of the variables that it reads."""

    @property
    def literals(self) -> str:
        """All control tokens that it can write."""

    @property
    def levels(self) -> levels_of_thinking.Levels:
        """Levels of thinking, and the variables that ask for each."""

    def render(self, *, messages: Any, tools: Any, **variables: Any) -> str:
        """Render `messages` and `tools`, with an assistant's turn begun where
        `add_generation_prompt`."""


class Chat:
    """A checkpoint's form of conversations; `Tokenizer.chat`, if the checkpoint has one.

    >>> prompt = tokenizer.chat.prompt([{"role": "user", "content": "Who is Pierre?"}])
    >>> request = engine.add(prompt.ids, jaxcp.Sampling(...))

    Args:
      tags: what calls and thoughts look like.
      with_tools: renders requests with tools, where that is another template.
      names: `bos_token` and the like, which templates may write.
      ends: tokens with which the model ends its turn.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        renderer: Renderer,
        tags: Tags | str,
        *,
        with_tools: Renderer | None = None,
        names: Mapping[str, str] | None = None,
        ends: Sequence[str] = (),
    ):
        self.tokenizer, self.renderer, self.names = tokenizer, renderer, dict(names or {})
        self._with_tools, self._tags = with_tools or renderer, tags
        self._added = {x.content: x for x in tokenizer.backend.get_added_tokens_decoder().values()}
        markers = harmony.NAMES if isinstance(tags, str) else tags.tokens()
        self.symbols = Symbols(self._added, markers)
        stops = [*ends, *(harmony.STOPS if tags == HARMONY else ())]
        ids = map(tokenizer.backend.token_to_id, dict.fromkeys(stops))
        self.stop_tokens = tuple(i for i in ids if i is not None)
        """Ids that end an assistant's turn, beside those that generation_config.json names."""

    @property
    def thinking_levels(self) -> tuple[str, ...]:
        """The levels that `thinking` may be, least first; () where the model has none."""
        return tuple(self.renderer.levels)

    def level_of_effort(self, effort: str) -> str | None:
        """Map OpenAI's `reasoning_effort` to a level: the nearest that thinks no longer.

        Raises:
          ValueError: it is none of OpenAI's values.
        """
        return levels_of_thinking.level_of_effort(effort, self.thinking_levels)

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: str | int | None = None,
        *,
        read_control_tokens: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> "Prompt":
        """Render a conversation, and the beginning of the assistant's next message.

        Where the last message is an assistant's, the prompt ends within it, and the model goes on.

        Args:
          messages: in OpenAI's form. Contents are strings or lists of text parts; reasoning is read
            by the names `reasoning`, `reasoning_content` and `thinking`, and kept or dropped as the
            template does.
          tools: functions with JSON schemas, in OpenAI's form. `strict` is for
            `Prompt.strict_grammar`, and not for the template.
          thinking: one of `thinking_levels`, a number of tokens after which thinking is closed, or
            None for what the template does by itself.
          read_control_tokens: take control tokens that are written in messages and tools as such.
            By default they are text, as anything that a user writes.
          variables: further ones for the template, which must read them.
        Raises:
          ValueError: messages or tools are not in this form, the template refuses them, or there is
            no such level.
        """
        conversation, functions = self._checked(messages), checked_tools(tools)
        strict = taken_strict(functions)
        if functions and isinstance(self._tags, str):  # its template asks for one
            for function in functions:
                function["function"].setdefault("description", "")
        told, budget = levels_of_thinking.chosen(thinking, self.renderer.levels)
        renderer = self._with_tools if functions else self.renderer
        self._check_variables(variables or {}, renderer)
        given: list[Any] = [conversation, functions, {**told, **(variables or {})}]
        marks, end = unused_marks([*strings_of([given, self.names]), renderer.literals])
        if not read_control_tokens:
            given = self._control.mark(given, marks)
        continues = _continues(conversation)
        if continues:
            given[0][-1]["content"] += end + " "
        set_here = {"messages": given[0], "tools": given[1]}
        set_here["add_generation_prompt"] = not continues
        text = renderer.render(**self.names | {"documents": None} | given[2] | set_here)
        text = unescaped(text, marks)
        if continues:
            text = _until(text, end)
        ids = self._control.encode(text, marks)
        thinks = not continues and thinking not in (levels_of_thinking.NO_THINK, 0)
        schemas = schemas_of(functions)
        return Prompt(self, ids, text, marks, schemas, budget, opens=thinks, strict=strict)

    def _check_variables(self, variables: Mapping[str, Any], renderer: Renderer) -> None:
        """Raise ValueError for variables that would change nothing, or are not to be changed."""
        free = renderer.variables - {*SET_HERE, *self.names}
        if wrong := sorted({*variables} - free):
            raise ValueError(
                f"variables: the template reads no {wrong[0]!r:.100} that may be set; it reads "
                f"{', '.join(sorted(free)) or 'none'}"
            )

    def reader(self, text: str, schemas: Mapping[str, Mapping[str, Any]], seed: bytes) -> Reader:
        """Make the reader of what follows a prompt.

        Args:
          text: what was rendered, marks around control tokens that are text.
        """
        if isinstance(self._tags, str):
            opened = _header(text).partition(harmony.MESSAGE)
            return HarmonyReader(self.symbols, schemas, seed, opened="".join(opened[:2]))
        think = self.symbols.literal(self._tags.think)
        begins = bool(think) and text.rstrip().endswith(think)
        return TaggedReader(self._tags, self.symbols, schemas, seed, thinking=begins)

    def answer_grammar(
        self, text: str, answer: Answer, *, opens: bool, kind: Kind
    ) -> AnswerGrammar:
        """Write the grammars of an answer behind thinking.

        Args:
          text: what was rendered.
          answer: adds the rules of the answer.
          opens: the model may begin to think by itself.
          kind: what the answer is.
        Raises:
          ValueError: a schema in it cannot be followed.
          ModuleNotFoundError: there is no llguidance.
        """
        id_of = self.tokenizer.backend.token_to_id
        rules = Rules(self.symbols, id_of)
        if isinstance(self._tags, str):
            first, later = on_channels(rules, answer, header=_header(text), kind=kind)
            ids = [id_of(harmony.START)]
            end = tuple(plain_ids(self.tokenizer.backend, harmony.END))
        else:
            tags, end = self._tags, self.closing
            opens = opens and not text.rstrip().endswith(
                self.symbols.literal(tags.think_end) or "\0"
            )
            first, later = between_tags(rules, tags, answer, opens=opens)
            ids = [id_of(DSML)] if tags.calls_end_thinking else []
        for grammar in (first, later):
            checked_grammar("grammar", grammar)
        banned = tuple(i for i in ids if i is not None)
        return AnswerGrammar(first=first, later=later, banned=banned, closing=end)

    def call_rule(self, rules: Rules, schemas: Schemas, *, several: bool, text: bool) -> str:
        """Add the rules of calls of these functions, and name the first of them.

        Args:
          schemas: None for a function whose arguments are any.
          text: text may come beside calls, or in place of them.
        Raises:
          NotImplementedError: nothing is known of how this model writes calls.
        """
        if isinstance(self._tags, str):
            return (harmony_messages if text else harmony_calls)(rules, schemas)
        write = text_or_tagged_calls if text else tagged_calls
        rule = write(rules, self._tags, schemas, several=several)
        if rule is None:
            raise NotImplementedError(
                "calls of tools cannot be asked for: how this model writes them is not known"
            )
        return rule

    @functools.cached_property
    def closing(self) -> tuple[int, ...]:
        """The ids that end the thinking and begin the answer."""
        if isinstance(self._tags, str):
            text = harmony.ANSWER
        else:
            text = self.symbols.literal(self._tags.think_end)
            text = f"\n{text}\n\n" if self._tags.newlines else text
        return tuple(plain_ids(self.tokenizer.backend, text))

    def _checked(self, messages: Any) -> list[dict[str, Any]]:
        conversation = checked_messages(messages)
        if "developer" not in self.renderer.literals:
            for message in conversation:
                if message["role"] == "developer":
                    message["role"] = "system"
        return one_call_each(conversation) if isinstance(self._tags, str) else conversation

    @functools.cached_property
    def _control(self) -> Control:
        written = self.renderer.literals + "\0" + self._with_tools.literals
        tokens = {
            content
            for content, token in self._added.items()
            if token.special
            or (content in written and not content.isspace())
            or (self.symbols.suffix and self.symbols.suffix in content)
        }
        return Control(self.tokenizer.backend, tokens | {*self.symbols.tokens})


class Prompt:
    """A rendered conversation; `Chat.prompt` makes it."""

    def __init__(
        self,
        chat: Chat,
        ids: list[int],
        marked: str,
        marks: str,
        schemas: Mapping[str, Mapping[str, Any]],
        budget: int | None,
        *,
        opens: bool,
        strict: Collection[str] = (),
    ):
        self.ids = ids
        """The ids of the prompt; control tokens that users wrote are text among them."""
        self.text = without_marks(marked, marks)
        """The text that was rendered."""
        self.stop_tokens = chat.stop_tokens
        """Ids that end the turn, beside those that generation_config.json names."""
        self._chat, self._marked, self._schemas, self._budget = chat, marked, schemas, budget
        self._opens, self._strict = opens, strict

    def text_grammar(self, kind: str, text: str) -> AnswerGrammar:
        """Write the grammars of an answer whose text follows a grammar.

        Args:
          kind: "json_schema", "regex" or "grammar", as `Sampling` has them; and its text.
        """

        def answer(rules: Rules) -> str:
            return (
                rules.json(json.loads(text))
                if kind == "json_schema"
                else rules.add(lark(kind, text))
            )

        return self._grammar(answer, "text")

    def call_grammar(self, names: Collection[str] | None, *, several: bool) -> AnswerGrammar:
        """Write the grammars of an answer that calls a tool.

        Args:
          names: functions that may be called; None for all of the prompt's tools.
          several: it may call more than one, where the format has several calls in a turn.
        Raises:
          ValueError: there are no tools, or none of this name; or a schema that calls of this
            form cannot follow.
          NotImplementedError: nothing is known of how this model writes calls.
        """
        wanted = [*self._schemas] if names is None else [*names]
        unknown = [name for name in wanted if name not in self._schemas]
        if unknown or not wanted:
            known = ", ".join(self._schemas) or "none"
            raise ValueError(f"tools has no {', '.join(unknown) or 'function'}; there are {known}")
        schemas = {name: self._schemas[name] for name in wanted}

        def answer(rules: Rules) -> str:
            return self._chat.call_rule(rules, schemas, several=several, text=False)

        return self._grammar(answer, "call")

    def strict_grammar(self, *, several: bool) -> AnswerGrammar | None:
        """Write the grammars of any answer whose calls of strict tools follow their schemas.

        Args:
          several: as `call_grammar` has it.
        Returns:
          None where no tool is strict.
        Raises:
          ValueError: a schema that calls of this form cannot follow.
          NotImplementedError: nothing is known of how this model writes calls.
        """
        if not self._strict:
            return None
        schemas = {name: x if name in self._strict else None for name, x in self._schemas.items()}

        def answer(rules: Rules) -> str:
            return self._chat.call_rule(rules, schemas, several=several, text=True)

        return self._grammar(answer, "either")

    def _grammar(self, answer: Answer, kind: Kind) -> AnswerGrammar:
        return self._chat.answer_grammar(self._marked, answer, opens=self._opens, kind=kind)

    def parser(self, grammar: AnswerGrammar | None = None) -> Parser:
        """Begin to read an answer; its first state is that in which the prompt ends.

        Args:
          grammar: that of the answer.
        """
        seed = hashlib.sha256(np.asarray(self.ids, np.int32).tobytes()).digest()
        chat = self._chat
        reader = chat.reader(self._marked, self._schemas, seed)
        closing = chat.closing if grammar is None else grammar.closing
        closing = () if self._budget is None else closing
        return Parser(chat.tokenizer, reader, chat.symbols, budget=self._budget, closing=closing)


def _header(text: str) -> str:
    """Take what a prompt in harmony has of the message that the model goes on with."""
    return text.rpartition(f"{harmony.START}assistant")[2]


def _continues(conversation: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether the last message is an assistant's that the model is to go on with."""
    last = conversation[-1]
    return last["role"] == "assistant" and bool(last.get("content")) and "tool_calls" not in last


def _until(text: str, end: str) -> str:
    if end not in text:
        raise ValueError(
            "needed a chat template that writes the last message where that is an assistant's; "
            "this one leaves it out. End with a message of the user"
        )
    before, _, after = text.rpartition(end)
    return before if after.startswith(" ") else before.rstrip()  # a template that strips it
