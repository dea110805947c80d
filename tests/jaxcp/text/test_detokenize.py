# SPDX-License-Identifier: Apache-2.0
"""Joined, the pieces of a stream are the text, whatever the decoder; and they come in time."""

import time

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders

from jaxcp.text.tokenizer import Tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in (0x62, 0x80, 0xE6, 0x97, 0xA5)]
WORDS = [
    "<unk>", "▁a", "a", "b", "▁", "▁▁", " ", "", "##c", "un", "d</w>", "</w>", "|", "<pad>", "n't",
    "'m", ".", "Ġx", "æ", "Ĺ", "¥", "日", "\ufffd", "é", "<0x41>", "<0x+1>", "<0x4g>", *BYTES,
]  # fmt: skip
TOKENS = {word: i for i, word in enumerate(WORDS)}
LLAMA = [
    decoders.Replace("▁", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
]
STEPS = [
    *LLAMA, decoders.Strip("a", 2, 0), decoders.ByteLevel(), decoders.WordPiece(), decoders.CTC(),
    decoders.BPEDecoder(), decoders.Metaspace(), decoders.Metaspace(prepend_scheme="never"),
    decoders.Replace(Regex("a+"), "x"), decoders.Replace("b", "<0x42>"),
    decoders.Replace("<0x41>", "▁"), decoders.Replace("x ", "y"),
]  # fmt: skip


def tokenizer(decoder):
    """Of the words above; then a special token, one that is not, and ids that are none."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(TOKENS, unk_token="<unk>"))
    backend.add_special_tokens(["</s>"])
    backend.add_tokens(["<tool>"])
    if decoder is not None:
        backend.decoder = decoder
    return Tokenizer(backend)


def check(decoder, ids):
    tok = tokenizer(decoder)
    pieces = list(tok.stream(ids))
    assert "".join(pieces) == tok.decode(ids)
    assert all(pieces)


IDS = st.lists(st.integers(0, len(WORDS) + 3), max_size=12)
USUAL = [
    None,
    *(decoders.Sequence([step]) for step in STEPS),
    decoders.Sequence(LLAMA),
    decoders.Sequence(LLAMA[:3]),  # Gemma
    decoders.Sequence([decoders.Sequence(LLAMA[:2]), decoders.Sequence(LLAMA[2:])]),
    decoders.Sequence([decoders.Replace("▁", " "), decoders.CTC(), decoders.Fuse()]),
    decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 2, 0)]),
    decoders.ByteLevel(), decoders.Metaspace(), decoders.WordPiece(prefix="##", cleanup=False),
]  # fmt: skip


@settings(max_examples=150)
@given(st.sampled_from(USUAL), IDS)
@example(decoders.Sequence(LLAMA), [TOKENS["<0x62>"], TOKENS["<0x80>"], TOKENS["▁a"]])
@example(
    decoders.Sequence(LLAMA), [TOKENS["<0xE6>"], len(WORDS), TOKENS["<0x97>"], TOKENS["<0xA5>"]]
)
@example(decoders.Sequence([*LLAMA[:3], decoders.Strip(" ", 0, 1)]), [TOKENS["a"], TOKENS["▁"]])
def test_a_stream_is_the_text(decoder, ids):
    check(decoder, ids)


@settings(max_examples=150)
@given(st.lists(st.sampled_from(STEPS), max_size=4), IDS)
def test_of_any_chain_of_steps(steps, ids):
    check(decoders.Sequence(steps), ids)


class InPython:
    def decode_chain(self, tokens):
        return [token.upper() for token in tokens]


def test_a_decoder_that_nobody_knows():
    check(decoders.Decoder.custom(InPython()), [1, 2, 3])


@pytest.mark.parametrize("decoder", USUAL, ids=str)
def test_a_piece_comes_with_its_token(decoder):
    """No word waits for the next one, nor for more than the end of its bytes."""
    taken = []

    def source():
        for word in ("un", "a", "<0xE6>", "<0x97>", "<0xA5>", "un", "##c"):
            taken.append(word)
            yield TOKENS[word]

    stream = tokenizer(decoder).stream(source())
    next(stream)
    assert taken == ["un"]
    "".join(stream)
    assert taken[-1] == "##c"


@pytest.mark.parametrize("decoder", [decoders.Sequence(LLAMA), decoders.ByteLevel()])
@pytest.mark.parametrize("word", ["<0x80>", "¥"])
def test_a_long_answer_is_linear(decoder, word):
    tok, ids = tokenizer(decoder), [TOKENS[word]] * 100_000
    start = time.perf_counter()
    text = "".join(tok.stream(ids))
    assert time.perf_counter() - start < 10  # quadratic: minutes
    assert text == tok.decode(ids)


def test_what_is_no_id():
    tok = tokenizer(None)
    for value in (1.0, "1", None, -1, 2**32, True):
        with pytest.raises(ValueError, match=r"token ids must be integers from 0 on; got"):
            tok.decode([value])
        with pytest.raises(ValueError, match=r"token ids must be integers from 0 on; got"):
            list(tok.stream([value]))
