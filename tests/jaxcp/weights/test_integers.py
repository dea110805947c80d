# SPDX-License-Identifier: Apache-2.0
"""Integers in int32: compressed-tensors, GPTQ and AWQ.

`fixtures/number_formats` has small weights that compressed-tensors 0.20.1 (`BaseCompressor`, each
format's `compress`), AutoGPTQ 0.7.1 (`QuantLinear.pack`) and AutoAWQ 0.2.9 (its packing order)
packed, and as `exact` what those programs widen them to: `decompress`, `QuantLinear` of an identity
matrix with float32 scales, `dequantize_gemm`.
"""

import functools
import logging

import jax
import numpy as np
import pytest
from slow import slow_but
from test_published_formats import EXPERTS, assert_exact
from tiny_checkpoints import FIXTURES, flat, tensors, write
from written_formats import (
    awq,
    checkpoints,
    fp8_block,
    fp8_channel,
    gptq,
    mxfp4_packed,
    nvfp4_packed,
    pack_quantized,
    words,
)

import jaxcp
from jaxcp.inference.sampling import Sampling
from jaxcp.layers.quantized import is_quantized, widened
from jaxcp.weights.files import open_checkpoint

PEERS = FIXTURES / "number_formats"
OURS = {
    "fp8_tensor": "fp8", "fp8_channel": "fp8", "fp8_block": "fp8_block", "int8_channel": "int8",
    "int8_zero": "int8", "int4_group": "int4", "int4_zero": "int4", "int4_channel": "int4",
    "int8_group": "int8", "int8_packed_zero": "int8", "nvfp4": "nvfp4", "mxfp4": "mxfp4",
    "mxfp8": "mxfp8", "gptq4_sym": "int4", "gptq4_zero": "int4", "gptq4_order": "int4",
    "gptq8_sym": "int8", "gptq8_zero": "int8", "awq": "int4",
}  # fmt: skip


@pytest.fixture(scope="module", params=["compressed_tensors", "gptq_awq"])
def of_peer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    contents = (PEERS / f"{request.param}.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(contents)
    return open_checkpoint(folder)


def test_what_other_programs_packed_is_what_they_widen_it_to(of_peer):
    """Bit by bit, in their dtype."""
    names = [name.removesuffix(".weight") for name in of_peer.packed]
    assert len(names) == sum(name.endswith(".exact") for name in of_peer.shapes) > 5
    assert not of_peer.lacking
    for name in names:
        assert of_peer.packed[f"{name}.weight"].format == OURS[name]
        wanted = of_peer.raw(f"{name}.exact")
        found = of_peer.read(f"{name}.weight").astype(wanted.dtype)
        np.testing.assert_array_equal(found, wanted, err_msg=name)


def says(method, **fields):
    return {"quantization_config": {"quant_method": method, **fields}}["quantization_config"]


COMPRESSED = says("compressed-tensors", format="pack-quantized")
ORDER = np.random.default_rng(0).permutation(256)


def ordered(pack):
    return lambda w: pack(w, order=ORDER[ORDER < w.shape[1]])


KINDS = {
    "compressed-tensors": (pack_quantized, COMPRESSED, np.int8, True),
    "compressed-tensors, asymmetric": (
        functools.partial(pack_quantized, symmetric=False), COMPRESSED, np.int8, True),
    "compressed-tensors in another order": (ordered(pack_quantized), COMPRESSED, None, False),
    "gptq": (gptq, says("gptq", bits=4, group_size=32, desc_act=False), np.int8, True),
    "gptq_v2": (functools.partial(gptq, less=0),
                says("gptq", checkpoint_format="gptq_v2"), np.int8, True),
    "gptq, asymmetric": (functools.partial(gptq, symmetric=False), says("gptq"), np.int8, True),
    "gptq in another order": (ordered(gptq), says("gptq", desc_act=True), None, False),
    "awq": (awq, says("awq", version="gemm", zero_point=True), np.int8, True),
}  # fmt: skip


@pytest.mark.parametrize("kind", slow_but(KINDS, lambda kind: kind in ("gptq", "awq")))
@pytest.mark.parametrize("name", slow_but(["qwen3-moe-tiny", "qwen3-tiny"], lambda n: "moe" in n))
def test_a_checkpoint_in_integers(name, kind, tmp_path, caplog):
    """It stays in 4 bits, with zero points or none; one in another order is widened, by name."""
    pack, quantization, dtype, halves = KINDS[kind]
    packed, exact = checkpoints(tmp_path / "made", name, lambda _: pack, quantization)
    with caplog.at_level(logging.WARNING):
        leaves = flat(jaxcp.load(packed)[0])
    up = next(x for n, x in leaves.items() if n.endswith("mlp.up"))
    assert is_quantized(up) == (dtype is not None)
    if dtype is None:
        assert "widened when read" in caplog.text and "mlp.up" in caplog.text
        one_group = {"down"} if "moe" in name else set()  # which is in order
        assert_exact(packed, exact, plain={"q", "k", "v", "o", "up", "down"} - one_group)
        return
    matrix = getattr(up, "matrix", up)
    assert matrix.values.dtype == dtype and bool(matrix.packed) == halves
    assert (matrix.zeros is not None) == ("asymmetric" in kind or kind == "awq")
    assert_exact(packed, exact)


def logits(model):
    tokens = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)
    return np.asarray(jaxcp.logits(model, tokens))


