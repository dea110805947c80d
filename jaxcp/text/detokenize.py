# SPDX-License-Identifier: Apache-2.0
"""Decodes tokens to text piece by piece, as they come, with a decoder of the `tokenizers` library.

A decoder is a list of steps. Up to the first step that joins all tokens (`Fuse`, `ByteLevel`), a
step looks at a token and the one before it, or at a run of bytes; after it there is one text, of
which only the beginning may still change. So no token is decoded again later, and a piece that was
yielded stays as it is. Unknown steps, or steps in another order, wait for all tokens.
"""

import codecs
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

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


def pieces(decoder: Any, tokens: Iterable[str]) -> Iterator[str]:
    """Yield pieces that, joined, are `decoder`'s text of all `tokens` (None: words with spaces).

    A piece is yielded with its token, unless later tokens decide about it: a character of several
    bytes, or a run of byte tokens, all of which the library drops if one is wrong.
    """
    if decoder is None:
        return filter(None, _with_the_one_before(" ".join, _alone(tokens)))
    steps = _steps(decoder)
    joining = next((i for i, step in enumerate(steps) if step["type"] in JOINING), len(steps))
    first, rest = steps[:joining], steps[joining:]
    if not _is_known(first, rest):
        return _when_complete(decoder, tokens)
    text: Iterable[str] = tokens
    if first:
        text = _with_the_one_before(_decoder(first).decode, _groups(first, tokens))
    for step in rest:
        if step["type"] == "ByteLevel":
            text = _of_bytes(text)
        elif step["type"] == "Strip":
            text = _stripped(text, step["content"], step["start"])
    return filter(None, text)


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


def _alone(tokens: Iterable[str]) -> Iterator[list[str]]:
    return ([token] for token in tokens)


def _groups(steps: list[dict[str, Any]], tokens: Iterable[str]) -> Iterator[list[str]]:
    """Group tokens that are decoded together: a run of byte tokens; any other token alone."""
    kinds = [step["type"] for step in steps]
    if "ByteFallback" not in kinds:
        return _alone(tokens)
    before = _decoder(steps[: kinds.index("ByteFallback")])
    return _runs(tokens, lambda token: bool(BYTE.fullmatch(before.decode([token]))))


def _runs(tokens: Iterable[str], is_byte: Callable[[str], bool]) -> Iterator[list[str]]:
    run: list[str] = []
    for token in tokens:
        if is_byte(token):
            run.append(token)
            continue
        if run:
            yield run
            run = []
        yield [token]
    if run:
        yield run


def _with_the_one_before(
    decode: Callable[[list[str]], str], groups: Iterable[list[str]]
) -> Iterator[str]:
    """Yield what each group adds to the text of the token before it."""
    before: list[str] = []
    for group in groups:
        yield decode([*before, *group])[len(decode(before)) :]
        before = group[-1:]


def _of_bytes(tokens: Iterable[str]) -> Iterator[str]:
    """Decode as `ByteLevel` does: a token with characters outside its table stands for itself."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        known = all(character in BYTE_OF for character in token)
        yield decoder.decode(bytes(BYTE_OF[c] for c in token) if known else token.encode())
    yield decoder.decode(b"", final=True)


def _stripped(text: Iterable[str], content: str, most: int) -> Iterator[str]:
    """Strip up to `most` of this character from the beginning of the text."""
    for piece in text:
        while most and piece.startswith(content):
            piece, most = piece[1:], most - 1
        if piece:
            most = 0
        yield piece


def _when_complete(decoder: Any, tokens: Iterable[str]) -> Iterator[str]:
    every = list(tokens)
    if every and (text := decoder.decode(every)):
        yield text
