# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that nobody should trust: refused at once, with little memory, by the file's name."""

import dataclasses
import json
import os
import shutil
import struct

import numpy as np
import pytest
from hostile_folders import bounded, folder_of, refused
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import FIXTURES, assert_same, tensors, write

from jaxcp import models, weights
from jaxcp.text.tokenizer import Tokenizer, byte_level
from jaxcp.weights.config_file import fitted, load_config
from jaxcp.weights.files import open_checkpoint
from jaxcp.weights.quantizing import quantize

SECRET = b"root:hunter2:19000:0:99999:7:::\n" * 40


# What is no regular file


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "index", "tokenizer.json"])
def test_no_regular_file(name, kind, tmp_path):
    path = folder_of(tmp_path / "model")
    if name == "index":
        (path / "model.safetensors").rename(tmp_path / "moved")
        name = "model.safetensors.index.json"
    file = path / name
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.symlink_to(name)
    if kind == "loop":  # as if it were not there; a tokenizer need not be
        if name != "tokenizer.json":
            refused(path, "needed", FileNotFoundError)
    else:
        refused(path, r"needed a regular file; .* is a (folder|pipe, a socket or a device)")


# The index


@pytest.mark.parametrize(
    "where",
    ["../secret", "a/../../secret", "{}/secret", "/etc/passwd", "..\\secret", "C:\\secret", "C:x",
     5, None, ["a"], "a\x1b[31m", "a\0", "\ud800", "x" * 5000, 1.5, True],
)  # fmt: skip
def test_names_that_lead_out_of_the_folder(where, tmp_path):
    path = folder_of(tmp_path / "model")
    (path / "model.safetensors").rename(tmp_path / "secret")
    where = where.replace("{}", str(tmp_path)) if isinstance(where, str) else where
    names = load_file(tmp_path / "secret")
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, where)}))
    message = refused(path, r"needed names of files in the folder of .*index\.json")
    assert message.isprintable() and len(message) < 600


@pytest.mark.parametrize("where", ["", ".", "config.json/x"])
def test_names_of_no_file(where, tmp_path):
    path = folder_of(tmp_path / "model")
    (path / "model.safetensors").unlink()
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": where}}))
    refused(path, "needed a regular file|are not there", (ValueError, FileNotFoundError))


def test_what_a_link_leads_to_is_not_shown(tmp_path):
    path = folder_of(tmp_path / "model")
    (tmp_path / "shadow").write_bytes(SECRET)
    for name in ("model.safetensors", "config.json"):
        (path / name).unlink()
        (path / name).symlink_to(tmp_path / "shadow")
        message = refused(path, "needed")
        shown = [str(int.from_bytes(SECRET[:8], "little")), "hunter2", "0x72"]
        assert not any(text in message for text in shown), message


def hub_cache(root, name="hy3-tiny"):
    """The fixture as the hub's cache has it: links to blobs, weights in two files."""
    blobs, snapshot = root / "blobs", root / "snapshots" / "0a1b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)

    def link(file, blob):
        (snapshot / file).symlink_to(f"../../blobs/{blob}")
        return blobs / blob

    shutil.copy(FIXTURES / name / "config.json", link("config.json", "c0"))
    byte_level().save(link("tokenizer.json", "70"))
    contents = tensors(name)
    weight_map = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(contents)}
    for i in range(2):
        part = {k: x for k, x in contents.items() if weight_map[k] == f"model-{i}.safetensors"}
        save_file(part, link(f"model-{i}.safetensors", f"f{i}"))
    index = link("model.safetensors.index.json", "1d")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return snapshot


def test_the_cache_of_the_hub_loads_and_is_quantized(tmp_path):
    snapshot = hub_cache(tmp_path / "models--org--name")
    model, tokenizer = weights.load(snapshot)
    assert_same(model, weights.load(FIXTURES / "hy3-tiny")[0])
    assert tokenizer.vocab_size == 256
    quantize(snapshot, tmp_path / "out", weights="int8", only="experts")
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    assert Tokenizer.from_file(tmp_path / "out" / "tokenizer.json").vocab_size == 256


