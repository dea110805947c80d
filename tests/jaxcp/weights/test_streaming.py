# SPDX-License-Identifier: Apache-2.0
"""Tensors go from files to shards in pieces, and what is wrong with a file is said by name."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file
from tiny_checkpoints import assert_same, tensors, write

from jaxcp import weights
from jaxcp.models.weight_table import Row, sources
from jaxcp.weights import loading
from jaxcp.weights import stream as streaming
from jaxcp.weights.files import FORMATS, open_checkpoint

EXPERTS = Row("mlp.{e}.up", "f d", "up", "e d f")
JOINED = Row("qkv", "(n h) d", ("q", "k"), "d n h")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Every tensor here takes several."""
    monkeypatch.setattr(streaming, "CHUNK", 600)


def checkpoint(folder, **given):
    save_file(given, folder / "model.safetensors")
    return open_checkpoint(folder)


@pytest.mark.parametrize("spec", [P(), P("expert"), P(None, "model", "expert"), P("model", None)])
def test_shards_of_experts_are_those_of_the_whole(spec, tmp_path, mesh_of):
    mesh_of(expert=4, model=2)
    exact = np.random.default_rng(0).normal(size=(4, 12, 40)).astype(np.float32)
    file = checkpoint(
        tmp_path, **{f"mlp.{e}.up": np.ascontiguousarray(exact[e].T) for e in range(4)}
    )
    source = sources([EXPERTS], {"up": exact.shape}, file.shapes)["up"]
    sharding = NamedSharding(jax.sharding.get_mesh(), spec)
    found, strange = streaming.stream(
        source.pieces("up", file.read), exact.shape, ml_dtypes.bfloat16, sharding
    )
    whole = jax.device_put(exact.astype(ml_dtypes.bfloat16), sharding)
    assert found.sharding == whole.sharding and not strange
    for ours, theirs in zip(found.addressable_shards, whole.addressable_shards, strict=True):
        assert ours.index == theirs.index and ours.device == theirs.device
        np.testing.assert_array_equal(ours.data, theirs.data)


def test_two_leaves_of_one_tensor(tmp_path, mesh_of):
    mesh_of(model=2)
    qkv = np.arange(48 * 20, dtype=np.float32).reshape(48, 20)
    file = checkpoint(tmp_path, qkv=qkv)
    shapes = {"q": (20, 8, 4), "k": (20, 4, 4)}
    found = sources([JOINED], shapes, file.shapes)
    sharding = NamedSharding(jax.sharding.get_mesh(), P(None, "model"))
    for name, part in (("q", qkv[:32]), ("k", qkv[32:])):
        pieces = found[name].pieces(name, file.read)
        leaf, _ = streaming.stream(pieces, shapes[name], np.float32, sharding)
        np.testing.assert_array_equal(leaf, part.reshape(-1, 4, 20).transpose(2, 0, 1))


def test_only_what_a_host_holds_is_read(tmp_path):
    """A sharding over one device of a mesh stands for one host of many."""
    file = checkpoint(tmp_path, **{f"mlp.{e}.up": np.ones((2, 3), np.float32) for e in range(4)})
    source = sources([EXPERTS], {"up": (4, 3, 2)}, file.shapes)["up"]
    asked = []

    class Second:
        def addressable_devices_indices_map(self, shape):
            return {"a device": (slice(2, 3), slice(None), slice(None))}

    pieces = source.pieces("up", lambda name: (asked.append(name), file.read(name))[1])
    with pytest.raises(Exception, match="a device"):  # it is none
        streaming.stream(pieces, (4, 3, 2), np.float32, Second())
    assert asked == ["mlp.2.up"]


def test_what_is_not_finite_is_counted_by_tensor_and_once(tmp_path, mesh_of):
    """On two devices that hold the same values, and after rounding."""
    mesh_of(expert=2, data=2)
    given = {f"mlp.{e}.up": np.ones((30, 20), np.float32) for e in range(4)}
    given["mlp.1.up"][3, 4], given["mlp.3.up"][:, 1] = np.nan, 1e30
    file = checkpoint(tmp_path, **given)
    source = sources([EXPERTS], {"up": (4, 20, 30)}, file.shapes)["up"]
    sharding = NamedSharding(jax.sharding.get_mesh(), P("expert"))
    pieces = list(source.pieces("up", file.read))
    _, strange = streaming.stream(pieces, (4, 20, 30), np.float16, sharding)
    assert strange == {"mlp.1.up": 1, "mlp.3.up": 30}
    _, strange = streaming.stream(pieces, (4, 20, 30), np.float32, sharding)
    assert strange == {"mlp.1.up": 1}


