# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints as they are published, made here in numpy from the formats' definitions,
against the weights that they stand for."""

import functools
import logging

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from slow import slow_but
from test_mxfp4 import e2m1
from tiny_checkpoints import FIXTURES, assert_same, flat, random_model, tensors, write

import jaxcp
from jaxcp.layers.quantized import is_quantized, quantized_names, widened
from jaxcp.weights.quantizing import quantize

E4M3, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
FP8 = {"quantization_config": {"quant_method": "fp8"}, "dtype": "float32"}
CLOSE = {"atol": 2e-4, "rtol": 0}


def per_tensor(w):
    """Hy3-FP8: one scale, and a static one for activations."""
    scale = np.float32(np.abs(w).max() / 448)
    values = (w / scale).astype(E4M3)
    return values, scale, values.astype(np.float32) * scale


def blocks(w, power_of_two=False):
    """DeepSeek: 128 x 128."""
    rows, columns = (-(-n // 128) for n in w.shape)
    values, exact = np.empty(w.shape, E4M3), np.empty(w.shape, np.float32)
    scales = np.empty((rows, columns), np.float32)
    for i, j in np.ndindex(rows, columns):
        at = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
        scale = np.float32(np.abs(w[at]).max() / 448)
        scales[i, j] = scale = np.exp2(np.ceil(np.log2(scale))) if power_of_two else scale
        values[at] = (w[at] / scale).astype(E4M3)
        exact[at] = values[at].astype(np.float32) * scale
    return values, scales, exact


def fours(w):
    """DeepSeek-V4's experts: E2M1, 32 to a power of two, the lower half of a byte first."""
    table = np.array([e2m1(code) for code in range(16)], np.float32)
    out, size = w.shape
    groups = w.reshape(out, size // 32, 32)
    scales = np.exp2(np.ceil(np.log2(np.abs(groups).max(-1) / 6))).astype(np.float32)
    codes = np.abs(groups[..., None] / scales[..., None, None] - table).argmin(-1)
    exact = (table[codes] * scales[..., None]).reshape(w.shape)
    codes = codes.reshape(out, size // 2, 2).astype(np.uint8)
    return (codes[..., 0] | codes[..., 1] << 4).view(np.int8), scales.astype(E8M0), exact


def is_linear(name):
    kept = "norm", "embed", "head", "gate.weight", "router", "hc_", "compressor.w", "weights_proj"
    return name.endswith(".weight") and not any(x in name for x in kept)


def in_hy3(whole):
    parts, exact = dict(whole), dict(whole)
    for name in filter(is_linear, whole):
        parts[name], scale, exact[name] = per_tensor(whole[name].astype(np.float32))
        parts[f"{name}_scale"] = np.asarray(scale)
        parts[name.removesuffix("weight") + "input_scale"] = np.asarray(np.float32(0.25))
    return parts, exact


def in_deepseek_v3(whole):
    parts, exact = dict(whole), dict(whole)
    for name in filter(is_linear, whole):
        parts[name], scales, exact[name] = blocks(whole[name].astype(np.float32))
        parts[f"{name}_scale_inv"] = scales
    return parts, exact


def in_deepseek_v4(whole):
    parts, exact = dict(whole), dict(whole)
    for name in filter(is_linear, whole):
        w, stem = whole[name].astype(np.float32), name.removesuffix(".weight")
        if ".experts." in name:
            parts[name], parts[f"{stem}.scale"], exact[name] = fours(w)
        else:
            parts[name], scales, exact[name] = blocks(w, power_of_two=True)
            parts[f"{stem}.scale"] = scales.astype(E8M0)
    return parts, exact


def wide_v3():
    """Widths over 128, and not multiples of it."""
    fields = {
        "hidden_size": 256, "intermediate_size": 256, "q_lora_rank": 136, "v_head_dim": 64,
        "moe_intermediate_size": 256, "num_hidden_layers": 2, "num_nextn_predict_layers": 0,
    }  # fmt: skip
    return fields


PUBLISHED_SO = {"m2": "minimax-m2-tiny", "mimo": "mimo-v2-flash-tiny"}
"""Others in DeepSeek-V3's format."""


@functools.cache
def pair(kind, folder):
    """Folders of a quantized checkpoint and of the one that it stands for."""
    folder.mkdir()
    if kind == "hy3":
        whole, name, pack, fields = tensors("hy3-tiny"), "hy3-tiny", in_hy3, {}
    elif kind == "v3":
        name, pack, fields = "deepseek-v3-tiny", in_deepseek_v3, wide_v3()
        shaped = write(folder / "shaped", name, {}, **fields)
        jaxcp.save(random_model(jaxcp.load_config(shaped)), folder / "random")
        whole = load_file(folder / "random" / "model.safetensors")
    elif kind in PUBLISHED_SO:
        name, pack, fields = PUBLISHED_SO[kind], in_deepseek_v3, {}
        whole = tensors(name)
    else:
        name, pack, fields = "deepseek-v4-tiny", in_deepseek_v4, {}
        whole = load_file(FIXTURES / name / "model_official_names.safetensors")
    parts, exact = pack(whole)
    return write(folder / "packed", name, parts, **fields, **FP8), write(
        folder / "exact", name, exact, **fields, dtype="float32"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("quantized")


def logits(model):
    tokens = np.random.default_rng(0).integers(0, 256, (1, 32)).astype(np.int32)
    return np.asarray(jaxcp.logits(model, tokens))


@functools.cache
def expected(kind, folder):
    return logits(jaxcp.load(pair(kind, folder)[1])[0])


WIDENED = {"v3": ("kv_up",), "v4": ("o_down",)}


@pytest.mark.parametrize(
    "kind", slow_but(["hy3", "v3", "v4", *PUBLISHED_SO], lambda kind: kind in ("hy3", "v3"))
)
def test_logits(kind, folder):
    model = jaxcp.load(pair(kind, folder / kind)[0])[0]
    np.testing.assert_allclose(logits(model), expected(kind, folder / kind), **CLOSE)


@pytest.mark.parametrize("kind", ["hy3", "v3", "v4", *PUBLISHED_SO])
def test_leaves_stay_quantized(kind, folder, caplog):
    """But for those that a log line names; and each is what numpy says, bit by bit."""
    packed, exact = pair(kind, folder / kind)
    with caplog.at_level(logging.INFO):
        found = flat(jaxcp.load(packed)[0])
    wanted = flat(jaxcp.load(exact)[0])
    assert found.keys() == wanted.keys()
    for name, leaf in found.items():
        np.testing.assert_array_equal(widened(leaf), wanted[name], err_msg=name)
    linear = (".q", ".k", ".v", ".o", "q_up", "q_down", "kv_down", "kv", "gate", "up", "down")
    plain = [n for n, x in found.items() if n.endswith(linear) and not is_quantized(x)]
    compressors = [n for n in plain if "compressor" in n]
    plain = [n for n in plain if n not in compressors]
    assert all(n.endswith(WIDENED.get(kind, ())) for n in plain), plain
    said = [x.getMessage() for x in caplog.records if "widened" in x.getMessage()]
    assert all(f" {name}," in f"{said[0]}," for name in plain) if plain else not said
    assert ("static scales are not used" in caplog.text) == (kind == "hy3")


def test_widened_on_demand(folder):
    packed, exact = pair("v3", folder / "v3")
    found = jaxcp.load(packed, widen=True)[0]
    assert_same(found, jaxcp.load(exact)[0])
    assert quantized_names(jaxcp.load(packed)[0]) and not quantized_names(found)


def test_over_a_mesh_every_device_reads_its_part(folder, mesh_of):
    packed, _ = pair("v3", folder / "v3")
    alone = flat(jaxcp.load(packed)[0])
    mesh_of(model=2, expert=2)
    found = jaxcp.load(packed)[0]
    up = found.layers[1].mlp.up.get_value()
    assert up.values.addressable_shards[0].data.shape == (4, 256, 128)
    assert up.values.addressable_shards[0].data.dtype == E4M3
    for name, leaf in flat(found).items():
        equal = jax.tree.map(np.array_equal, leaf, alone[name])
        assert all(jax.tree.leaves(equal)), name
    wanted = expected("v3", folder / "v3")
    np.testing.assert_allclose(logits(found), wanted, **CLOSE)


def in_groups(folder, weights):
    pair("v3", folder / "v3")
    path = folder / weights
    if not path.exists():
        quantize(folder / "v3/random", path, weights=weights)
    return path


def four_devices():
    return jax.set_mesh(jaxcp.make_mesh(model=2, expert=2, devices=jax.devices()[:4]))


@pytest.mark.parametrize("weights", ["mxfp8", "nvfp4", "int4"])
def test_groups_and_halves_over_a_mesh(weights, folder):
    """Of two devices each packs its own rows together."""
    path = in_groups(folder, weights)
    alone = flat(jaxcp.load(path)[0])
    with four_devices():
        found = jaxcp.load(path)[0]
        down = found.layers[1].mlp.down.get_value()
        assert down.values.addressable_shards[0].data.shape[1] == (64 if down.packed else 128)
        on_host = jax.tree.map(np.asarray, flat(found))
    for name, leaf in on_host.items():
        np.testing.assert_array_equal(widened(leaf), widened(alone[name]), err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["mxfp8", "nvfp4", "int4"])
def test_logits_of_groups_and_halves(weights, folder):
    path = in_groups(folder, weights)
    wanted = logits(jaxcp.load(path, widen=True)[0])
    np.testing.assert_allclose(logits(jaxcp.load(path)[0]), wanted, **CLOSE)
    with four_devices():
        np.testing.assert_allclose(logits(jaxcp.load(path)[0]), wanted, **CLOSE)


def test_a_scale_of_no_value(folder):
    """The exponent that E8M0 has for NaN, in a leaf whose scales are bytes on the device."""
    parts, _ = in_deepseek_v4(
        load_file(FIXTURES / "deepseek-v4-tiny" / "model_official_names.safetensors")
    )
    name = "layers.0.ffn.experts.3.w1.scale"
    parts[name].view(np.uint8)[1, 0] = 255
    path = write(folder / "nan", "deepseek-v4-tiny", parts, **FP8)
    with pytest.raises(ValueError, match=rf"{name} \(32, 2\): 1 of them"):
        jaxcp.load(path)


def test_a_mesh_that_cuts_through_a_block(folder, mesh_of):
    packed, _ = pair("v3", folder / "v3")
    mesh_of(model=4)
    with pytest.raises(ValueError, match=r"divides layers.*128 of 256.*model=4 .at most model=2"):
        jaxcp.load(packed)


def broken(folder, change):
    pair("v3", folder / "v3")
    parts, _ = in_deepseek_v3(load_file(folder / "v3/random/model.safetensors"))
    change(parts)
    place = folder / f"broken{len(list(folder.iterdir()))}"
    return write(place, "deepseek-v3-tiny", parts, **wide_v3(), **FP8)


NAME = "model.layers.1.mlp.experts.3.up_proj.weight"


def test_scales_that_are_missing_left_over_or_of_a_wrong_shape(folder):
    def change(parts):
        del parts[f"{NAME}_scale_inv"]
        parts["model.norm.weight_scale_inv"] = np.ones((1, 1), np.float32)
        name = NAME.replace("experts.3", "experts.5") + "_scale_inv"
        parts[name] = np.ones((3, 2), np.float32)

    with pytest.raises(ValueError, match="not whole") as error:
        jaxcp.load(broken(folder, change))
    text = str(error.value)
    assert f"{NAME}: F8_E4M3 (256, 256) without {NAME}_scale_inv, {NAME}_scale" in text
    assert "left over:" in text and "model.norm.weight_scale_inv (1, 1)" in text
    assert "experts.5.up_proj.weight_scale_inv F32 (3, 2): no known format" in text


def test_experts_that_are_not_alike(folder):
    def change(parts):
        parts[NAME] = parts[NAME].astype(np.float32)
        del parts[f"{NAME}_scale_inv"]

    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up to be quantized in one way"):
        jaxcp.load(broken(folder, change))


def test_nan_in_values_and_scales(folder):
    def change(parts):
        parts[NAME] = parts[NAME].copy()
        parts[NAME].view(np.uint8)[0, :3] = 0x7F
        scales = NAME.replace("up_proj", "down_proj") + "_scale_inv"
        parts[scales] = np.full_like(parts[scales], np.inf)

    path = broken(folder, change)
    with pytest.raises(ValueError, match="NaN or Inf") as error:
        jaxcp.load(path)
    assert f"{NAME} (256, 256): 3 of them" in str(error.value)
    assert "down_proj.weight_scale_inv (2, 2): 4 of them" in str(error.value)
    jaxcp.load(path, allow_nonfinite=True)
