# SPDX-License-Identifier: Apache-2.0
"""A text that comes in pieces ends where the whole text would, at the first of its stop strings."""

import itertools
import time

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxcp.text.stop_strings import UntilStop
from jaxcp.text.tokenizer import Tokenizer, byte_level

BYTES = byte_level()
TEXT = st.text("abé日", max_size=14)
STOPS = st.lists(st.text("abé日", min_size=1, max_size=4), max_size=3)


def cut(text, stops):
    """The rule: of the whole text."""
    places = [text.find(stop) for stop in stops if stop in text]
    return text[: min(places, default=None)], bool(places)


def pushed(detokenizer, values):
    """Give what is given out, and whether it stopped."""
    text = "".join(map(detokenizer.push, values))
    return text + detokenizer.finish(), detokenizer.stopped


@settings(max_examples=300)
@given(TEXT, STOPS, st.lists(st.integers(0, 14)))
@example("abcd", ["abcx", "bc"], [3])  # a stop string waits for one that began before it
@example("abcx", ["abcx", "bc"], [3])
@example("abab", ["abac", "b"], [])
@example("aab", ["ab", "abc"], [1])  # one is the beginning of another
@example("aaaab", ["aab"], [1, 2, 3, 4])  # it overlaps itself
def test_any_pieces(text, stops, places):
    places = sorted({0, len(text), *(place for place in places if place < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    assert pushed(UntilStop(stops), pieces) == cut(text, stops)


@settings(max_examples=300)
@given(TEXT, STOPS)
@example("abcx", ["abcd", "bc"])
def test_nothing_is_kept_back_without_need(text, stops):
    """A character at a time: what is kept back begins a stop string, and the end comes at once."""
    until, given_out = UntilStop(stops), ""
    for number in range(1, len(text) + 1):
        given_out += until.push(text[number - 1])
        begun = [i for i in range(number) if any(s.startswith(text[i:number]) for s in stops)]
        known, found = cut(text[:number], stops)
        begun = [i for i in begun if i < len(known)]
        assert until.stopped == (found and not begun)
        if until.stopped:
            break
        assert given_out == text[: min(begun, default=number)]


@settings(max_examples=300)
@given(st.binary(max_size=16) | TEXT.map(str.encode), STOPS)
def test_tokens_that_split_characters(data, stops):
    """Tokens are bytes here: a character of a stop string comes in several of them."""
    assert pushed(BYTES.detokenizer(stops), data) == cut(BYTES.decode(data), stops)


LLAMA = [
    tokenizers.decoders.Replace("▁", " "),
    tokenizers.decoders.ByteFallback(),
    tokenizers.decoders.Fuse(),
    tokenizers.decoders.Strip(" ", 1, 0),
]
WORDS = ["<unk>", "▁a", "b", "▁", "a▁b", "</s>", "<0xE6>", "<0x97>", "<0xA5>", "<0x61>", "日"]


def words(decoder):
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    backend.add_special_tokens(["</s>"])
    if decoder is not None:
        backend.decoder = decoder
    return Tokenizer(backend)


DECODERS = [
    tokenizers.decoders.Sequence(LLAMA), tokenizers.decoders.Metaspace(),
    tokenizers.decoders.WordPiece(), None,
    tokenizers.decoders.Sequence([tokenizers.decoders.Strip("a", 0, 1),
                                  tokenizers.decoders.Fuse()]),
]  # fmt: skip


@settings(max_examples=200)
@given(
    st.sampled_from(DECODERS),
    st.lists(st.integers(0, len(WORDS)), max_size=10),
    st.lists(st.text("ab 日", min_size=1, max_size=4), max_size=3),
)
def test_of_every_kind_of_decoder(decoder, ids, stops):
    tokenizer = words(decoder)
    assert pushed(tokenizer.detokenizer(stops), ids) == cut(tokenizer.decode(ids), stops)


def test_a_stop_string_ends_a_text_with_the_token_that_completes_it():
    text = BYTES.detokenizer(["\n日本"])
    given_out = [text.push(i) for i in "a\nb\n日本".encode()]
    assert given_out == ["a", "", "\nb", *[""] * 7] and text.stopped
    assert text.push(ord("x")) == "" == text.finish()


def test_a_long_stop_string_is_linear():
    until = UntilStop(["a" * 20_000 + "b"])
    start = time.perf_counter()
    text = "".join(until.push("a") for _ in range(60_000))
    assert time.perf_counter() - start < 5  # quadratic: minutes
    assert text == "a" * 40_000
    assert until.push("b") == "" and until.stopped


def test_what_is_no_stop_string():
    for stops in ("ab", b"ab", None, 5, {"a": 1}):
        with pytest.raises(ValueError, match="stop must be a list of strings"):
            BYTES.detokenizer(stops)
    for stop in ("", None, 5, b"a"):
        with pytest.raises(ValueError, match="a stop string must have a character"):
            BYTES.detokenizer([stop])
