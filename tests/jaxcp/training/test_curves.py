# SPDX-License-Identifier: Apache-2.0
"""Fifty steps are the same curve whatever the mesh: rounding does not grow into another run."""

import dataclasses

import numpy as np
import pytest

import jaxcp
from jaxcp.layers.gated_delta import DeltaDims
from jaxcp.layers.mla import LatentDims
from jaxcp.mesh import MeshConfig
from jaxcp.models.gpt.config import GPTConfig
from jaxcp.models.kimi_linear.config import KimiLinearConfig
from jaxcp.models.qwen3_next.config import Qwen3NextConfig, SparseConfig
from jaxcp.training import OptimizerConfig, TextSource, TrainConfig, read_metrics, train

MODEL = GPTConfig(vocab_size=65, max_positions=64, num_layers=2, num_heads=8, embed_dim=64)
QWEN3_NEXT = Qwen3NextConfig(
    vocab_size=65, num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=16,
    delta=DeltaDims(num_key_heads=2, num_value_heads=4, key_dim=8, value_dim=12),
    layer_pattern="RG", experts=SparseConfig(count=4, per_tok=2, dim=32, shared_dim=32),
)  # fmt: skip
DRAFTING = dataclasses.replace(QWEN3_NEXT, num_mtp_layers=1)
KIMI_LINEAR = KimiLinearConfig(
    vocab_size=65, num_layers=2, embed_dim=64, num_heads=4, layer_pattern="RG",
    latent=LatentDims(q_rank=None, kv_rank=24, nope_dim=16, rope_dim=8, value_dim=16),
    delta=DeltaDims(num_key_heads=4, num_value_heads=4, key_dim=12, value_dim=12),
    mlp_dim=96, moe_dim=32, num_experts=4, num_experts_per_tok=2,
)  # fmt: skip
ROUNDING = 2e-4
"""Of a loss, over fifty steps in float32."""
MESHES = [
    ({"seq": 8}, {}),
    ({"seq": 4, "data": 2}, {"strategy": jaxcp.Ulysses(), "zero": 3}),
    ({"seq": 2, "model": 2}, {"strategy": jaxcp.AllGather(), "zero": 1}),
    ({"seq": 4}, {"strategy": jaxcp.USP(ulysses=2), "accumulate": 4}),
    ({"seq": 2}, {"strategy": jaxcp.RingPassQ(), "accumulate": 2}),
    ({"data": 8}, {}),
]


def run(out_dir, mesh, **changes):
    fields = {
        "model": MODEL, "seq_len": 64, "batch_size": 8, "steps": 50, "out_dir": out_dir,
        "data": TextSource(path="tinyshakespeare", alphabet="characters"),
        "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=10),
        "mesh": MeshConfig(**mesh), "log_every": 1, "keep_programs": False,
    }  # fmt: skip
    return TrainConfig(**fields | changes)


def curve(result):
    records = read_metrics(result.metrics_path)
    assert [record["step"] for record in records] == [*range(1, 51)]
    if "mtp_loss" in records[0]:
        assert records[-1]["mtp_loss"] < records[0]["mtp_loss"] - 0.5, "no draft was learnt"
    return np.array([[record["loss"], record["grad_norm"]] for record in records])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return curve(train(run(tmp_path_factory.mktemp("alone"), {})))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "changes"), MESHES, ids=lambda x: "-".join(map(str, x)) or "plain"
)
def test_fifty_steps_are_those_of_one_device(alone, tmp_path, mesh, changes):
    found = curve(train(run(tmp_path, mesh, **changes)))
    assert alone[-1, 0] < alone[0, 0] - 0.5, "nothing was learnt"
    np.testing.assert_allclose(found[:, 0], alone[:, 0], rtol=ROUNDING)
    np.testing.assert_allclose(found[:, 1], alone[:, 1], rtol=20 * ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "mesh"),
    [(QWEN3_NEXT, {"seq": 4}), (DRAFTING, {"seq": 2, "model": 2}), (KIMI_LINEAR, {"seq": 2})],
    ids=["qwen3-next-4", "drafting-2-2", "kimi-linear-2"],
)
def test_fifty_steps_of_a_recurrent_model_are_those_of_one_device(model, mesh, tmp_path):
    """On the mesh the backward pass computes blocks again."""
    alone = curve(train(run(tmp_path / "alone", {}, model=model)))
    again = dataclasses.replace(model, remat=True)
    found = curve(train(run(tmp_path / "mesh", mesh, model=again)))
    assert alone[-1, 0] < alone[0, 0] - 0.5, "nothing was learnt"
    np.testing.assert_allclose(found[:, 0], alone[:, 0], rtol=ROUNDING)
    np.testing.assert_allclose(found[:, 1], alone[:, 1], rtol=20 * ROUNDING)