MESHES = [{"model": 2}, {"expert": 2}, {"model": 2, "expert": 2}]


@pytest.mark.parametrize("sizes", slow_but(MESHES, lambda sizes: len(sizes) == 2))
@pytest.mark.parametrize("kind", slow_but(["compressed-tensors", "awq"], lambda x: x != "awq"))
def test_over_a_mesh(kind, sizes, tmp_path, mesh_of):
    pack, quantization, *_ = KINDS[kind]
    fields = EXPERTS | {"num_local_experts": 4}
    made = checkpoints(tmp_path / "m", "qwen3-moe-tiny", lambda _: pack, quantization, **fields)
    alone, wanted = flat(jaxcp.load(made[0])[0]), logits(jaxcp.load(made[1])[0])
    np.testing.assert_allclose(logits(jaxcp.load(made[0])[0]), wanted, atol=2e-4)
    mesh_of(**sizes)
    model = jaxcp.load(made[0])[0]
    for name, leaf in flat(model).items():
        on_host = jax.tree.map(np.asarray, leaf)
        np.testing.assert_array_equal(widened(on_host), widened(alone[name]), err_msg=name)
    np.testing.assert_allclose(logits(model), wanted, atol=2e-4)


def test_a_mesh_that_cuts_through_a_group(tmp_path, mesh_of):
    pack = functools.partial(pack_quantized, group=128)
    fields = EXPERTS | {"num_local_experts": 4, "moe_intermediate_size": 256,
              "num_key_value_heads": 4}  # fmt: skip
    made = checkpoints(tmp_path / "m", "qwen3-moe-tiny", lambda _: pack, COMPRESSED, **fields)
    mesh_of(model=4)
    with pytest.raises(ValueError, match=r"128 of 256.*model=4 .at most model=2"):
        jaxcp.load(made[0])


FLOATS = {"nvfp4": nvfp4_packed, "mxfp4": mxfp4_packed}


@pytest.mark.parametrize("kind", FLOATS)
def test_floats_of_4_bits_of_compressed_tensors(kind, tmp_path):
    """Widened exactly; in memory NVFP4's factor is 1 / `weight_global_scale` in float32, which
    divides in the file: the last two bits may differ."""
    quantization = says("compressed-tensors", format=f"{kind}-pack-quantized")
    made = checkpoints(tmp_path / "made", "qwen3-moe-tiny", lambda _: FLOATS[kind], quantization)
    packed, wanted = flat(jaxcp.load(made[0])[0]), flat(jaxcp.load(made[1])[0])
    wide = flat(jaxcp.load(made[0], widen=True)[0])
    for name, leaf in wanted.items():
        np.testing.assert_array_equal(wide[name], leaf, err_msg=name)
        np.testing.assert_allclose(widened(packed[name]), leaf, rtol=2**-22, err_msg=name)
        is_linear = name.endswith((".q", ".k", ".v", ".o", ".gate", ".up", ".down"))
        assert is_quantized(packed[name]) == is_linear


