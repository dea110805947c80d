# SPDX-License-Identifier: Apache-2.0
"""Keeps what users write apart from the control tokens that a template writes.

A control token that stands in a user's string is put between two marks, characters that occur
nowhere else, before the template is rendered. What is rendered is then cut at the control tokens
that have no marks: the template wrote these. Text between them that has marks is encoded by a copy
of the tokenizer that knows no control tokens; all else is encoded as it is.
"""

import functools
import itertools
import json
import re
import secrets
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import tokenizers

PRIVATE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


class Control:
    """The control tokens of a tokenizer, which only a template may write.

    Args:
      tokens: added tokens of `backend`, as they are written.
    """

    def __init__(self, backend: tokenizers.Tokenizer, tokens: Collection[str]):
        self._backend = backend
        self.tokens = tuple(sorted(tokens, key=len, reverse=True))
        self._any = "|".join(map(re.escape, self.tokens)) or r"(?!)"
        self._pattern = re.compile(self._any)
        self._beginnings = {token[:n] for token in tokens for n in range(1, len(token))}
        self._first = {token[0] for token in tokens if token}
        self._longest = max(map(len, self._beginnings), default=0)
        self._ids = {backend.token_to_id(token) for token in tokens}

    def find(self, text: str) -> bool:
        """Tell whether a control token is written in the text."""
        return self._pattern.search(text) is not None

    def mark(self, value: Any, marks: str) -> Any:
        """Copy what a user gave, marks around each control token in its strings and keys.

        A string that ends with the beginning of a control token gets a mark there: the text that
        a template writes behind it must not complete the token.
        """
        if isinstance(value, str):
            text = self._pattern.sub(rf"{marks[0]}\g<0>{marks[1]}", value)
            return text + marks[0] if self._begins_at_the_end(value) else text
        if isinstance(value, Mapping):
            return {self.mark(k, marks): self.mark(x, marks) for k, x in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(x, marks) for x in value]
        return value

    def _begins_at_the_end(self, text: str) -> bool:
        end = text[-self._longest :] if self._longest else ""
        if self._first.isdisjoint(end):
            return False
        return any(end[-n:] in self._beginnings for n in range(1, len(end) + 1))

    def encode(self, text: str, marks: str) -> list[int]:
        """Encode what was rendered from marked strings; the marks themselves give no ids."""
        if not has_marks(text, marks):
            return self._encode(self._backend, text)
        ids: list[int] = []
        plain = ""
        for piece, token in self._pieces(text, marks):
            if has_marks(piece, marks):
                ids += self._encode(self._backend, plain)
                ids += self.encode_as_text(without_marks(piece, marks), follows=bool(ids))
                plain = token
            else:
                plain += piece + token
        return ids + self._encode(self._backend, plain)

    def encode_as_text(self, text: str, *, follows: bool = False) -> list[int]:
        """Encode a text whose control tokens are text too.

        Args:
          follows: a control token comes before the text: it is not the beginning.
        """
        ids = self._ids_of_text(text, follows)
        if self._ids.isdisjoint(ids) or len(text) < 2:
            return ids
        # a vocabulary that has the token as a piece of text: its first character goes alone
        places = [0, *(match.start() + 1 for match in self._pattern.finditer(text)), len(text)]
        parts = [text[a:b] for a, b in itertools.pairwise(places) if a < b]
        rest = (self.encode_as_text(part, follows=True) for part in parts[1:])
        return [*self._ids_of_text(parts[0], follows), *itertools.chain(*rest)]

    def _ids_of_text(self, text: str, follows: bool) -> list[int]:
        backend, first, ids_of = self._text_only
        begin = 1 if follows and first else 0
        ids = self._encode(backend, first + text if begin else text)[begin:]
        return [ids_of.get(i, i) for i in ids]

    def _pieces(self, text: str, marks: str) -> Iterator[tuple[str, str]]:
        """Yield the text before each control token that has no marks, and the token."""
        pattern = re.compile(f"{marks[0]}(?:{self._any}){marks[1]}|({self._any})")
        begin = 0
        for match in pattern.finditer(text):
            if match[1] is not None:
                yield text[begin : match.start()], match[1]
                begin = match.end()
        yield text[begin:], ""

    @functools.cached_property
    def _text_only(self) -> tuple[tokenizers.Tokenizer, str, dict[int, int]]:
        """The tokenizer with unguessable names in place of control tokens, one of these names, and
        the ids of the other added tokens that are not what they were."""
        fields = json.loads(self._backend.to_str()) | {"post_processor": None}
        secret, names, kept = secrets.token_hex(16), [], {}
        for token in fields["added_tokens"]:
            if token["content"] in self.tokens:
                token |= dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
                token["content"] = f"\U0010fffd{secret}.{token['id']}\U0010fffd"
                names.append(token["content"])
            else:
                kept[token["content"]] = token["id"]
        backend = tokenizers.Tokenizer.from_str(json.dumps(fields))
        new = {content: backend.token_to_id(content) for content in kept}
        ids_of = {i: kept[content] for content, i in new.items() if i is not None}
        return backend, next(iter(names), ""), ids_of

    @staticmethod
    def _encode(backend: tokenizers.Tokenizer, text: str) -> list[int]:
        return plain_ids(backend, text) if text else []


def plain_ids(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """Encode a text by the library, with no tokens around it.

    Raises:
      ValueError: the tokenizer has no token for something in it.
    """
    try:
        return backend.encode(text, add_special_tokens=False).ids
    except Exception as error:  # a bare one, such as for a character without an unknown token
        raise ValueError(f"needed a text that this tokenizer can encode: {error}") from error


def unused_marks(texts: Collection[str]) -> tuple[str, str]:
    """Choose private characters that occur in none of the texts: two marks, and one more.

    Neither does the form in which JSON of ASCII alone writes them.

    Raises:
      ValueError: the texts have nearly all 137,468 of them.
    """
    taken = set[str]().union(*texts)
    free = (
        c
        for block in PRIVATE
        for c in map(chr, block)
        if c not in taken and not any(_escaped(c) in text for text in texts)
    )
    if len(chosen := "".join(itertools.islice(free, 3))) == 3:
        return chosen[:2], chosen[2]
    raise ValueError("needed three private characters that no message has; all are taken")


def _escaped(mark: str) -> str:
    return json.dumps(mark)[1:-1]


def unescaped(text: str, marks: str) -> str:
    """Read marks which a template has written as JSON of ASCII alone."""
    for mark in marks:
        text = text.replace(_escaped(mark), mark)
    return text


def strings_of(value: Any) -> Iterator[str]:
    """Yield every string in a value of JSON, keys among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, x in value.items():
            yield from strings_of(key)
            yield from strings_of(x)
    elif isinstance(value, list | tuple):
        for x in value:
            yield from strings_of(x)


def has_marks(text: str, marks: str) -> bool:
    """Tell whether one of the two marks is in the text."""
    return marks[0] in text or marks[1] in text


def without_marks(text: str, marks: str) -> str:
    """Take the marks out of a text."""
    return text.replace(marks[0], "").replace(marks[1], "")
