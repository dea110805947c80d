# SPDX-License-Identifier: Apache-2.0
"""gpt-oss's packed experts, a value at a time from the format's definition."""

import ml_dtypes
import numpy as np
import pytest
from tiny_checkpoints import assert_same, tensors, write

from jaxcp import load, logits, save
from jaxcp.layers.quantized import widened
from jaxcp.weights import formats
from pallas_kernels import Quantized


def pack(rng, experts, out, groups):
    blocks = rng.integers(0, 256, (experts, out, groups, 16), dtype=np.uint8)
    return blocks, rng.integers(100, 140, (experts, out, groups), dtype=np.uint8)


def e2m1(bits):
    """One sign, two exponent, one mantissa bit; exponent bias 1, and subnormals."""
    sign, exponent, mantissa = bits >> 3, bits >> 1 & 3, bits & 1
    value = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -value if sign else value


def test_every_value():
    blocks, scales = pack(np.random.default_rng(0), 2, 3, 2)
    found = formats.gpt_oss_unpacked(blocks, scales)
    assert found.shape == (2, 64, 3) and found.dtype == ml_dtypes.bfloat16
    for e, i, o in np.ndindex(found.shape):
        byte = int(blocks[e, o, i // 32, i % 32 // 2])
        value = e2m1(byte >> 4 if i % 2 else byte & 15) * 2.0 ** (int(scales[e, o, i // 32]) - 127)
        assert float(found[e, i, o]) == value


def test_a_packed_checkpoint_is_the_unpacked_one(tmp_path):
    rng = np.random.default_rng(0)
    whole = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors("gpt-oss-tiny").items()}
    parts = dict(whole)
    for name in [k for k in whole if k.endswith(("gate_up_proj", "down_proj"))]:
        experts, size, out = parts.pop(name).shape
        blocks, scales = pack(rng, experts, out, size // 32)
        parts |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        whole[name] = formats.gpt_oss_unpacked(blocks, scales)
    packed = {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}
    folder = write(tmp_path / "packed", "gpt-oss-tiny", parts, **packed)
    model, _ = load(folder, widen=True)
    expected, _ = load(write(tmp_path / "whole", "gpt-oss-tiny", whole, dtype="bfloat16"))
    assert model.config == expected.config
    assert_same(model, expected)
    save(model, tmp_path / "out")  # in bfloat16, and says so
    assert_same(load(tmp_path / "out")[0], expected)
    tokens = rng.integers(0, 256, (1, 24)).astype(np.int32)
    four = load(folder, dtype="float32")[0]
    up = four.layers[0].mlp.up.get_value()
    assert isinstance(up, Quantized) and up.values.dtype == np.uint8
    assert np.array_equal(widened(up), expected.layers[0].mlp.up.get_value().astype("float32"))
    wanted = logits(load(tmp_path / "whole", dtype="float32")[0], tokens)
    np.testing.assert_allclose(logits(four, tokens), wanted, atol=1e-4 * np.abs(wanted).max())
    name = next(k for k in parts if k.endswith("_scales"))
    del parts[name]
    with pytest.raises(ValueError, match=rf"missing:\n    {name.removesuffix('_scales')} "):
        load(write(tmp_path / "half", "gpt-oss-tiny", parts, **packed))


def test_parts_that_do_not_belong_together():
    with pytest.raises(ValueError, match=r"got \(8, 64, 2, 16\) and \(8, 64, 3\)"):
        formats.gpt_oss_shape((8, 64, 2, 16), (8, 64, 3))