@pytest.mark.slow
def test_experts_of_kimi_k2(tmp_path):
    """Routed experts are in int4, all else in bfloat16, as in Kimi-K2-Thinking and K2.5."""

    def pack(name):
        return pack_quantized if ".mlp.experts." in name else None

    name, fields = "deepseek-v3-tiny", {"model_type": "kimi_k2"}
    packed, exact = checkpoints(tmp_path / "made", name, pack, COMPRESSED, **fields)
    model = jaxcp.load(packed)[0]
    for name, leaf in flat(jaxcp.load(exact)[0]).items():
        np.testing.assert_array_equal(widened(flat(model)[name]), leaf, err_msg=name)
    experts = [x for n, x in flat(model).items() if is_quantized(x)]
    assert experts and all(x.packed and x.values.dtype == np.int8 for x in experts)
    np.testing.assert_allclose(logits(model), logits(jaxcp.load(exact)[0]), atol=2e-4)


@pytest.mark.parametrize("kind", slow_but(["compressed-tensors", "awq"], lambda x: x != "awq"))
def test_rows_that_are_decoded_together(kind, tmp_path):
    """Prompts of several lengths, token by token: the answers of the weights they stand for."""
    pack, quantization, *_ = KINDS[kind]
    packed, exact = checkpoints(tmp_path / "m", "qwen3-moe-tiny", lambda _: pack, quantization)
    prompts = [[5, 9, 200, 31, 7], [1, 2, 3], [77]]
    options = Sampling(max_new_tokens=6)
    found, wanted = (
        jaxcp.Engine(jaxcp.load(path)[0], None, max_len=128, max_rows=3, stop_tokens=()).generate(
            prompts, options
        )
        for path in (packed, exact)
    )
    assert [x.tokens for x in found] == [x.tokens for x in wanted]


def test_blocks_and_channels_of_compressed_tensors(tmp_path):
    """FP8 with scales in bfloat16, as llm-compressor writes them."""
    quantization = says("compressed-tensors", format="float-quantized")

    def pack(name):
        block = functools.partial(fp8_block, name="weight_scale")
        return block if "mlp" in name else fp8_channel

    assert_exact(*checkpoints(tmp_path / "made", "qwen3-tiny", pack, quantization))


