# SPDX-License-Identifier: Apache-2.0
"""JSON, tokenizers and what runs leave, of somebody whom nobody should trust."""

import json
import os

import jax.numpy as jnp
import pytest
from hostile_folders import bounded, folder_of, refused

from jaxcp.input_files import JSON_BYTES, read_json
from jaxcp.text.tokenizer import Tokenizer, byte_level
from jaxcp.training import checkpoint, metrics, plots

# JSON

BAD_JSON = {
    b'{"a": NaN}': "number that is NaN",
    b'{"a": [-Infinity]}': "number that is -Infinity",
    b'{"a": 1e999}': "beyond those of float64",
    b'{"a": 18446744073709551616}': "more than 64 bits",
    b'{"a": ' + b"9" * 100_000 + b"}": "more than 64 bits",
    b'{"a": 1, "a": 1}': "key twice",
    b'{"b": [{"a": 1, "a": 2}]}': "key twice",
    b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}": "nested deeper",
    b"[" * 200_000: "nested deeper",
    b'{"a":' * 200_000: "nested deeper",
    b'{"a": [' + b"0," * 5_000_000 + b"0]}": "has up to 5,000,002 values",
    '{"a": 1}'.encode("utf-16"): "not UTF-8 at byte 0",
    b"\xef\xbb\xbf{}": "needed JSON",
    b"null": "needed a JSON object",
    b'"x"': "needed a JSON object",
    b"1": "needed a JSON object",
    b"": "needed JSON",
}


@pytest.mark.parametrize("text", BAD_JSON, ids=lambda text: repr(text[:20]))
def test_json_that_is_not_strict(text, tmp_path):
    file = tmp_path / "generation_config.json"
    file.write_bytes(text)
    with bounded(), pytest.raises(ValueError, match=BAD_JSON[text]) as caught:
        read_json(file)
    assert str(file) in str(caught.value) and len(str(caught.value)) < 500


def test_json_that_is_strict(tmp_path):
    file = tmp_path / "config.json"
    fields = {"a": [-1.5e300, 2**64 - 1, -(2**63), "NaN", None, True], "é": {"b": [[[]]]}}
    file.write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")
    assert read_json(file) == fields


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = folder_of(tmp_path / "model")
    os.truncate(path / "config.json", JSON_BYTES + 1)
    refused(path, "needed a file of at most 16,777,216 bytes")


# tokenizer.json


def tokenizer_file(path, **change):
    byte_level().save(path)
    fields = json.loads(path.read_text())
    fields["model"] |= change.pop("model", {})
    path.write_text(json.dumps(fields | change))
    return path


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},  # panics
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated"}},
        {"model": {"vocab": {"a": 2**32 - 1}}},
        {"model": {"vocab": {"a": -1}}},
        {"model": {"vocab": 5}},
        {"model": {"merges": ["zz qq"]}},
    ],
    ids=lambda change: json.dumps(change)[:30],
)
def test_tokenizers(change, tmp_path, capfd):
    file = tokenizer_file(tmp_path / "tokenizer.json", **change)
    with bounded(), pytest.raises(ValueError, match=r"needed a tokenizer\.json.*tokenizer\.json"):
        Tokenizer.from_file(file)


CUT = {"direction": "Right", "stride": 0, "max_length": 2, "strategy": "LongestFirst"}
PADS = {
    "strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None,
    "pad_id": 0, "pad_type_id": 0, "pad_token": "x",
}  # fmt: skip


@pytest.mark.parametrize(
    "change", [{"truncation": CUT}, {"truncation": CUT | {"stride": 5}}, {"padding": PADS}]
)
def test_tokenizers_cut_and_pad_no_text(change, tmp_path):
    tokenizer = Tokenizer.from_file(tokenizer_file(tmp_path / "tokenizer.json", **change))
    assert tokenizer.encode("hello").tolist() == [*b"hello"]


def test_a_text_that_cannot_be_encoded(tmp_path):
    words = {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"a": 0}}
    file = tokenizer_file(tmp_path / "tokenizer.json")
    fields = json.loads(file.read_text()) | {"model": words}
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="needed a text that this tokenizer can encode"):
        Tokenizer.from_file(file).encode("b")


# What runs leave


def test_metrics_of_somebody_else(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for text in ('[1]\n{"step": 1}\n', "[" * 100_000 + "\n{}\n"):
        file.write_text(text)
        with bounded(), pytest.raises(ValueError, match="line 1: not JSON"):
            metrics.read_metrics(file)
    file.write_text('{"a": 1}\n{"step": 1}\n')
    with pytest.raises(ValueError, match="needed a step in each record"):
        metrics.MetricsFile(file, resumed_at=3)
    with pytest.raises(ValueError, match="needed tokens and loss as numbers"):
        plots.plot_loss(file, tmp_path / "loss.png")
    file.unlink()
    os.mkfifo(file)
    with bounded(), pytest.raises(ValueError, match="needed a regular file"):
        metrics.read_metrics(file)


def test_training_checkpoints_of_somebody_else(tmp_path):
    (tmp_path / "²").mkdir()
    (tmp_path / "²" / "files.json").write_text("{}")
    assert checkpoint.steps(tmp_path) == []
    (tmp_path / "3").mkdir()
    os.mkfifo(tmp_path / "3" / "files.json")
    like = {"x": jnp.zeros(1)}
    with bounded(), pytest.raises(ValueError, match=r"can be read \(3: needed a regular file"):
        checkpoint.restore(tmp_path, like)
