# SPDX-License-Identifier: Apache-2.0
"""Bytes are ids, nothing is lost on the way back, and pieces never split a character."""

import pydoc_data.topics
import time

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcp.text.tokenizer import Tokenizer, byte_level, read_text

BYTES = byte_level()
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


def test_ids_are_byte_values():
    assert BYTES.vocab_size == 256
    for text in (
        "",
        "plain",
        " \t\r\n\x00\x7f",
        "naïve €5 \U0001f600",
        "".join(map(chr, range(0x250))),
    ):
        ids = BYTES.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert bytes(ids.tolist()) == text.encode()


@settings(max_examples=200, deadline=None)
@given(UNICODE)
def test_unicode_round_trip(text):
    ids = BYTES.encode(text)
    assert bytes(ids.tolist()) == text.encode()
    assert BYTES.decode(ids) == text
    assert "".join(BYTES.stream(ids)) == text


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=100))
def test_stream_of_any_bytes_is_decode(data):
    expected = data.decode(errors="replace")
    assert BYTES.decode(data) == expected
    assert "".join(BYTES.stream(data)) == expected


def test_stream_holds_back_half_characters():
    text = "aé€\U0001f600z"
    assert list(BYTES.stream(BYTES.encode(text))) == list(text)
    assert list(BYTES.stream(BYTES.encode("né")[:-1])) == ["n", "\ufffd"]
    assert list(BYTES.stream([])) == []


def test_stream_is_lazy():
    taken = []

    def source():
        for i in b"abc":
            taken.append(i)
            yield i

    stream = BYTES.stream(source())
    assert next(stream) == "a" and taken == [ord("a")]


def test_stream_keeps_spaces_between_words():
    words = {"▁the": 0, "▁cat": 1, "s": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="s"))
    backend.decoder = tokenizers.decoders.Metaspace()
    tokenizer = Tokenizer(backend)
    assert list(tokenizer.stream([0, 1, 2])) == ["the", " cat", "s"]
    assert tokenizer.decode([0, 1, 2]) == "the cats"


def test_long_text_is_quick():
    text = "".join(pydoc_data.topics.topics.values())
    text = (text * (131_072 // len(text) + 1))[:131_072]
    start = time.perf_counter()
    ids = BYTES.encode(text)
    seconds = time.perf_counter() - start
    assert len(ids) >= 131_072 and seconds < 30  # quadratic: minutes
    assert BYTES.decode(ids) == text


def test_file_round_trip(tmp_path):
    BYTES.save(tmp_path / "tokenizer.json")
    again = Tokenizer.from_file(tmp_path / "tokenizer.json")
    np.testing.assert_array_equal(again.encode("é and 中"), BYTES.encode("é and 中"))


def test_special_tokens_are_read_but_not_printed():
    backend = tokenizers.Tokenizer.from_str(BYTES.backend.to_str())
    backend.add_special_tokens(["<eos>"])
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode("a<eos>b", read_control_tokens=True)
    assert ids.tolist() == [97, 256, 98] and tokenizer.vocab_size == 257
    assert tokenizer.decode(ids) == "ab" == "".join(tokenizer.stream(ids))
    assert tokenizer.encode("a<eos>b").tolist() == [*b"a<eos>b"]


def test_bad_tokenizer_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ValueError, match=r"needed a tokenizer\.json"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


def test_read_text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("line\r\nzwölf\n".encode())
    assert read_text(path) == "line\r\nzwölf\n"
    path.write_bytes("zwölf".encode("latin-1"))
    with pytest.raises(ValueError, match=r"byte 0xf6 at offset 2 .*iconv"):
        read_text(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="which is empty"):
        read_text(path)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "none.txt")
