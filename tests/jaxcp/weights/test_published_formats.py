# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the layouts that people publish of each family, against what they stand for."""

import functools
import itertools
import logging

import numpy as np
import pytest
from slow import slow_but
from tiny_checkpoints import flat, tensors, write
from written_formats import cache_scales, checkpoints, fp8_block, fp8_channel, fp8_tensor, nvfp4

import jaxcp
from jaxcp.layers.quantized import is_quantized, widened
from jaxcp.weights.files import open_checkpoint

BLOCKS = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
    "weight_block_size": [128, 128],
}  # fmt: skip
WIDE = {"hidden_size": 256, "head_dim": 64}
EXPERTS = {**WIDE, "moe_intermediate_size": 192}
DELTA = {
    **EXPERTS, "linear_key_head_dim": 32, "linear_value_head_dim": 64, "linear_num_key_heads": 4,
    "linear_num_value_heads": 8, "shared_expert_intermediate_size": 160, "num_experts": 4,
}  # fmt: skip
FAMILIES = {
    "qwen3-tiny": {**WIDE, "intermediate_size": 320},
    "qwen3-moe-tiny": {**EXPERTS, "num_local_experts": 4},
    "qwen3-next-tiny": DELTA,
    "qwen3-5-moe-tiny": DELTA,
    "minimax-m2-tiny": {**WIDE, "intermediate_size": 192, "num_local_experts": 4},
    "mimo-v2-flash-tiny": {**EXPERTS, "n_routed_experts": 4},
    "glm4-moe-tiny": {**EXPERTS, "n_routed_experts": 4},
}
"""Widths over 128, and not multiples of it."""


def assert_exact(packed, exact, *, plain=()):
    """Every leaf, bit by bit; all of linear layers stay quantized but those in `plain`."""
    wanted = flat(jaxcp.load(exact)[0])
    found = flat(jaxcp.load(packed)[0])
    assert found.keys() == wanted.keys()
    for name, leaf in found.items():
        np.testing.assert_array_equal(widened(leaf), wanted[name], err_msg=name)
    linear = (".q", ".k", ".v", ".o", ".key", ".value", ".query", ".z", ".out", ".up", ".down")
    wide = {x.split(".")[-1] for x in found if x.endswith(linear) and not is_quantized(found[x])}
    assert wide == set(plain)
    for name, leaf in flat(jaxcp.load(packed, widen=True)[0]).items():
        np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)


JOINED = {"query", "key", "value", "z", "q"}
"""Qwen3-Next's parts take turns in a tensor, so that no slice of one is theirs."""


@pytest.mark.parametrize(
    "name", slow_but(FAMILIES, lambda name: name in ("qwen3-tiny", "qwen3-5-moe-tiny"))
)
def test_blocks_of_fp8(name, tmp_path):
    made = checkpoints(tmp_path / name, name, lambda _: fp8_block, BLOCKS, **FAMILIES[name])
    assert_exact(*made, plain={"qwen3-next-tiny": JOINED, "qwen3-5-moe-tiny": {"q"}}.get(name, ()))


@pytest.mark.parametrize(
    ("key_dim", "hidden", "plain"),
    [(48, 256, {"q"}), pytest.param(48, 192, {"q", "key", "query"}, marks=pytest.mark.slow)],
)
def test_a_part_of_a_tensor_that_begins_inside_a_block(key_dim, hidden, plain, tmp_path):
    """Queries end at row 192 of `in_proj_qkv`: a scale a column then, or widened."""
    fields = DELTA | {"linear_key_head_dim": key_dim, "hidden_size": hidden}
    name = "qwen3-5-moe-tiny"
    made = checkpoints(tmp_path / "made", name, lambda _: fp8_block, BLOCKS, **fields)
    assert_exact(*made, plain=plain)


