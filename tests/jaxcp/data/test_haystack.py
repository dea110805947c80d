# SPDX-License-Identifier: Apache-2.0
"""Haystacks and the rows that train on them."""

import re

import numpy as np
import pytest

from jaxcp.data.haystack import NeedleSource, Stage, make_haystack

LINE = re.compile(r"\n\[key (\d{4}) is (\d{6})\]\n")


def test_haystack_holds_every_needle_once_where_it_says():
    haystack = make_haystack(8_192, needles=20, seed=3)
    assert len(haystack.text.encode()) == 8_192
    found = [(int(m[1]), int(m[2]), m.start() / 8_192) for m in LINE.finditer(haystack.text)]
    expected = list(zip(haystack.keys, haystack.values, haystack.depths, strict=True))
    assert found == expected
    assert len(set(haystack.keys)) == 20
    # one needle in every twentieth of the text, give or take the needles' own length
    assert np.abs(np.asarray(haystack.depths) - (np.arange(20) + 0.5) / 20).max() < 0.1


def test_half_of_the_keys_have_a_near_identical_one():
    keys = make_haystack(8_192, needles=20, seed=0).keys

    def digits_apart(a, b):
        return sum(x != y for x, y in zip(f"{a:04d}", f"{b:04d}", strict=True))

    near = [k for k in keys if any(digits_apart(k, other) == 1 for other in keys)]
    assert len(near) >= 10


def test_same_seed_same_haystack():
    assert make_haystack(2_048, 5, seed=1) == make_haystack(2_048, 5, seed=1)
    assert make_haystack(2_048, 5, seed=1) != make_haystack(2_048, 5, seed=2)


@pytest.mark.parametrize(("length", "needles"), [(100, 20), (1_000, 0)])
def test_needles_that_do_not_fit(length, needles):
    with pytest.raises(ValueError, match="needles of 22 bytes need at least"):
        make_haystack(length, needles, seed=0)


def test_rows_are_a_function_of_the_step():
    source = NeedleSource(stages=(Stage(spacing=(4, 40)),), seed=7)
    a, b, c = source.batch(5, 2, 512), source.batch(5, 2, 512), source.batch(6, 2, 512)
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert not np.array_equal(a["tokens"], c["tokens"])
    assert {x.shape for x in a.values()} == {(2, 512)}


def test_full_weight_only_where_an_earlier_line_tells_the_answer():
    batch = NeedleSource(stages=(Stage(document_length=512, spacing=(4, 40)),)).batch(0, 4, 1_024)
    checked = 0
    for row in range(4):
        for document in (slice(0, 512), slice(512, 1_024)):
            assert len(set(batch["segment_ids"][row, document])) == 1
            tokens, targets = batch["tokens"][row, document], batch["targets"][row, document]
            assert np.array_equal(tokens[1:], targets[:-1])
            text = bytes(tokens.astype(np.uint8)).decode("latin-1")
            weights = np.concatenate([[0.0], batch["weights"][row, document]])
            known = {}
            for m in LINE.finditer(text):
                digits = weights[m.start(2) : m.end(2)]
                again = known.get(m[1]) == m[2]
                assert np.all(digits == ([2.0, 1.0, 1.0, 1.0, 1.0, 1.0] if again else [0.0] * 6))
                known.setdefault(m[1], m[2])
                checked += again
    assert checked > 10


def test_stages_change_the_document_length():
    source = NeedleSource(stages=(Stage(document_length=128), Stage(start=10, document_length=256)))
    assert source.batch(9, 1, 256)["segment_ids"].max() == 1
    assert source.batch(10, 1, 256)["segment_ids"].max() == 0
    with pytest.raises(ValueError, match="stages must start at 0"):
        NeedleSource(stages=(Stage(start=5),))
