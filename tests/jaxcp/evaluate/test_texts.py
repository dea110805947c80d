# SPDX-License-Identifier: Apache-2.0
"""Texts to score: which tokens of a document are predicted, and how many bytes they are."""

import json

import numpy as np
import pytest
import tokenizers

from jaxcp.data.prepare import prepare
from jaxcp.evaluate.texts import read_texts
from jaxcp.text.encoders import byte_encoder
from jaxcp.text.tokenizer import Tokenizer, byte_level

WORDS = {"one": 0, "two": 1, "three": 2, "<s>": 3}


def words():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend)


def test_a_file_is_a_document_and_so_is_a_line_of_json(tmp_path):
    (tmp_path / "a.txt").write_text("äb\n")
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"body": x}) + "\n" for x in ("xyz", "", "q", "uv"))
    )
    names = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    texts = read_texts(names, byte_level(), field="body")
    assert [bytes(text.ids.astype(np.uint8)) for text in texts] == ["äb\n".encode(), b"xyz", b"uv"]
    # the first byte of ä is not predicted; the character belongs to its second
    assert [(text.first, text.bytes) for text in texts] == [(1, 4), (1, 2), (1, 1)]
    cut = read_texts(names, byte_level(), field="body", max_tokens=4)
    assert [text.ids.tolist() for text in cut] == [texts[0].ids.tolist(), [*b"xy"]]
    assert [(text.predicted, text.bytes) for text in cut] == [(3, 4), (1, 1)]


def test_what_begins_a_text_predicts_its_first_token(tmp_path):
    (tmp_path / "a.txt").write_text("one two")
    name = str(tmp_path / "a.txt")
    [text] = read_texts([name], words())
    assert (text.ids.tolist(), text.first, text.bytes) == ([0, 1], 1, 7 - 3)
    tokenizer = words()
    tokenizer.begin = (3,)
    [text] = read_texts([name], tokenizer)
    assert (text.ids.tolist(), text.first, text.bytes) == ([3, 0, 1], 1, 7)


@pytest.mark.parametrize("place", ["ends", "starts"])
def test_a_prepared_folder_is_divided_at_its_separators(tmp_path, place):
    documents = ["first", "2", "the third"]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in documents))
    encoder = byte_encoder(separator="<|endoftext|>")
    out = tmp_path / "out"
    prepare(
        [str(tmp_path / "x.jsonl")], out, encoder=encoder, val=0.0, separator_at=place,
        shard_tokens=7,
    )  # fmt: skip
    texts = read_texts([str(out)], encoder.tokenizer, part="train")
    whole = [[*x.encode()] for x in documents]
    if place == "ends":
        assert [text.ids.tolist() for text in texts] == [[*x, 256] for x in whole]
        assert [text.bytes for text in texts] == [4, 0, 8]
    else:
        ends = [256], [256], []
        expected = [[256, *x, *end] for x, end in zip(whole, ends, strict=True)]
        assert [text.ids.tolist() for text in texts] == expected
        assert [text.bytes for text in texts] == [5, 1, 9]
    [text] = read_texts([str(out)], encoder.tokenizer, part="train", max_tokens=2)
    assert text.predicted == 2
    other = byte_level()
    other.backend.add_tokens(["no", "<|endoftext|>"])
    with pytest.raises(
        ValueError, match=r"another tokenizer.*<\|endoftext\|>' is 256 there and 257"
    ):
        read_texts([str(out)], other, part="train")
    with pytest.raises(ValueError, match="without a part 'val'"):
        read_texts([str(out)], encoder.tokenizer)


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing.txt", "needed a file"), ("a.bin", "needed text"), ("short.txt", "two tokens")],
)
def test_what_has_no_text_is_refused(tmp_path, name, message):
    (tmp_path / "short.txt").write_text("x")
    (tmp_path / "a.bin").write_bytes(b"\0\1\2")
    with pytest.raises(ValueError, match=message):
        read_texts([str(tmp_path / name)], byte_level())