@pytest.mark.parametrize("name", ["notes.txt", "vocab.json"])
def test_quantize_copies_no_file_of_somewhere_else(name, tmp_path):
    path = folder_of(tmp_path / "model")
    (tmp_path / "shadow").write_bytes(SECRET)
    (path / name).symlink_to(tmp_path / "shadow")
    with pytest.raises(ValueError, match=rf"{name} is a link that leads out of its folder"):
        quantize(path, tmp_path / "out", weights="int8")
    (path / name).unlink()
    os.mkfifo(path / name)
    with bounded(), pytest.raises(ValueError, match="needed a regular file"):
        quantize(path, tmp_path / "out", weights="int8")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["model", "shadow"]


def test_a_tensor_in_two_files_is_where_the_index_says(tmp_path):
    path = folder_of(tmp_path / "model")
    (path / "model.safetensors").unlink()
    for i in range(2):
        save_file({"a": np.full(2, i, np.float32)}, path / f"{i}.safetensors")
    index = path / "model.safetensors.index.json"
    for a in ("0", "1"):
        shards = {"a": f"{a}.safetensors", "b": "0.safetensors", "c": "1.safetensors"}
        index.write_text(json.dumps({"weight_map": shards}))
        assert open_checkpoint(path).read("a").tolist() == [int(a)] * 2
    del shards["a"]
    index.write_text(json.dumps({"weight_map": shards}))
    refused(path, "needed each tensor once; a is in")


# The header


def first(header):
    return header[min(name for name in header if name != "__metadata__")]


def on_the_same_bytes(header):
    name = "transformer.h.0.ln_1.weight"
    header[name]["data_offsets"] = header["transformer.h.0.ln_1.bias"]["data_offsets"]


def partly_on_the_same_bytes(header):
    at = header["transformer.h.0.ln_1.weight"]["data_offsets"]
    header["transformer.h.0.ln_1.bias"]["data_offsets"] = [at[0] + 4, at[1] + 4]
    header["nothing"] = {"dtype": "F32", "shape": [0], "data_offsets": [at[0] + 4] * 2}


