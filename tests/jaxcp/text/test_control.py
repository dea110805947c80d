# SPDX-License-Identifier: Apache-2.0
"""A text without control tokens becomes the ids of plain encoding; one with them stays text."""

import pytest
import tokenizers
from chat_folders import text_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxcp.text.control import Control, plain_ids, unused_marks
from jaxcp.text.tokenizer import Tokenizer

SPECIAL = ("<s>", "</s>", "<|im_end|>")
KEPT = ("  ", "    ", "<word>")
CORPUS = [text_of("hy3.jinja"), text_of("qwen3.jinja"), "Grüße an alle — 世界 ☃"]


def byte_pairs():
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return backend, trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=[*SPECIAL]
    )


def pieces():
    """As SentencePiece has them: the first word of a text gets a space, control tokens lie within
    the vocabulary."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return backend, trainers.UnigramTrainer(
        vocab_size=300, special_tokens=[*SPECIAL, "<unk>"], unk_token="<unk>", show_progress=False
    )


def words():
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    return backend, trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", *SPECIAL], show_progress=False
    )


KINDS = {make.__name__: make for make in (byte_pairs, pieces, words)}


@pytest.fixture(scope="module")
def backends():
    made = {}
    for name, make in KINDS.items():
        backend, trainer = make()
        backend.train_from_iterator(CORPUS, trainer)
        backend.add_tokens(list(KEPT))
        begin = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[begin]
        )
        made[name] = backend
    return made


TEXT = st.lists(
    st.one_of(st.text("ab <>|/s世 \n", max_size=6), st.sampled_from(["  ", "<word>", "Grüße"])),
    max_size=8,
).map("".join)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(text=TEXT, kind=st.sampled_from([*KINDS]))
def test_text_without_control_tokens(backends, text, kind):
    backend = backends[kind]
    control = Control(backend, SPECIAL)
    if control.find(text):
        return
    plain = plain_ids(backend, text)
    assert control.encode_as_text(text) == plain
    after = plain_ids(backend, f"<|im_end|>{text}")
    assert [backend.token_to_id("<|im_end|>"), *control.encode_as_text(text, follows=True)] == after
    marks, _ = unused_marks([text])
    assert control.encode(control.mark(text, marks), marks) == plain


@settings(max_examples=150, deadline=None)
@given(text=TEXT, token=st.sampled_from(SPECIAL), kind=st.sampled_from([*KINDS]))
def test_text_with_control_tokens(backends, text, token, kind):
    backend = backends[kind]
    ids = Tokenizer(backend).encode(f"{text}{token}{text}")
    known = {backend.token_to_id(x) for x in SPECIAL}
    assert known.isdisjoint(ids.tolist())
    assert token in Tokenizer(backend).decode(ids) or kind == "words"
    control = Control(backend, SPECIAL)
    marks, _ = unused_marks([text])
    around = control.encode(f"<s>{control.mark(text + token, marks)}</s>", marks)
    assert [i for i in around if i in known] == [backend.token_to_id(x) for x in ("<s>", "</s>")]


def test_marks_are_in_no_text():
    marks, more = unused_marks(["".join(map(chr, range(0xE000, 0xF8FE)))])
    assert [*map(ord, marks + more)] == [0xF8FE, 0xF8FF, 0xF0000]
    everything = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
    with pytest.raises(ValueError, match="all are taken"):
        unused_marks(["".join(map(chr, block)) for block in everything])
    assert unused_marks([r"a \\ue000 b"])[0][0] == "\ue001"
