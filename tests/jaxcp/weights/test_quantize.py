# SPDX-License-Identifier: Apache-2.0
"""`jaxcp quantize`: what it writes is within the format's rounding of what was there, and loads."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_mxfp4 import e2m1
from tiny_checkpoints import FIXTURES, flat, tensors, write

import jaxcp
from jaxcp.layers.quantized import is_quantized, quantized_names, widened
from jaxcp.weights.files import open_checkpoint
from jaxcp.weights.quantizing import quantize

HY3 = FIXTURES / "hy3-tiny"
Q = "model.layers.1.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"
WEIGHTS = ["int8", "fp8", "mxfp8", "nvfp4", "int4"]


def stored(path):
    checkpoint = open_checkpoint(path)
    return {name: np.array(at.view()) for name, at in checkpoint.stored.items()}


def exact(parts, name, weights):
    """The weights that the parts stand for, float64, from the formats' definitions."""
    values, scales = parts[name], parts[f"{name}_scale"]
    if weights == "nvfp4":
        codes = np.stack([values & 15, values >> 4], -1).reshape(len(values), -1)
        values = np.vectorize(e2m1)(codes.astype(int))
        scales = scales.astype(np.float64) * parts[f"{name}_scale_2"].astype(np.float64)
    if weights == "int4":
        codes = np.stack([values & 15, values >> 4], -1).reshape(len(values), -1).astype(int)
        values = codes - 16 * (codes > 7)
    values, scales = values.astype(np.float64), scales.astype(np.float64)
    return values * scales.repeat(values.shape[1] // scales.shape[1], axis=1)


def bound(w, weights):
    """Of the error: half a step of int8 and int4; 2^-4 of fp8's value, or half its least step;
    nvfp4's widest gap, from 4 to 6, and what rounding the scale may add."""
    w = np.abs(w.astype(np.float64))
    int4 = next(n for n in (128, 64, 32) if w.shape[1] % n == 0)
    group = {"mxfp8": 32, "nvfp4": 16, "int4": int4}.get(weights, w.shape[1])
    greatest = w.reshape(len(w), -1, group).max(-1).repeat(group, axis=1)
    if weights in ("int8", "int4"):
        return greatest / (127 if weights == "int8" else 7) / 2 * 1.0001
    if weights == "nvfp4":
        return greatest / 6 * (1 + 2**-4) + greatest * 2**-4
    return np.maximum(w * 2**-4, greatest / 224 * 2**-9) * 1.0001


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_weight_is_within_the_rounding(weights, tmp_path):
    found = quantize(HY3, tmp_path / "out", weights=weights)
    before, parts = tensors("hy3-tiny"), stored(tmp_path / "out")
    assert len(found.quantized) == 4 * 4 + 3 + 3 * (3 + 8 * 3) and not found.skipped
    for name in found.quantized:
        error = np.abs(exact(parts, name, weights) - before[name])
        assert (error <= bound(before[name], weights) + 1e-30).all(), name
    for name in before.keys() - set(found.quantized):
        assert np.array_equal(parts[name], before[name]), name
    assert found.bytes_after == sum(x.nbytes for x in parts.values())
    assert found.bytes_before == sum(x.nbytes for x in before.values())


@pytest.mark.parametrize("weights", WEIGHTS)
def test_it_loads_as_what_was_written(weights, tmp_path):
    quantize(HY3, tmp_path / "out", weights=weights)
    parts = stored(tmp_path / "out")
    layer = jaxcp.load(tmp_path / "out")[0].layers[1]
    q, down = layer.attention.q.get_value(), layer.mlp.down.get_value()
    assert is_quantized(q) and is_quantized(down)
    wanted = exact(parts, Q, weights).T.reshape(q.shape)
    np.testing.assert_allclose(widened(q), wanted, rtol=1e-6)
    wanted = exact(parts, DOWN, weights).T
    np.testing.assert_allclose(widened(down)[3], wanted, rtol=1e-6)
    fields = json.loads((tmp_path / "out/config.json").read_text())
    how = {"quant_method": "jaxcp", "weights": weights, "only": "all"}
    assert fields["quantization_config"] == how


def test_experts_only_of_a_checkpoint_in_several_files(tmp_path):
    model, _ = jaxcp.load(HY3)
    jaxcp.save(model, tmp_path / "in", shard_bytes=200_000)
    found = quantize(tmp_path / "in", tmp_path / "out", weights="int8", only="experts")
    assert len(found.quantized) == 3 * 8 * 3 and all(".experts." in x for x in found.quantized)
    names = sorted(file.name for file in (tmp_path / "in").iterdir())
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names and len(names) > 3
    loaded = jaxcp.load(tmp_path / "out")[0]
    assert all(name.split(".")[-1] in ("gate", "up", "down") for name in quantized_names(loaded))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == found.bytes_after
    for name, file in index["weight_map"].items():
        assert name in open_checkpoint(tmp_path / "out").stored, file


@pytest.mark.parametrize("weights", WEIGHTS)
def test_experts_in_one_tensor(weights, tmp_path):
    """As transformers has them in memory: gate above up, all experts."""
    whole = tensors("hy3-tiny")
    for i in (1, 2, 3):
        at = f"model.layers.{i}.mlp.experts"
        gate, up, down = (
            np.stack([whole.pop(f"{at}.{e}.{kind}_proj.weight") for e in range(8)])
            for kind in ("gate", "up", "down")
        )
        whole[f"{at}.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        whole[f"{at}.down_proj"] = down
    source = write(tmp_path / "in", "hy3-tiny", whole)
    found = quantize(source, tmp_path / "out", weights=weights, only="experts")
    assert len(found.quantized) == 6 and not found.skipped
    before, after = jaxcp.load(source)[0], jaxcp.load(tmp_path / "out")[0]
    for kind in ("gate", "up", "down"):
        leaf = getattr(after.layers[2].mlp, kind).get_value()
        rows = np.asarray(getattr(before.layers[2].mlp, kind).get_value()).swapaxes(1, 2)
        error = np.abs(np.asarray(widened(leaf)).swapaxes(1, 2) - rows)
        for e in range(8):
            assert (error[e] <= bound(rows[e], weights) + 1e-30).all(), (kind, e)
        assert is_quantized(leaf)


def test_an_aligned_file_that_safetensors_reads(tmp_path):
    quantize(HY3, tmp_path / "out", weights="int8")
    found, parts = load_file(tmp_path / "out/model.safetensors"), stored(tmp_path / "out")
    assert found.keys() == parts.keys()
    assert all(np.array_equal(found[name], parts[name]) for name in parts)
    for at in open_checkpoint(tmp_path / "out").stored.values():
        assert at.start % at.view().dtype.itemsize == 0


def test_gpt2_whose_tensors_are_transposed_and_joined(tmp_path):
    found = quantize(FIXTURES / "gpt2-tiny", tmp_path / "out", weights="int8")
    assert any("c_attn" in name for name in found.quantized)
    before = flat(jaxcp.load(FIXTURES / "gpt2-tiny")[0])
    for name, leaf in flat(jaxcp.load(tmp_path / "out")[0]).items():
        step = np.abs(before[name]).max() / 127
        np.testing.assert_allclose(widened(leaf), before[name], atol=step)
        assert is_quantized(leaf) == name.endswith((".q", ".k", ".v", ".o", ".up", ".down"))
    skipped = quantize(FIXTURES / "gpt2-tiny", tmp_path / "four", weights="nvfp4").skipped
    assert any("c_attn" in name for name in skipped), "halves of a byte lie along the outputs"


def test_what_cannot_be(tmp_path):
    whole = tensors("hy3-tiny")
    whole[DOWN] = whole[DOWN].copy()
    whole[DOWN][0, 0] = np.nan
    source = write(tmp_path / "in", "hy3-tiny", whole)
    with pytest.raises(ValueError, match=f"{DOWN} has NaN"):
        quantize(source, tmp_path / "out", weights="fp8")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    with pytest.raises(ValueError, match="empty folder"):
        quantize(HY3, source, weights="fp8")
    quantize(HY3, tmp_path / "once", weights="fp8")
    with pytest.raises(ValueError, match="quantized already, such as"):
        quantize(tmp_path / "once", tmp_path / "twice", weights="int8")


def test_bfloat16_is_read_and_kept(tmp_path):
    whole = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors("hy3-tiny").items()}
    source = write(tmp_path / "in", "hy3-tiny", whole, dtype="bfloat16")
    quantize(source, tmp_path / "out", weights="mxfp8", only="experts")
    parts = stored(tmp_path / "out")
    assert parts[Q].dtype == ml_dtypes.bfloat16 and np.array_equal(parts[Q], whole[Q])
    assert parts[f"{DOWN}_scale"].dtype == ml_dtypes.float8_e8m0fnu
