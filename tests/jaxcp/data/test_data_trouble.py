# SPDX-License-Identifier: Apache-2.0
"""Data from outside is checked as it came: nothing is narrowed first, and positions must mask."""

import logging
import types

import jax
import ml_dtypes
import numpy as np
import pytest

import jaxcp
from jaxcp.data.sources import checked
from jaxcp.training import OptimizerConfig, TextSource, TokenFiles, TrainConfig
from jaxcp.training.batches import Batches
from pallas_kernels import PAD_POSITION

LENGTH = 6
SECOND_DOCUMENT = np.array([[0, 1, 2, 0, 1, 2]])


def batch(**changes):
    leaves = {"tokens": np.full((1, LENGTH), 5), "targets": np.full((1, LENGTH), 6)} | changes
    return {name: np.asarray(x) for name, x in leaves.items()}


def full(value, dtype=None):
    return np.full((1, LENGTH), value, dtype)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tokens": full(2**32 + 5)}, r"tokens hold id 4294967301, .* \(row 0, place 0\)"),
        ({"tokens": full(2**64 - 1, np.uint64)}, "hold id 18446744073709551615"),
        ({"targets": full(2**32 + 5)}, "targets hold id 4294967301"),
        ({"tokens": full(-(2**32) + 5)}, ">= 0; got -4294967291"),
        ({"targets": full(-(2**32) + 5)}, "targets must fit int32"),
        ({"tokens": full(2.7)}, "tokens must be integers; got float64"),
        ({"tokens": full(5.0, np.float32)}, "tokens must be integers; got float32"),
        ({"targets": full(True)}, "targets must be integers; got bool"),
        ({"tokens": full("5")}, "tokens must be integers; got <U1"),
        ({"tokens": full(None)}, "tokens must be integers; got object"),
        ({"positions": np.arange(LENGTH)[None] + 0.5}, "positions must be integers; got float64"),
        ({"positions": np.arange(LENGTH)[None] + 2**31}, "positions must fit int32"),
        ({"positions": np.arange(LENGTH)[None] - 1}, "positions must be >= 0; got -1"),
        ({"segment_ids": full(0.5)}, "segment_ids must be integers"),
        ({"segment_ids": full(2**40)}, "segment_ids must fit int32; .* number them from 0"),
        ({"segment_ids": np.zeros(LENGTH, int)}, "alike"),
        ({"weights": np.ones(LENGTH)}, "alike"),
        ({"weights": full(1e300)}, "weights must fit float32"),
        ({"weights": full(1j)}, "weights must be real"),
        ({"tokens": np.zeros((1, 0), int), "targets": np.zeros((1, 0), int)}, "not empty"),
        ({"tokens": np.zeros(LENGTH, int), "targets": np.zeros(LENGTH, int)}, r"\[B, T\]"),
        ({"positions": np.arange(LENGTH)[None] + 3}, "the model has 8 positions; got position 8"),
        ({"positions": full(PAD_POSITION)}, "pads .* see nothing"),
    ],
)
def test_what_is_no_batch_is_refused_as_it_came(changes, match):
    with pytest.raises(ValueError, match=match):
        checked(batch(**changes), vocab_size=64, max_positions=8)


def test_a_batch_that_is_none():
    with pytest.raises(ValueError, match=r"a batch needs tokens and targets .* got tuple"):
        checked((full(1), full(2)), vocab_size=64)


def test_what_is_a_batch_is_narrowed_without_a_change():
    pads = np.array([[0, 1, 2, 3, PAD_POSITION, PAD_POSITION]], np.int64)
    out = checked(
        batch(
            tokens=full(63, np.uint64),
            targets=np.array([[1, 2, 3, -100, -1, -1]], np.int64),
            positions=pads,
            segment_ids=np.array([[7, 7, 3, 3, 0, 0]], np.uint8),
            weights=full(0.5, ml_dtypes.bfloat16),
        ),
        vocab_size=64,
        max_positions=4,
    )
    assert {name: x.dtype.name for name, x in out.items() if name != "weights"} == dict.fromkeys(
        ("tokens", "targets", "positions", "segment_ids"), "int32"
    )
    assert out["positions"].tolist() == pads.tolist() and (out["tokens"] == 63).all()
    assert out["weights"].dtype == np.float32
    assert out["weights"].tolist() == [[0.5, 0.5, 0.5, 0, 0, 0]]