BROKEN = {
    "no shape": (lambda parts, x: parts.pop(f"{x}_shape"), "needs .*weight_shape"),
    "a shape of floats": (
        lambda parts, x: parts.update({f"{x}_shape": np.array([np.nan, 64])}), "of two integers"),
    "a shape that lies": (
        lambda parts, x: parts.update({f"{x}_shape": np.array([64, 99])}), r"\(64, 99\).*no known"),
    "scales of a wrong length": (
        lambda parts, x: parts.update({f"{x}_scale": np.ones(5, np.float32)}),
        r"weight_scale \(5,\): no known"),
    "scales with an axis more": (
        lambda parts, x: parts.update({f"{x}_scale": np.ones((8, 8, 1), np.float32)}),
        r"weight_scale \(8, 8, 1\): no known"),
    "zero points of a wrong shape": (
        lambda parts, x: parts.update({f"{x}_zero_point": np.ones((3, 2), np.int32)}),
        r"weight_zero_point \(3, 2\)"),
    "an order of a wrong length": (
        lambda parts, x: parts.update({f"{x}_g_idx": np.zeros(7, np.int32)}), r"g_idx \(7,\)"),
    "an order of groups that are not": (
        lambda parts, x: parts.update({f"{x}_g_idx": np.full(64, -1, np.int32)}),
        "it has -1 to -1"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_tensor_that_is_not_whole(what, tmp_path):
    change, text = BROKEN[what]

    def broken(parts):
        change(parts, "model.layers.1.self_attn.q_proj.weight")
        return {}

    packed, _ = checkpoints(
        tmp_path / "made", "qwen3-tiny", lambda _: pack_quantized, COMPRESSED, more=broken
    )
    with pytest.raises(ValueError, match=text):
        jaxcp.load(packed)


@pytest.mark.parametrize(
    ("pack", "quantization", "error", "text"),
    [
        (gptq, None, ValueError, "needs a quantization_config of quant_method gptq"),
        (gptq, says("gptq", checkpoint_format="marlin"), NotImplementedError, "'marlin'; read are"),
        (awq, says("awq", version="gemv"), NotImplementedError, "awq of version gemv.*jaxcp quant"),
    ],
)
def test_a_variant_of_gptq_or_awq_that_is_not_read(pack, quantization, error, text, tmp_path):
    packed, _ = checkpoints(tmp_path / "made", "qwen3-tiny", lambda _: pack, quantization)
    with pytest.raises(error, match=text):
        jaxcp.load(packed)


def of_groups(size, **fields):
    group = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": size, **fields}
    return COMPRESSED | {"config_groups": {"group_0": {"weights": group, "targets": ["Linear"]}}}


GROUPED = {
    "compressed-tensors": (pack_quantized, of_groups(32), of_groups(64)),
    "gptq": (gptq, says("gptq", group_size=32), says("gptq", group_size=-1)),
    "gptq in another order": (
        ordered(gptq), says("gptq", group_size=32, desc_act=True), says("gptq", group_size=16)),
    "awq": (awq, says("awq", group_size=32), says("awq", group_size=64)),
    "one of two": (
        pack_quantized, COMPRESSED | {"config_groups": {
            "a": {"weights": {"strategy": "channel", "group_size": None}},
            "b": {"weights": {"strategy": "group", "group_size": 32}}}},
        of_groups(None, strategy="channel")),
}  # fmt: skip


@pytest.mark.parametrize("kind", GROUPED)
def test_groups_of_another_size_than_config_json_says(kind, tmp_path):
    """Scales cut short would be those of groups as long again."""
    pack, right, wrong = GROUPED[kind]
    made = checkpoints(tmp_path / "right", "qwen3-tiny", lambda _: pack, right)
    jaxcp.load(made[0])
    packed, _ = checkpoints(tmp_path / "wrong", "qwen3-tiny", lambda _: pack, wrong)
    with pytest.raises(ValueError, match=r"scales? in .* scales for .* a group_size of"):
        jaxcp.load(packed)


def test_scales_of_several_dtypes_are_not_rounded_to_one(tmp_path):
    name = "model.layers.0.mlp.experts.3.up_proj.weight_scale"

    def more(parts):
        return {name: parts[name].astype(np.float32)}

    packed, _ = checkpoints(
        tmp_path / "made", "qwen3-moe-tiny", lambda _: pack_quantized, COMPRESSED, more=more
    )
    with pytest.raises(ValueError, match=r"in bfloat16, int4 .* in float32"):
        jaxcp.load(packed)


def test_gpt2_has_its_weights_the_other_way_round(tmp_path):
    """A square one would be turned without a word."""
    whole = tensors("gpt2-tiny")
    name = next(x for x in whole if x.endswith("attn.c_proj.weight"))
    made, _ = pack_quantized(whole.pop(name))
    parts = {f"{name.removesuffix('weight')}{k}": np.asarray(v) for k, v in made.items()}
    path = write(tmp_path / "q", "gpt2-tiny", whole | parts, quantization_config=COMPRESSED)
    for widen in (False, True):
        with pytest.raises(NotImplementedError, match=r"not read where weights are \[in, out\]"):
            jaxcp.load(path, widen=widen)


def test_words_hold_the_first_value_in_the_lowest_bits():
    assert words(np.arange(8, dtype=np.uint32)[None])[0, 0] == 0x76543210
