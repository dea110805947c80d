# SPDX-License-Identifier: Apache-2.0
"""Decodes tokens to text piece by piece, as they come, with a decoder of the `tokenizers` library.

A decoder is a list of steps. Up to the first step that joins all tokens (`Fuse`, `ByteLevel`), a
step looks at a token and the one before it, or at a run of bytes; after it there is one text, of
which only the beginning may still change. So no token is decoded again later, and a piece that was
given out stays as it is. Unknown steps, or steps in another order, wait for all tokens.
"""

import codecs
import itertools
import json
import re
from collections.abc import Callable
from typing import Any, Protocol

from tokenizers import decoders

PER_TOKEN = {"Replace", "Strip"}  # steps that look at one token
BY_NEIGHBOUR = {"BPEDecoder", "ByteFallback", "CTC", "Metaspace", "WordPiece"}
JOINING = {"ByteLevel", "Fuse"}
BYTE = re.compile(r"<0x[0-9A-Fa-f+][0-9A-Fa-f]>")


def _byte_of() -> dict[str, int]:
    # ByteLevel writes a byte as one printable character (GPT-2's table): a byte that prints in
    # Latin-1 is itself, the others are counted up from U+0100.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    table, shifted = {}, 0x100
    for byte in range(256):
        table[chr(byte if byte in printable else shifted)] = byte
        shifted += byte not in printable
    return table


BYTE_OF = _byte_of()
"""The byte for which a character of a `ByteLevel` vocabulary stands."""


class Decoding(Protocol):
    """A text that grows; joined, what is given out is the text of all that was pushed."""

    def push(self, token: str) -> str:
        """Take a token, and give out what text it makes certain; often its own, or none."""

    def finish(self) -> str:
        """Give out the rest: there are no more tokens, or what follows does not join with it."""


def decoding(decoder: Any) -> Decoding:
    """Begin a text that is decoded as `decoder` does (None: words with spaces).

    Text is given out with its token, unless later tokens decide about it: a character of several
    bytes, or a run of byte tokens, all of which the library drops if one is wrong.
    """
    if decoder is None:
        return _WithTheOneBefore(" ".join)
    steps = _steps(decoder)
    joining = next((i for i, step in enumerate(steps) if step["type"] in JOINING), len(steps))
    first, rest = steps[:joining], steps[joining:]
    if not _is_known(first, rest):
        return _WhenComplete(decoder)
    return _Chain([*_of_tokens(first), *filter(None, map(_of_text, rest))])


def _steps(decoder: Any) -> list[dict[str, Any]]:
    try:
        step = json.loads(decoder.__getstate__())
    except Exception:  # the library's own; one written in Python has no such description
        return [{"type": "unknown"}]
    return _flat(step)


def _flat(step: dict[str, Any]) -> list[dict[str, Any]]:
    if step["type"] != "Sequence":
        return [step]
    return list(itertools.chain(*map(_flat, step["decoders"])))


def _decoder(steps: list[dict[str, Any]]) -> Any:
    made = decoders.Fuse()  # any class will do: its state replaces it
    made.__setstate__(json.dumps({"type": "Sequence", "decoders": steps}).encode())
    return made


def _is_known(first: list[dict[str, Any]], rest: list[dict[str, Any]]) -> bool:
    """Tell whether these steps, up to a joining one and from it on, can be taken as tokens come."""
    kinds = [step["type"] for step in first]
    others = [kind for kind in kinds if kind not in PER_TOKEN]
    if len(others) > 1 or not BY_NEIGHBOUR.issuperset(others):
        return False
    if "BPEDecoder" in kinds[:-1]:  # it leaves the end of a token to the next one
        return False
    if rest and rest[0]["type"] == "ByteLevel" and others:  # it wants tokens, one by one
        return False
    return all(
        step["type"] == "Fuse" or (step["type"] == "Strip" and not step["stop"])
        for step in rest[1:]
    )


def _of_tokens(steps: list[dict[str, Any]]) -> list[Decoding]:
    """Make one of the steps that look at tokens; byte tokens in a row are decoded together."""
    if not steps:
        return []
    kinds = [step["type"] for step in steps]
    if "ByteFallback" not in kinds:
        return [_WithTheOneBefore(_decoder(steps).decode)]
    before = _decoder(steps[: kinds.index("ByteFallback")])

    def is_byte(token: str) -> bool:
        return bool(BYTE.fullmatch(before.decode([token])))

    return [_WithTheOneBefore(_decoder(steps).decode, is_byte)]


def _of_text(step: dict[str, Any]) -> Decoding | None:
    if step["type"] == "ByteLevel":
        return _Bytes()
    if step["type"] == "Strip":
        return _Stripped(step["content"], step["start"])
    return None


class _Chain:
    """Decodings, each of what the one before gives out."""

    def __init__(self, parts: list[Decoding]):
        self._parts = parts

    def push(self, token: str) -> str:
        for part in self._parts:
            token = part.push(token)
        return token

    def finish(self) -> str:
        text = ""
        for part in self._parts:
            text = (part.push(text) if text else "") + part.finish()
        return text


class _WithTheOneBefore:
    """A text of which each token, or run of byte tokens, is decoded beside the one before it."""

    def __init__(
        self,
        decode: Callable[[list[str]], str],
        is_byte: Callable[[str], bool] = lambda token: False,
    ):
        self._decode, self._is_byte = decode, is_byte
        self._before: list[str] = []
        self._run: list[str] = []

    def push(self, token: str) -> str:
        if self._is_byte(token):
            self._run.append(token)
            return ""
        return self.finish() + self._added([token])

    def finish(self) -> str:
        run, self._run = self._run, []
        return self._added(run) if run else ""

    def _added(self, group: list[str]) -> str:
        before, self._before = self._before, group[-1:]
        return self._decode([*before, *group])[len(self._decode(before)) :]


class _Bytes:
    """The text of tokens of `ByteLevel`: one with characters outside its table is itself."""

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: str) -> str:
        known = all(character in BYTE_OF for character in token)
        return self._decoder.decode(bytes(BYTE_OF[c] for c in token) if known else token.encode())

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Stripped:
    """A text without up to `most` of this character at its beginning."""

    def __init__(self, content: str, most: int):
        self._content, self._most = content, most

    def push(self, token: str) -> str:
        while self._most and token.startswith(self._content):
            token, self._most = token[1:], self._most - 1
        if token:
            self._most = 0
        return token

    def finish(self) -> str:
        return ""


class _WhenComplete:
    """The text of all tokens at once."""

    def __init__(self, decoder: Any):
        self._decoder = decoder
        self._tokens: list[str] = []

    def push(self, token: str) -> str:
        self._tokens.append(token)
        return ""

    def finish(self) -> str:
        tokens, self._tokens = self._tokens, []
        return self._decoder.decode(tokens) if tokens else ""