@pytest.mark.parametrize(
    ("positions", "segments", "match"),
    [
        (SECOND_DOCUMENT, None, "row 0 has 2 and then 0 at place 3: give segment_ids"),
        (full(4), None, "has 4 and then 4 at place 1"),  # two tokens at one position
        (np.arange(LENGTH)[None, ::-1], None, "has 5 and then 4 at place 1"),
        (np.array([[0, 1, PAD_POSITION, 1, 2, 3]]), None, "has 1 and then 1 at place 3"),
        (SECOND_DOCUMENT, np.array([[0, 0, 0, 0, 1, 1]]), "at place 3: segment 0 must be one"),
        (np.array([[0, 1, 2, 0, 1, 0]]), np.array([[4, 4, 9, 9, 9, 4]]), "segment 4 must be one"),
    ],
)
def test_positions_that_would_show_later_tokens_are_refused(positions, segments, match):
    leaves = {"positions": positions} | ({} if segments is None else {"segment_ids": segments})
    with pytest.raises(ValueError, match=match):
        checked(batch(**leaves, weights=full(0)), vocab_size=64)


def test_positions_that_mask_are_taken():
    gaps = np.array([[0, 2, 4, 8, 9, 20]])
    left = np.array([[PAD_POSITION, PAD_POSITION, 0, 1, 2, 3]])
    apart = np.array([[1, 0, 1, 0, 1, 0]])  # segments in turn: each ascends by itself
    for changes in (
        {"positions": gaps},
        {"positions": left, "weights": (left < 9).astype(int)},
        {"positions": SECOND_DOCUMENT, "segment_ids": np.array([[0, 0, 0, 1, 1, 1]])},
        {"positions": np.array([[0, 0, 1, 1, 2, 2]]), "segment_ids": apart},
    ):
        out = checked(batch(**changes), vocab_size=64)
        assert (out["positions"] == changes["positions"]).all()


@pytest.mark.parametrize(
    ("key", "dtype", "pad"),
    [
        ("positions", "uint8", PAD_POSITION),
        ("segment_ids", "uint32", -1),
        ("targets", "uint16", -1),
    ],
)
def test_pads_that_a_dtype_cannot_hold_are_refused(key, dtype, pad):
    """They would wrap, and be tokens."""
    with pytest.raises(ValueError, match=f"pads of '{key}' are {pad}, which {dtype} cannot hold"):
        jaxcp.Zigzag().permute({key: np.zeros((1, LENGTH), dtype)}, 2)
    filled = jaxcp.Zigzag().permute({key: np.zeros((1, LENGTH), dtype)}, 2, fill={key: 9})
    assert (filled[key] == 9).sum() == 2
    jaxcp.Contiguous().permute({key: np.zeros((1, LENGTH), dtype)}, 2)  # needs no pads


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"batch_size": 4.0}, "batch_size must be an integer; got batch_size=4.0"),
        ({"steps": 1.5}, "steps must be an integer"),
        ({"stop_after": 1.5}, "stop_after must be an integer"),
        ({"seed": 0.5}, "seed must be an integer"),
        ({"seq_len": np.int64(0)}, "seq_len must be positive"),
    ],
)
def test_counts_of_a_run_are_integers(changes, match):
    fixed = {"model": None, "seq_len": 8, "batch_size": 2, "steps": 1, "data": "x.bin"}
    with pytest.raises(ValueError, match=match):
        TrainConfig(**fixed | {"out_dir": "out"} | changes)


@pytest.mark.parametrize("name", ["weight_decay", "router_bias_rate"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -1])
def test_rates_are_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be >= 0; got {name}={value}"):
        OptimizerConfig(**{name: value})


