# SPDX-License-Identifier: Apache-2.0
"""A conversation in the ids that a model chose, which need not be the tokenizer's."""

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from jaxcp.text.known_ids import in_known_ids
from jaxcp.text.tokenizer import Tokenizer


def tokenizer():
    vocab = {"a": 0, "b": 1, "ab": 2, "Ġ": 3}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<e>"), AddedToken("<t>")])
    return Tokenizer(backend)


END, THINK = 4, 5


def test_ids_of_the_same_turns_are_those_that_are_known():
    made = tokenizer()
    ids = made.encode("ab ab<e>ab<e>b ab", read_control_tokens=True).tolist()
    assert ids == [2, 3, 2, END, 2, END, 1, 3, 2]
    as_said = [0, 1, 3, 2, END, 0, 1, END]
    assert in_known_ids(made, ids, as_said, {END}) == [*as_said, 1, 3, 2]
    # the second turn says something else
    assert in_known_ids(made, ids, [0, 1, 3, 2, END, 0, 0, END], {END}) == [*as_said[:5], *ids[4:]]
    # what was cut off has no end
    assert in_known_ids(made, ids, [0, 1, 3, 2, END, 0, 1], {END}) == [*as_said[:5], *ids[4:]]
    assert in_known_ids(made, ids, [], {END}) == ids
    assert in_known_ids(made, ids, [*ids, 0, END], {END}) == ids
    assert in_known_ids(made, ids[:5], as_said, {END}) == [*as_said[:5], 2]


def test_an_added_token_is_not_the_same_as_its_letters():
    backend = tokenizer().backend
    backend.add_tokens([AddedToken("<", special=False), AddedToken("t>", special=False)])
    made = Tokenizer(backend)
    spelled = [backend.token_to_id("<"), backend.token_to_id("t>"), END]
    assert made.backend.decode(spelled, skip_special_tokens=False) == "<t><e>"
    assert in_known_ids(made, spelled, [THINK, END], {END}) == spelled
