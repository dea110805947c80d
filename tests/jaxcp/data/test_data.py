# SPDX-License-Identifier: Apache-2.0
"""Batches: pure in the step, every token once an epoch, shifted before sharding; bad data named."""

import jax
import numpy as np
import pytest

import jaxcp
from jaxcp.data.placing import prefetch, put
from jaxcp.data.sources import (
    TextSource,
    TokenFiles,
    as_source,
    checked,
    consecutive,
)


@pytest.fixture
def files(tmp_path):
    """Tokens 0..99 over two files."""
    np.arange(60, dtype="<u2").tofile(tmp_path / "a.bin")
    np.arange(60, 100, dtype="<u2").tofile(tmp_path / "b.bin")
    return str(tmp_path / "*.bin")


def test_targets_are_the_next_tokens_across_files_and_around_the_end(files):
    source = TokenFiles(pattern=files)
    for step in range(12):
        batch = source.batch(step, rows=3, length=10)
        assert batch["tokens"].shape == (3, 10)
        np.testing.assert_array_equal(batch["targets"], (batch["tokens"] + 1) % 100)
        np.testing.assert_array_equal(batch["targets"][:, :-1], batch["tokens"][:, 1:])


def test_every_token_is_seen_once_an_epoch_and_epochs_differ(files):
    source = TokenFiles(pattern=files)
    epochs = [
        [source.batch(step, 2, 10)["tokens"] for step in range(5 * e, 5 * e + 5)] for e in (0, 1)
    ]
    for epoch in epochs:
        assert sorted(np.concatenate(epoch).reshape(-1)) == list(range(100))
    assert not np.array_equal(*epochs)


def test_a_batch_depends_on_seed_and_step_only(files):
    again = TokenFiles(pattern=files).batch(7, 3, 10)["tokens"]
    source = TokenFiles(pattern=files)
    source.batch(2, 3, 10)
    np.testing.assert_array_equal(source.batch(7, 3, 10)["tokens"], again)
    assert not np.array_equal(TokenFiles(pattern=files, seed=1).batch(7, 3, 10)["tokens"], again)


def test_a_separator_ends_a_segment_and_predicts_nothing(tmp_path):
    np.array([5, 6, 0, 7, 0, 8, 9, 5], "u1").tofile(tmp_path / "x.bin")
    source = TokenFiles(pattern=str(tmp_path / "x.bin"), dtype="uint8", separator=0)
    batch = source.batch(0, 1, 7)
    tokens, targets, segments = (batch[k][0] for k in ("tokens", "targets", "segment_ids"))
    ends = np.flatnonzero(tokens == 0)
    assert (targets[ends] == -1).all() and (targets[tokens != 0] >= 0).all()
    for place in range(6):
        assert segments[place + 1] - segments[place] == (tokens[place] == 0)
    assert (checked(batch, 256)["weights"] == (batch["targets"] >= 0)).all()


def test_text_is_bytes_and_part_splits_it(tmp_path):
    (tmp_path / "t.txt").write_text("grün " * 50)
    whole = TextSource(path=str(tmp_path / "t.txt")).tokens
    assert bytes(whole).decode() == "grün " * 50
    parts = [TextSource(path=str(tmp_path / "t.txt"), part=p).tokens for p in ((0, 0.9), (0.9, 1))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert TextSource().tokens.size > 400_000  # CPython's own documentation


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "no file matches"),
        (b"", "empty"),
        (b"abc", "multiple of 2"),
        (b"abcd", "needs 11 tokens"),
    ],
)
def test_bad_token_files(tmp_path, content, match):
    if content is not None:
        (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(ValueError, match=match):
        as_source(str(tmp_path / "*.bin")).batch(0, 1, 10)


def test_bad_text(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"t\.txt is not UTF-8"):
        TextSource(path=str(tmp_path / "t.txt")).batch(0, 1, 10)
    with pytest.raises(ValueError, match="no text"):
        TextSource(path=str(tmp_path / "none")).batch(0, 1, 10)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tokens": np.full((2, 4), 256)}, "id 256, but the vocabulary has 256"),
        ({"targets": np.full((2, 4), 999)}, "targets hold id 999"),
        ({"tokens": np.full((2, 4), -1)}, ">= 0"),
        ({"targets": None}, "needs tokens and targets"),
        ({"labels": np.ones((2, 4))}, "needs tokens and targets"),
        ({"positions": np.zeros((2, 5))}, "alike"),
    ],
)
def test_a_source_of_ones_own_is_checked(change, match):
    ones = np.ones((2, 4), int)
    batch = {"tokens": ones, "targets": ones} | change
    batch = {key: x for key, x in batch.items() if x is not None}
    with pytest.raises(ValueError, match=match):
        checked(batch, 256)


def test_consecutive():
    """Window layers exchange the window alone where this holds."""
    positions = np.array([[0, 1, 2, 0, 1]], np.int32)
    segments = np.array([[0, 0, 0, 1, 1]], np.int32)
    assert consecutive({"positions": positions, "segment_ids": segments})
    assert consecutive({"positions": np.arange(5)[None]})
    assert not consecutive({"positions": positions})
    assert not consecutive({"positions": positions, "segment_ids": 1 - segments})
    assert not consecutive({"positions": 2 * positions, "segment_ids": segments})


def test_put_lays_rows_over_data_and_tokens_over_seq():
    mesh = jaxcp.make_mesh(data=2, seq=4)
    tokens = np.arange(8 * 30).reshape(8, 30)
    batch = checked({"tokens": tokens, "targets": tokens + 1}, 10_000)
    out = put(batch, mesh=mesh, layout=jaxcp.Zigzag(), accumulate=2)
    assert {x.shape for x in out.values()} == {(2, 4, 32)}
    assert out["tokens"].sharding.spec == jax.sharding.PartitionSpec(None, "data", "seq")
    back = {key: np.asarray(x).reshape(8, 32) for key, x in out.items()}
    assert back["weights"].sum() == 8 * 30 and (back["targets"] == -1).sum() == 8 * 2
    np.testing.assert_array_equal(jaxcp.Zigzag().inverse(back["tokens"], 4, 30), tokens)
    with pytest.raises(ValueError, match="accumulate x data = 3 x 2; got 8 rows"):
        put(batch, mesh=mesh, layout=jaxcp.Zigzag(), accumulate=3)


def test_prefetch_keeps_the_order_and_hands_on_errors():
    assert list(prefetch(lambda step: step * step, 2, 6)) == [4, 9, 16, 25]
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda step: 1 // (2 - step), 0, 4))
