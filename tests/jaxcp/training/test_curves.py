# SPDX-License-Identifier: Apache-2.0
"""Fifty steps are the same curve whatever the mesh: rounding does not grow into another run."""

import numpy as np
import pytest

import jaxcp
from jaxcp.mesh import MeshConfig
from jaxcp.models.gpt.config import GPTConfig
from jaxcp.training import OptimizerConfig, TextSource, TrainConfig, read_metrics, train

MODEL = GPTConfig(vocab_size=65, max_positions=64, num_layers=2, num_heads=8, embed_dim=64)
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
