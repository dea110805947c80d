# SPDX-License-Identifier: Apache-2.0
"""What jaxcp saves is what transformers loads: the same names, and the same logits.

Needs the extra `hf`: transformers and a torch that runs on the CPU.
"""

import dataclasses

import numpy as np
import pytest
from tiny_checkpoints import FIXTURES, random_model

import jaxcp
from jaxcp.layers.rope import Rope
from jaxcp.weights import formats

transformers = pytest.importorskip("transformers", reason="needs pip install jaxcp[hf]")
torch = pytest.importorskip("torch", reason="needs pip install jaxcp[hf]")
pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to mend


def config_of(name):
    return jaxcp.load_config(FIXTURES / name)


def changed(name, **fields):
    """A fixture's config with other values in `attention`, `experts` or itself."""
    config = config_of(name)
    for part in ("attention", "experts"):
        if part in fields:
            fields[part] = dataclasses.replace(getattr(config, part), **fields[part])
    return dataclasses.replace(config, **fields)


def variants():
    """The fixtures' configs, and some with every switch of the format set the other way."""
    hy3, qwen, oss = (f"{name}-tiny" for name in ("hy3", "qwen3-moe", "gpt-oss"))
    yarn = config_of(oss).attention.rope.yarn
    routing = config_of(qwen).experts.routing
    yield "hy3", dataclasses.replace(config_of(hy3), num_mtp_layers=0)
    yield "hy3, two dense layers", changed(
        hy3, num_mtp_layers=0, first_dense_layers=2, attention={"rope": Rope(theta=500.0)},
        experts={"num_shared": 2, "float32_sum": True},
    )  # fmt: skip
    yield "qwen3", config_of(qwen)
    yield "qwen3, other switches", changed(
        qwen, first_dense_layers=1, layer_pattern="L", window=7,
        attention={"use_bias": True, "rope": Rope(theta=1e4, yarn=yarn)},
        experts={"routing": dataclasses.replace(routing, normalise=False)},
    )  # fmt: skip
    yield "gpt-oss", config_of(oss)
    yield "gpt-oss, other switches", changed(
        oss, layer_pattern="GGL", window=5,
        attention={"use_bias": False, "rope": Rope(theta=1e4)},
    )  # fmt: skip
    yield "gpt2", config_of("gpt2-tiny")


@pytest.mark.parametrize("config", [pytest.param(c, id=name) for name, c in variants()])
def test_transformers_loads_what_is_saved(config, tmp_path):
    model = random_model(config)
    jaxcp.save(model, tmp_path / "out")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    wrong = {k: v for k, v in report.items() if v and k != "error_msgs"}
    assert not wrong and not report.get("error_msgs")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24))
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(tokens)).logits.numpy()
    found = jaxcp.logits(model, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def test_packed_experts_are_unpacked_as_transformers_does():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 6, 3, 16), dtype=np.uint8)
    scales = rng.integers(90, 140, (2, 6, 3), dtype=np.uint8)
    theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales))
    found = formats.gpt_oss_unpacked(blocks, scales)
    assert theirs.shape == found.shape
    np.testing.assert_array_equal(found.astype(np.float32), theirs.float().numpy())