@pytest.mark.parametrize("width", [192, 256])
def test_experts_of_blocks_in_one_tensor(width, tmp_path):
    """Gates above ups, all experts, as transformers has them in memory; ups begin at `width`."""
    fields = EXPERTS | {"num_local_experts": 4, "moe_intermediate_size": width}
    made = checkpoints(tmp_path / "one", "qwen3-moe-tiny", lambda _: None, None, **fields)
    whole = tensors(made[1])
    parts, exact = dict(whole), dict(whole)
    for layer in range(3):
        at = f"model.layers.{layer}.mlp.experts"
        joined = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
        for name, kinds in joined.items():
            each = [
                fp8_block(np.concatenate([whole[f"{at}.{e}.{kind}.weight"] for kind in kinds]))
                for e in range(4)
            ]
            parts[f"{at}.{name}"] = np.stack([one["weight"] for one, _ in each])
            scales = np.stack([one["weight_scale_inv"] for one, _ in each])
            parts[f"{at}.{name}_scale_inv"] = scales
            exact[f"{at}.{name}"] = np.stack([x for _, x in each])
            for e, kind in itertools.product(range(4), kinds):
                del parts[f"{at}.{e}.{kind}.weight"], exact[f"{at}.{e}.{kind}.weight"]
    says = {"quantization_config": BLOCKS, "dtype": "float32"}
    packed = write(tmp_path / "packed", "qwen3-moe-tiny", parts, **fields, **says)
    plain = write(tmp_path / "exact", "qwen3-moe-tiny", exact, **fields, dtype="float32")
    assert_exact(packed, plain, plain={"q", "k", "v", "o"})


def modelopt(algorithm, group=None, bits=4):
    side = {"dynamic": False, "num_bits": bits, "type": "float"}
    side |= {"group_size": group} if group else {}
    return {
        "config_groups": {"group_0": {
            "input_activations": side, "weights": side, "targets": ["Linear"]}},
        "ignore": ["lm_head"], "quant_algo": algorithm, "quant_method": "modelopt",
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": {"name": "modelopt", "version": "0.41.0"},
    }  # fmt: skip


def experts_alone(pack, name):
    return pack if ".experts." in name else None


NVFP4 = [
    ("minimax-m2-tiny", functools.partial(experts_alone, nvfp4), None),
    ("qwen3-moe-tiny", lambda name: nvfp4, None),
    ("qwen3-5-moe-tiny", lambda name: nvfp4, "model.language_model."),
]


@pytest.mark.parametrize(
    ("name", "pack", "prefix"), slow_but(NVFP4, lambda case: case[0].startswith("minimax"))
)
def test_nvfp4_of_modelopt(name, pack, prefix, tmp_path, caplog):
    rename = (lambda x: x.replace("model.", prefix, 1)) if prefix else None
    fields = DELTA if name == "qwen3-5-moe-tiny" else {}
    says = modelopt("NVFP4", 16)
    packed, exact = checkpoints(
        tmp_path / "made", name, pack, says, rename=rename, more=cache_scales, **fields
    )
    plain = {"minimax-m2-tiny": {"q", "k", "v", "o"}, "qwen3-5-moe-tiny": {"q"}}
    with caplog.at_level(logging.INFO):
        assert_exact(packed, exact, plain=plain.get(name, ()))
    assert "static scales are not used" in caplog.text


@pytest.mark.slow
def test_fp8_and_nvfp4_in_one_checkpoint_and_a_quantized_head(tmp_path, caplog):
    """As Qwen3.6-35B-A3B-NVFP4: attention of both kinds in FP8, experts and head in NVFP4."""

    def pack(name):
        return fp8_tensor if "attn" in name else nvfp4

    says = modelopt("MIXED_PRECISION")
    packed, exact = checkpoints(tmp_path / "made", "qwen3-5-moe-tiny", pack, says, **DELTA)
    assert_exact(packed, exact, plain={"q"})
    assert any("lm_head" in x.getMessage() or "head" in x.getMessage() for x in caplog.records)


