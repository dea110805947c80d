# SPDX-License-Identifier: Apache-2.0
"""Whichever of the allowed tokens are taken, the text follows the grammar; bad ones are refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders

import jaxcp.checkpoints
from jaxcp.inference.sampling import Sampling
from jaxcp.text.grammar import Grammars, checked_grammar, checked_schema
from jaxcp.text.tokenizer import Tokenizer, byte_level

NEEDLE = Path(jaxcp.checkpoints.__file__).parent / "needle" / "tokenizer.json"
WORDS = ["<unk>", "a", "b", "bc", "▁c", "<0x61>", "é", "<0xC3>", "<0xA9>", "abé"]


def words(decoder):
    """Words and bytes, as Llama's."""
    model = tokenizers.models.WordLevel(
        {word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"
    )
    backend = tokenizers.Tokenizer(model)
    if decoder is not None:
        backend.decoder = decoder
    return Tokenizer(backend)


LLAMA = words(
    decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
)
TOKENIZERS = [byte_level(), Tokenizer.from_file(NEEDLE), LLAMA]


def ids_of(allowed, vocab_size):
    """The ids whose bits are set; none is beyond the vocabulary."""
    bits = np.unpackbits(allowed.view(np.uint8), bitorder="little")
    assert allowed.dtype == np.int32 and len(bits) == -(-vocab_size // 32) * 32
    return np.flatnonzero(bits[:vocab_size])


def walk(constraint, vocab_size, rng, most=60):
    """Take tokens at random until the grammar is complete."""
    taken = []
    while not constraint.complete and len(taken) < most:
        taken.append(int(rng.choice(ids_of(constraint.allowed(), vocab_size))))
        constraint.take(taken[-1])
    return taken


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "needle", "llama"])
@pytest.mark.parametrize("more", [0, 40])
def test_what_is_allowed_is_what_the_grammar_says(tokenizer, more):
    """Take models with as many ids as the tokenizer, or with pads behind."""
    vocab_size, rng = tokenizer.vocab_size + more, np.random.default_rng(0)
    grammars, pattern = Grammars(tokenizer, vocab_size), "(a|b|é){2,4}"
    texts = set()
    for _ in range(30):
        constraint = grammars.constraint(checked_grammar("regex", pattern), [])
        texts.add(tokenizer.decode(walk(constraint, vocab_size, rng)))
    assert all(re.fullmatch("(a|b|é){4}", text) for text in texts) and len(texts) > 5


def test_a_schema():
    schema = {"type": "array", "items": {"enum": [1, "é", None]}, "maxItems": 3}
    compiled = checked_grammar("json_schema", checked_schema(schema))
    rng, grammars = np.random.default_rng(0), Grammars(TOKENIZERS[1], 256)
    for _ in range(20):
        text = TOKENIZERS[1].decode(walk(grammars.constraint(compiled, []), 256, rng, most=500))
        values = json.loads(text)
        assert len(values) <= 3 and all(value in (1, "é", None) for value in values)


def test_stop_tokens_where_the_grammar_may_end():
    """And nowhere else, though they are text that it asks for."""
    a, b, stop = (ord(x) for x in "ab!")
    grammars = Grammars(byte_level(), 256)
    constraint = grammars.constraint(checked_grammar("regex", "ab*"), [stop])
    assert ids_of(constraint.allowed(), 256).tolist() == [a]
    constraint.take(a)
    assert ids_of(constraint.allowed(), 256).tolist() == [stop, b] and not constraint.complete
    constraint = grammars.constraint(checked_grammar("regex", "ba"), [a])
    constraint.take(b)
    assert not constraint.allowed().any()
    for pattern in ("ab*", ""):
        with pytest.raises(ValueError, match="no token that is not a stop token begins"):
            grammars.constraint(checked_grammar("regex", pattern), [a] if pattern else [])
    constraint = grammars.constraint(checked_grammar("regex", ""), [stop])
    assert ids_of(constraint.allowed(), 256).tolist() == [stop]


def test_a_model_with_fewer_ids_than_the_tokenizer():
    constraint = Grammars(LLAMA, 7).constraint(checked_grammar("regex", "é|abé"), [])
    assert ids_of(constraint.allowed(), 7).tolist() == [1, 5, 6]


def test_a_token_that_was_not_allowed_ends_it_all():
    constraint = Grammars(LLAMA, 10).constraint(checked_grammar("regex", "ab"), [])
    constraint.take(2)
    assert constraint.trouble and not constraint.allowed().any() and not constraint.complete


def test_tokenizers_without_bytes():
    for decoder in (None, decoders.Metaspace()):
        with pytest.raises(ValueError, match=r"grammars need a tokenizer whose decoder"):
            Grammars(words(decoder), 10)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"json_schema": {"type": "objct"}}, "json_schema cannot be followed: Invalid type: objct"),
        ({"json_schema": {"not": {}}}, "json_schema cannot be followed: Unimplemented"),
        ({"json_schema": "{"}, "json_schema must be JSON"),
        ({"json_schema": '{}}, {"lark_grammar": "start: /a/"'}, "json_schema must be JSON"),
        ({"json_schema": [1]}, "json_schema must be a JSON object"),
        ({"json_schema": {1, 2}}, "json_schema must be JSON"),
        ({"regex": "(a"}, "regex cannot be followed"),
        ({"regex": 5}, "regex must be text"),
        ({"grammar": "start: foo"}, "grammar cannot be followed"),
        ({"grammar": "start: /a/", "regex": "a"}, "follows one grammar; got regex and grammar"),
    ],
    ids=str,
)
def test_what_is_no_grammar(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