def test_a_model_on_a_mesh_is_the_one_without(tmp_path, mesh_of):
    folder = write(tmp_path / "in", "hy3-tiny", tensors("hy3-tiny"))
    alone, _ = weights.load(folder)
    mesh_of(seq=2, model=2, expert=2)
    spread, _ = weights.load(folder)
    assert_same(alone, spread)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_as_it_lies(name, tmp_path):
    raw = np.random.default_rng(1).integers(0, 2, (3, 16), np.uint8)
    header = json.dumps(
        {
            "x": {
                "dtype": name,
                "shape": [3, 16 // np.dtype(FORMATS[name]).itemsize],
                "data_offsets": [0, 48],
            }
        }
    ).encode()
    file = len(header).to_bytes(8, "little") + header + raw.tobytes()
    (tmp_path / "model.safetensors").write_bytes(file)
    found = open_checkpoint(tmp_path).read("x")
    assert found.dtype == FORMATS[name] and found.tobytes() == raw.tobytes()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "ends at byte"),
        ({"dtype": "F32", "shape": [5], "data_offsets": [0, 8]}, "has 8 bytes"),
        ({"dtype": "F32", "shape": [2]}, "data_offsets"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, "lies at bytes -8 to 0"),
        ({"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}, "lies at bytes 0 to 8"),
        ({"dtype": "other", "shape": [2], "data_offsets": [8, 0]}, "lies at bytes 8 to 0"),
    ],
)
def test_a_header_that_lies_is_refused(fields, says, tmp_path):
    header = json.dumps({"x": fields}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=says) as error:
        open_checkpoint(tmp_path)
    assert str(file) in str(error.value) and "Copy it again" in str(error.value)


def test_a_shard_that_was_cut_names_itself(tmp_path):
    model, _ = weights.load(write(tmp_path / "in", "hy3-tiny", tensors("hy3-tiny")))
    weights.save(model, tmp_path / "out", shard_bytes=30_000)
    cut = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(ValueError, match=cut.name):
        weights.load(tmp_path / "out")


@pytest.mark.parametrize("axes", [{}, {"model": 2, "seq": 4}])
def test_a_file_that_is_cut_while_it_is_read_names_itself(axes, tmp_path, mesh_of, monkeypatch):
    """And blames no mesh."""
    folder = write(tmp_path, "hy3-tiny", tensors("hy3-tiny"))
    whole = (file := folder / "model.safetensors").read_bytes()

    def cut(path):
        found = open_checkpoint(path)
        file.write_bytes(whole[:5000])
        return found

    monkeypatch.setattr(loading, "open_checkpoint", cut)
    if axes:
        mesh_of(**axes)
    with pytest.raises(ValueError, match=r"needed .*model\.safetensors as it was"):
        weights.load(folder)


def test_a_packed_tensor_that_was_replaced_is_read_anew(tmp_path):
    blocks = np.full((1, 2, 1, 16), 0x22, np.uint8)  # ones
    scales = np.full((1, 2, 1), 127, np.uint8)
    first = checkpoint(tmp_path, x_blocks=blocks, x_scales=scales)
    np.testing.assert_array_equal(first.read("x"), np.ones((1, 32, 2)))
    assert first.read("x") is first.read("x")  # two leaves, unpacked once
    second = checkpoint(tmp_path, x_blocks=blocks, x_scales=scales + np.uint8(1))
    np.testing.assert_array_equal(second.read("x"), np.full((1, 32, 2), 2))


def test_the_bar_counts_every_byte(capsys):
    with streaming.progress_bar(1000, True) as advance:
        advance(1000)
    assert "1.0/1.0 kB" in capsys.readouterr().err
    with streaming.progress_bar(1000, None) as advance:
        advance(1000)
    assert not capsys.readouterr().err
