# SPDX-License-Identifier: Apache-2.0
"""Grammars that an answer must follow, by the `llguidance` library: which tokens may come next.

Needs the extra `grammar`. Knows no jax: what is allowed is an array of bits on the host.
"""

import functools
import importlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import tokenizers

from jaxcp.text.tokenizer import Tokenizer

END = "<|end of the grammar|>"
WORD = 32


def checked_schema(schema: Any) -> str:
    """Write a JSON schema, given as text or as what it says, as text.

    Raises:
      ValueError: it is no JSON, or neither an object nor a bool.
    """
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"json_schema must be JSON: {error}; got {schema!r:.100}") from error
    if not isinstance(value, dict | bool):
        raise ValueError(f"json_schema must be a JSON object; got {schema!r:.100}")
    return text


@functools.lru_cache(maxsize=64)
def checked_grammar(kind: str, text: str) -> str:
    """Compile a grammar, a regular expression or a schema to what `Grammars` take.

    Args:
      kind: "json_schema", "regex" (in the syntax of Rust's) or "grammar" (in that of Lark).
    Raises:
      ValueError: it is not well formed, or cannot be followed.
      ModuleNotFoundError: there is no llguidance.
    """
    matcher = _llguidance().LLMatcher
    name = "lark" if kind == "grammar" else kind
    compiled = getattr(matcher, f"grammar_from_{name}")(text)
    wrong, messages = matcher.validate_grammar_with_warnings(compiled)
    if wrong:
        raise ValueError(f"{kind} cannot be followed: {messages[0].strip():.500}")
    return compiled


def satisfiable(schema: Mapping[str, Any]) -> bool:
    """Tell whether a value of JSON by the schema exists, as far as the library finds out.

    Raises:
      ValueError: the schema cannot be followed.
    """
    matcher = _llguidance().LLMatcher
    compiled = matcher.grammar_from_json_schema(json.dumps(schema))
    wrong, messages = matcher.validate_grammar_with_warnings(compiled)
    if wrong and not messages[0].startswith("Unsatisfiable"):
        raise ValueError(f"json_schema cannot be followed: {messages[0].strip():.500}")
    return not wrong


def lark(kind: str, text: str) -> str:
    """Write a grammar as a part of another one, in Lark.

    Args:
      kind: "regex" or "grammar".
    """
    if kind == "grammar":
        return f"%lark {{\n{text}\n}}"
    compiled = json.loads(checked_grammar(kind, text))
    return compiled["grammars"][0]["lark_grammar"].removeprefix("start: ")


class Grammars:
    """The tokens of a tokenizer as grammars need them; takes seconds to make where they are many.

    Markers of a chat (of calls and thinking) are no text: a string of an answer has none of them,
    as little as special tokens.

    Args:
      vocab_size: ids of the model, which may be more or fewer than the tokenizer has.
    Raises:
      ValueError: the tokenizer's ids are not made of bytes (`ByteLevel`, `ByteFallback`).
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        fields = json.loads(tokenizer.backend.to_str())
        markers = () if tokenizer.chat is None else tokenizer.chat.symbols.tokens
        for token in fields["added_tokens"]:
            token["special"] = token["special"] or token["content"] in markers
        backend = tokenizers.Tokenizer.from_str(json.dumps(fields))
        backend.add_special_tokens([END])  # for the library an end is a token
        self.end, self.vocab_size = backend.get_vocab()[END], vocab_size
        try:
            self.tokens = _llguidance().LLTokenizer(backend.to_str(), eos_token=self.end)
        except ValueError as error:
            raise ValueError(
                f"grammars need a tokenizer whose decoder is ByteLevel or has ByteFallback; {error}"
            ) from error

    def constraint(self, grammar: str, stop_tokens: Collection[int]) -> "Constraint":
        """Begin an answer.

        Args:
          grammar: what `checked_grammar` gave.
          stop_tokens: ids that end the answer, where the grammar may end.
        Raises:
          ValueError: the grammar is too large, has tokens that this tokenizer has not, or begins
            with none but stop tokens.
        """
        constraint = Constraint(self, grammar, stop_tokens)
        if not constraint.allowed().any():
            raise ValueError("no token that is not a stop token begins an answer by this grammar")
        return constraint


class Constraint:
    """A grammar with the beginning of an answer. Make it by `Grammars.constraint`."""

    def __init__(self, grammars: Grammars, grammar: str, stop_tokens: Collection[int]):
        self._matcher = _llguidance().LLMatcher(grammars.tokens, grammar, log_level=0)
        if self._matcher.is_error():
            raise ValueError(f"the grammar cannot be followed: {self._matcher.get_error():.500}")
        self._end, self._vocab_size = grammars.end, grammars.vocab_size
        self._stop_tokens = list(stop_tokens)

    @property
    def complete(self) -> bool:
        """True if nothing may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def trouble(self) -> str:
        """The reason for which the library has given the grammar up; else nothing."""
        return self._matcher.get_error()

    def allowed(self) -> np.ndarray:
        """Bits of the ids that may come next, int32 `[ceil(V / 32)]`, the lowest bit first.

        Stop tokens are among them where the grammar may end, and nowhere else. None is where no
        token goes on with the grammar.
        """
        bits = np.zeros(_words(max(self._vocab_size, self._end + 1)), np.uint32)
        if not self._matcher.is_error():
            known = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: len(bits)]
            bits[: len(known)] = known
        may_end = bool(bits[self._end // WORD] >> self._end % WORD & 1)
        _write_bit(bits, self._end, False)
        for token in self._stop_tokens:
            _write_bit(bits, token, may_end)
        return bits[: _words(self._vocab_size)].view(np.int32)

    def take(self, token: int) -> None:
        """Go on with a token that was allowed and is no stop token."""
        self._matcher.consume_token(token)


def _words(count: int) -> int:
    return -(-count // WORD)


def _write_bit(bits: np.ndarray, place: int, value: bool) -> None:
    bit = np.uint32(1 << place % WORD)
    bits[place // WORD] = bits[place // WORD] | bit if value else bits[place // WORD] & ~bit


def _llguidance() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "answers by a grammar need llguidance, which is not installed: pip install "
            "jaxcp[grammar]"
        ) from error