HEADERS = {
    "float offsets": lambda h: first(h).update(data_offsets=[0.0, 4.0]),
    "true as an offset": lambda h: first(h).update(data_offsets=[False, True]),
    "offsets that are none": lambda h: first(h).update(data_offsets=[]),
    "three offsets": lambda h: first(h).update(data_offsets=[0, 1, 2]),
    "a negative offset": lambda h: first(h).update(data_offsets=[-4, 0]),
    "offsets the wrong way": lambda h: first(h).update(data_offsets=[8, 0]),
    "a tensor behind the end": lambda h: first(h).update(
        dtype="X", shape=[1 << 40], data_offsets=[0, 1 << 40]
    ),
    "a negative size": lambda h: first(h).update(shape=[-1]),
    "a float size": lambda h: first(h).update(shape=[64.0]),
    "a shape of strings": lambda h: first(h).update(shape=["64"]),
    "a shape that is a string": lambda h: first(h).update(shape="64"),
    "many axes": lambda h: first(h).update(shape=[1] * 70),
    "a list as a format": lambda h: first(h).update(dtype=["F32"]),
    "a number as a tensor": lambda h: h.update(a=1),
    "a name with an escape": lambda h: h.update({"a\x1b[2J": first(h)}),
    "a long name": lambda h: h.update({"a" * 5000: first(h)}),
    "the same bytes": on_the_same_bytes,
    "some of the same bytes": partly_on_the_same_bytes,
    "no object": lambda h: b"[1, 2]",
    "deep": lambda h: b"[" * 100_000,
    "a key twice": lambda h: json.dumps(h).encode()[:-1] + b', "__metadata__": {}}',
    "NaN": lambda h: b'{"a": NaN}',
    "UTF-16": lambda h: json.dumps(h).encode("utf-16"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(case, tmp_path):
    path = with_header(folder_of(tmp_path / "model"), HEADERS[case])
    message = refused(path, r"needed a whole safetensors file; got .*model\.safetensors")
    assert message.isprintable() and len(message) < 1000


@pytest.mark.parametrize(
    ("length", "match"),
    [(2 << 40, "longer than the file"), (150_000_000, "150,000,000 bytes; 100,000,000 are read")],
)
def test_a_header_that_would_fill_memory(length, match, tmp_path):
    path = folder_of(tmp_path / "model")
    with open(path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(1 << 30)  # takes no room on the disk
    refused(path, match)


def test_mxfp4_parts_that_do_not_fit(tmp_path):
    path = folder_of(tmp_path / "model")
    parts = {"a_blocks": np.zeros((1, 2, 3), np.uint8), "a_scales": np.zeros(5, np.uint8)}
    save_file(parts, path / "model.safetensors")
    refused(path, r"model\.safetensors: a: MXFP4")


def test_a_format_that_is_not_known(tmp_path):
    path = folder_of(tmp_path / "model")

    def change(header):
        first(header)["dtype"] = "X9"

    with_header(path, change)
    for read in (weights.load, lambda x: quantize(x, tmp_path / "out", weights="int8")):
        with pytest.raises(ValueError, match="X9"):
            read(path)


# config.json


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("hy3-tiny", {"num_hidden_layers": 10**9}),
        ("hy3-tiny", {"num_hidden_layers": 9999, "mlp_layer_types": None}),
        ("hy3-tiny", {"num_hidden_layers": True}),
        ("hy3-tiny", {"num_experts": 10**9}),
        ("hy3-tiny", {"num_experts": 60_000}),
        ("hy3-tiny", {"rms_norm_eps": "1e-5"}),
        ("hy3-tiny", {"rms_norm_eps": -1.0}),
        ("hy3-tiny", {"hidden_size": 0}),
        ("hy3-tiny", {"num_key_value_heads": 0}),
        ("hy3-tiny", {"vocab_size": 2**40}),
        ("hy3-tiny", {"enable_moe_fp32_combine": []}),
        ("hy3-tiny", {"mlp_layer_types": 5}),
        ("hy3-tiny", {"rope_parameters": 5}),
        ("hy3-tiny", {"model_type": ["hy_v3"]}),
        ("deepseek-v3-tiny", {"num_hidden_layers": 10**9}),
        ("deepseek-v3-tiny", {"first_k_dense_replace": 10**9}),
        ("deepseek-v3-tiny", {"n_routed_experts": 10**9}),
        ("deepseek-v4-tiny", {"num_hidden_layers": 10**9}),
        ("deepseek-v4-tiny", {"n_routed_experts": 10**9}),
        ("deepseek-v4-tiny", {"num_hash_layers": 10**9}),
        ("gpt-oss-tiny", {"num_hidden_layers": 10**9, "layer_types": None}),
        ("gpt-oss-tiny", {"num_hidden_layers": 0, "layer_types": None}),
        ("qwen3-moe-tiny", {"num_hidden_layers": 9999}),
        ("gpt2-tiny", {"n_layer": 10**9}),
        ("gpt2-tiny", {"n_layer": 9999}),
        ("gpt2-tiny", {"n_layer": 2.0}),
        ("gpt2-tiny", {"n_head": 0}),
        ("gpt2-tiny", {"n_embd": "64"}),
        ("gpt2-tiny", {"dtype": "banana"}),
        ("gpt2-tiny", {"dtype": "int8"}),
        ("gpt2-tiny", {"model_type": "x" * 100_000}),
    ],
)
def test_configs(name, change, tmp_path):
    path = folder_of(tmp_path / "model", name, **change)
    message = refused(path, "model", (ValueError, NotImplementedError))
    assert len(message) < 2200


def test_ngrams_of_any_width(tmp_path):
    config = load_config(FIXTURES / "hy3-tiny")
    mixed = models.config_to_dict(dataclasses.replace(config, layer_pattern="GN", num_mtp_layers=0))
    path = folder_of(tmp_path / "model")
    (path / "config.json").write_text(json.dumps(mixed | {"ngram": {"width": 10**9, "dim": 2}}))
    refused(path, r"ngram\.width=1000000000 \(needed int from 1 to 1023\)")


def test_as_many_layers_as_the_tensors_are_of():
    config = load_config(FIXTURES / "gpt2-tiny")
    names = {f"transformer.h.{i}.ln_1.weight" for i in range(3000)}
    deep = dataclasses.replace(config, num_layers=3000)
    assert fitted("here", deep, names) == deep
    with pytest.raises(ValueError, match=r"of here .* 2 layers, and it speaks of 3,000 layers"):
        fitted("here", deep, {"transformer.h.0.a", "transformer.h.1.a", "wte.weight"})


def with_header(path, change):
    """`model.safetensors` of the fixture with another header."""
    data = (FIXTURES / "gpt2-tiny/model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = change(header) or json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + data[8 + length :]
    )
    return path


def test_a_checkpoint_like_the_others_loads(tmp_path):
    written = write(tmp_path / "a", "gpt2-tiny", tensors("gpt2-tiny"))
    assert_same(weights.load(written)[0], weights.load(FIXTURES / "gpt2-tiny")[0])
