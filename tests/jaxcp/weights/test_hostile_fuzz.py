# SPDX-License-Identifier: Apache-2.0
"""Whatever is in a file of a checkpoint is read, or refused by a message that names the file."""

import copy
import json
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_checkpoints import FIXTURES

from jaxcp import models
from jaxcp.input_files import read_json, strict_json
from jaxcp.text.tokenizer import Tokenizer, byte_level
from jaxcp.weights.config_file import fitted, load_config
from jaxcp.weights.files import FORMATS, open_checkpoint

REFUSED = ValueError, NotImplementedError, FileNotFoundError
FAMILIES = (
    *("gpt2", "hy3", "deepseek-v3", "deepseek-v32", "deepseek-v4", "gpt-oss", "qwen3-moe"),
    *("llama", "mistral", "qwen2", "qwen3"),
)
NUMBERS = st.sampled_from([0, 1, -1, 2, 7, 10**9, 2**31, 2**63, 10**30, 0.5, -0.0, 1e300, 1e-310])
SCALARS = NUMBERS | st.none() | st.booleans() | st.text(max_size=3) | st.integers(-9, 999)
VALUES = st.recursive(
    SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=2), x),
    max_leaves=4,
)  # fmt: skip


def read_or_refused(read, file):
    """What `read` makes of `file`, None where it says that it does not."""
    try:
        return read()
    except REFUSED as error:
        assert str(file) in str(error) and len(str(error)) < 4000
        return None


def fields_of(name):
    return json.loads((FIXTURES / f"{name}-tiny" / "config.json").read_text())


def places(value, path=()):
    """The paths of all values in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inside in items:
        yield (*path, key)
        if isinstance(inside, dict | list):
            yield from places(inside, (*path, key))


@st.composite
def changed(draw, value, new=VALUES):
    """`value` with something in it replaced, once or twice."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        *path, last = draw(st.sampled_from(list(places(value))))
        holder = value
        for key in path:
            holder = holder[key]
        holder[last] = copy.deepcopy(draw(new))
    return value


@st.composite
def spoilt(draw, data):
    """`data` with some bytes replaced, put in or taken out."""
    for _ in range(draw(st.integers(1, 3))):
        at, size = draw(st.integers(0, len(data))), draw(st.integers(0, 4))
        data = data[:at] + draw(st.binary(max_size=4)) + data[at + size :]
    return data


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=60)
@given(VALUES.flatmap(lambda x: st.just(json.dumps(x).encode()) | spoilt(json.dumps(x).encode())))
@example(b'{"a": 1, "a": 1}')
def test_json(data):
    """What is read is what json reads, and can be written without NaN."""
    try:
        value = strict_json(data)
    except ValueError as error:
        assert len(str(error)) < 200
    else:
        assert value == json.loads(data) and json.dumps(value, allow_nan=False)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40)
@given(data=st.data())
def test_configs(name, here, data):
    """One that is read is bounded by the tensors of its checkpoint, or refused by them."""
    shutil.copy(FIXTURES / f"{name}-tiny" / "config.json", here)
    fields = data.draw(changed(fields_of(name)))
    (here / "config.json").write_text(json.dumps(fields))
    config = read_or_refused(lambda: load_config(here), here)
    if config is not None:
        assert models.family_of(config) and hash(config) is not None
        names = open_checkpoint(FIXTURES / f"{name}-tiny").shapes
        config = read_or_refused(lambda: fitted(here, config, names), here)
        assert config is None or config.num_layers <= 256


SMALL = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "w": {"dtype": "F8_E4M3", "shape": [2, 4], "data_offsets": [32, 40]},
    "w_scale": {"dtype": "F32", "shape": [1], "data_offsets": [40, 44]},
    "x_blocks": {"dtype": "U8", "shape": [1, 1, 1, 16], "data_offsets": [44, 60]},
    "x_scales": {"dtype": "U8", "shape": [1, 1, 1], "data_offsets": [60, 61]},
    "y_packed": {"dtype": "I32", "shape": [2, 1], "data_offsets": [64, 72]},
    "y_scale": {"dtype": "F32", "shape": [2, 1], "data_offsets": [72, 80]},
    "y_shape": {"dtype": "I64", "shape": [2], "data_offsets": [80, 96]},
    "z.qweight": {"dtype": "I32", "shape": [1, 8], "data_offsets": [96, 128]},
    "z.qzeros": {"dtype": "I32", "shape": [1, 1], "data_offsets": [128, 132]},
    "z.scales": {"dtype": "F16", "shape": [1, 8], "data_offsets": [132, 148]},
    "z.g_idx": {"dtype": "I32", "shape": [8], "data_offsets": [148, 180]},
    "__metadata__": {"format": "pt"},
}
HEADER_VALUES = VALUES | st.sampled_from([*FORMATS, [0, 24], [2, 2], [24, 28], [10**12, 0]])


def safetensors(header):
    text = json.dumps(header).encode()
    body = bytes(80) + struct.pack("<2q", 2, 8) + bytes(84)
    return struct.pack("<Q", len(text)) + text + body


@settings(max_examples=60)
@given(changed(SMALL, HEADER_VALUES).map(safetensors) | spoilt(safetensors(SMALL)))
@example(safetensors(SMALL))
def test_headers(here, data):
    """Tensors that are read lie in the file, apart from each other, and have their shapes."""
    file = here / "model.safetensors"
    file.write_bytes(data)
    found = read_or_refused(lambda: open_checkpoint(here), file)
    end = 0
    for at in sorted(found.stored.values(), key=lambda at: at.start) if found else ():
        assert end <= at.start or not at.nbytes
        end = max(end, at.start + at.nbytes)
        if at.dtype in FORMATS:
            assert at.view().shape == at.shape and at.view().nbytes == at.nbytes
    assert end <= len(data)


NAMES = st.text(st.sampled_from("./\\:a\0~"), max_size=6) | st.just("a.safetensors") | VALUES


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from("abc"), NAMES) | VALUES)
@example({"a": "a.safetensors"})
@example({"a": "../a.safetensors"})
@example({"a": "..\\a.safetensors"})
def test_indexes(here, weight_map):
    """Every file that is opened lies in the folder."""
    folder = here / "sharded"
    folder.mkdir(exist_ok=True)
    for place in (here, folder):
        (place / "a.safetensors").write_bytes(safetensors(SMALL))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = read_or_refused(lambda: open_checkpoint(folder), folder)
    for at in found.stored.values() if found else ():
        assert Path(at.file).resolve() == folder / "a.safetensors"


PARTS = st.sampled_from(
    [{"type": "ByteLevel"}, {"type": "Whitespace"}, {"type": "Split", "pattern": {"Regex": "("}},
     {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}, {"type": "Sequence"},
     {"type": "WordPiece", "vocab": {}, "unk_token": "u"}, {"type": "Unigram", "vocab": []}]
)  # fmt: skip


def tokenizer_fields():
    fields = json.loads(byte_level().backend.to_str())
    fields["model"]["vocab"] = dict(list(fields["model"]["vocab"].items())[64:70])
    return fields


@settings(max_examples=60)
@given(changed(tokenizer_fields(), VALUES | PARTS).map(lambda x: json.dumps(x).encode())
       | spoilt(json.dumps(tokenizer_fields()).encode()))  # fmt: skip
def test_tokenizers(here, data):
    file = here / "tokenizer.json"
    file.write_bytes(data)
    tokenizer = read_or_refused(lambda: Tokenizer.from_file(file), file)
    if tokenizer is not None:
        assert read_json(file) and tokenizer.vocab_size >= 0