@pytest.mark.parametrize(
    ("name", "pack", "says"),
    [
        ("qwen3-tiny", fp8_tensor, modelopt("FP8", bits=8)),
        ("qwen3-tiny", fp8_tensor, {"quant_algo": "FP8", "kv_cache_scheme": "FP8"}),
        ("glm4-moe-tiny", fp8_channel,
         {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    ],
)  # fmt: skip
def test_fp8_with_a_scale_a_tensor_or_an_output(name, pack, says, tmp_path):
    scales = functools.partial(cache_scales, names=("k_scale", "v_scale"))
    made = checkpoints(tmp_path / "made", name, lambda _: pack, says, more=scales)
    assert_exact(*made)


CONTRADICTIONS = [
    (nvfp4, BLOCKS, "says fp8, which is fp8 or .*and the tensors are nvfp4"),
    (fp8_tensor, modelopt("NVFP4", 16), "says modelopt NVFP4, .*the tensors are fp8"),
    (fp8_tensor, {"quant_method": "mxfp4"}, "says mxfp4, .*the tensors are fp8"),
    (None, BLOCKS, "the tensors are not quantized.*take quantization_config out"),
    (fp8_tensor, {"quant_method": "jaxcp", "weights": "int8"}, "says jaxcp int8"),
    (fp8_channel, {"quant_method": "compressed-tensors", "format": "pack-quantized"},
     "says compressed-tensors pack-quantized, which is int4 or int8, .* are fp8"),
]  # fmt: skip


@pytest.mark.parametrize(("pack", "says", "text"), CONTRADICTIONS)
def test_a_config_that_the_tensors_contradict(pack, says, text, tmp_path):
    packed, _ = checkpoints(tmp_path / "made", "qwen3-tiny", lambda _: pack, says)
    with pytest.raises(ValueError, match=text):
        jaxcp.load(packed)


@pytest.mark.parametrize(
    ("says", "text"),
    [
        (BLOCKS | {"weight_block_size": [64, 64]}, r"fp8 in blocks of \[64, 64\].*jaxcp quantize"),
        (modelopt("W4A16_AWQ"), "quant_algo 'W4A16_AWQ'; read are FP8"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "format 'marlin-24'"),
        ({"quant_method": "compressed-tensors", "transform_config": {"R1": {}}}, "transform"),
    ],
)
def test_a_variant_that_is_not_read(says, text, tmp_path):
    packed, _ = checkpoints(tmp_path / "made", "qwen3-tiny", lambda _: fp8_tensor, says)
    with pytest.raises(NotImplementedError, match=text):
        jaxcp.load(packed)


def test_a_weight_that_is_there_twice(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    packed, _ = checkpoints(
        tmp_path / "made", "qwen3-tiny", lambda _: nvfp4, None,
        more=lambda parts: {f"{name}_packed": parts[name]},
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"{name}_packed: .* beside {name}"):
        jaxcp.load(packed)


UP = "model.layers.0.mlp.up_proj"
HALVES = np.zeros((64, 32), np.uint8)
SHARED = {
    "a scale that has a scale": {f"{UP}.weight_scale_scale": np.zeros((64, 1), np.uint8)},
    "a scale of two weights": {
        f"{UP}.weight": HALVES, UP: HALVES, f"{UP}.scale": np.zeros((64, 2), np.uint8)},
    "blocks beside the weight": {
        f"{UP}.weight_blocks": np.zeros((2, 64, 2, 16), np.uint8),
        f"{UP}.weight_scales": np.zeros((2, 64, 2), np.uint8)},
}  # fmt: skip


@pytest.mark.parametrize("what", SHARED)
def test_a_tensor_that_is_part_of_two_weights(what, tmp_path):
    """Or two that are one weight: of neither is it known which is meant."""
    plain = {
        f"{UP}.weight": np.zeros((64, 256), np.uint8),
        f"{UP}.weight_scale": np.zeros((64, 16), np.uint8),
    }
    if what == "a scale of two weights":
        plain = {}
    write(tmp_path, "qwen3-tiny", plain | SHARED[what])
    with pytest.raises(ValueError, match=r"needed each .*model\.safetensors .*Copy the checkpoint"):
        open_checkpoint(tmp_path)