def test_a_file_of_another_dtype_is_refused_with_the_place_in_it(tmp_path):
    """The smallest ids that int32 holds wrongly: a uint32 file read as uint64."""
    for name, count in (("a", 10), ("b", 40)):
        (np.arange(count) % 60).astype("uint32").tofile(tmp_path / f"{name}.bin")
    (tmp_path / "c.bin").mkdir()  # a folder is no file
    source = TokenFiles(pattern=str(tmp_path / "*.bin"), dtype="uint64")
    wide = np.concatenate(source.pieces)
    assert wide.size == 25 and wide.min() >= 2**32
    wanted = 0, 2, 8
    with pytest.raises(ValueError, match=r"tokens hold id \d{11,}, .* \(row 0, place 0") as error:
        checked(source.batch(*wanted), 64, locate=lambda *at: source.locate(*wanted, *at))
    value = int(str(error.value).split("id ")[1].split(",")[0])
    name, token = source.locate(*wanted, 0, 0).split(", token ")
    file = np.fromfile(name, "uint64")
    assert file[int(token.split()[0])] == value and f"byte {8 * int(token.split()[0])}," in token


def test_a_run_names_file_and_offset(tmp_path):
    ids = np.arange(100, dtype="uint16")
    ids[37] = 300
    ids.tofile(tmp_path / "x.bin")
    config = TrainConfig(
        model=jaxcp.GPTConfig(
            vocab_size=256, num_layers=1, embed_dim=8, num_heads=1, max_positions=16
        ),
        seq_len=10,
        batch_size=10,
        steps=1,
        data=str(tmp_path / "x.bin"),
        out_dir=tmp_path / "out",
    )
    run = Batches(config, jaxcp.make_mesh(devices=jax.devices()[:1]))
    with pytest.raises(ValueError, match=r"id 300, .*x\.bin, token 37 \(byte 74, uint16\)"):
        run.batch(0)
    longer = {"tokens": np.zeros((1, 17), int), "targets": np.zeros((1, 17), int)}
    run.source = types.SimpleNamespace(batch=lambda *wanted: longer)
    with pytest.raises(ValueError, match="the model has 16 positions; got position 16"):
        run.batch(0)


@pytest.mark.parametrize("dtype", ["uint32", "int64", "uint64"])
def test_a_separator_works_in_files_of_any_width(tmp_path, dtype):
    np.array([5, 6, 0, 7, 0, 8, 9, 5], dtype).tofile(tmp_path / "x.bin")
    batch = TokenFiles(pattern=str(tmp_path / "x.bin"), dtype=dtype, separator=0).batch(0, 1, 7)
    assert ((batch["targets"] == -1) == (batch["tokens"] == 0)).all()
    assert checked(batch, 10)["targets"].dtype == np.int32


def test_the_largest_id_of_a_file_stays_outside(tmp_path):
    np.full(8, 2**64 - 1, "uint64").tofile(tmp_path / "x.bin")
    batch = TokenFiles(pattern=str(tmp_path / "x.bin"), dtype="uint64").batch(0, 1, 7)
    with pytest.raises(ValueError, match="tokens hold id"):
        checked(batch, 2**31 - 1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtype": "float32"}, "got dtype='float32'"),
        ({"dtype": "uint15"}, "must name a dtype.*uint15"),
        ({"dtype": ">u2"}, "got dtype='>u2'"),
        ({"separator": 65536}, "separator must be a token of dtype=uint16, 0 to 65535"),
        ({"separator": -1}, "got separator=-1"),
        ({"separator": 1.5}, "got separator=1.5"),
        ({"separator": True}, "got separator=True"),
    ],
)
def test_a_source_that_could_not_be_right(options, match):
    with pytest.raises(ValueError, match=match):
        TokenFiles(pattern="x.bin", **options)


@pytest.mark.parametrize(("wrote", "read"), [("uint32", "uint16"), ("uint16", "uint8")])
def test_a_file_that_looks_wider_is_said_to(tmp_path, caplog, wrote, read):
    rng = np.random.default_rng(0)
    for name, dtype in (("wrong", wrote), ("right", read)):
        rng.integers(0, 250, 1000).astype(dtype).tofile(tmp_path / f"{name}.bin")
    with caplog.at_level(logging.WARNING):
        assert TokenFiles(pattern=str(tmp_path / "right.bin"), dtype=read).pieces
        assert not caplog.records
        assert TokenFiles(pattern=str(tmp_path / "wrong.bin"), dtype=read).pieces
    assert f"wrong.bin is below 16, as if it held wider integers than {read}" in caplog.text


def test_a_folder_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").mkdir()
    assert bytes(TextSource(path=str(tmp_path / "*.txt")).tokens) == b"abc"
