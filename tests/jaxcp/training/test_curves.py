# SPDX-License-Identifier: Apache-2.0
"""Fifty steps are the same curve whatever the mesh: rounding does not grow into another run."""

import jax
import numpy as np
import pytest

import jaxcp
from jaxcp.context_parallel import FixedOrder
from jaxcp.mesh import MeshConfig
from jaxcp.models.dense.config import DenseConfig
from jaxcp.models.gpt.config import GPTConfig
from jaxcp.training import OptimizerConfig, TextSource, TrainConfig, read_metrics, train

MODEL = GPTConfig(vocab_size=65, max_positions=64, num_layers=2, num_heads=8, embed_dim=64)
SMALL = GPTConfig(vocab_size=65, max_positions=64, num_layers=1, num_heads=2, embed_dim=16)
DENSE = DenseConfig(
    vocab_size=65, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64,
    layer_pattern="LG", window=20, qkv_bias=True, qk_norm=True,
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
    assert alone[-1, 0] < alone[0, 0] - 1, "nothing was learnt"
    np.testing.assert_allclose(found[:, 0], alone[:, 0], rtol=ROUNDING)
    np.testing.assert_allclose(found[:, 1], alone[:, 1], rtol=20 * ROUNDING)


def test_fixed_order_gives_the_same_bits_on_two_devices(tmp_path):
    """Of losses and of every weight; and gradients with the norms of a ring's."""
    assert_same_bits(tmp_path, (1, 2), steps=3, model=SMALL)
    train(run(tmp_path / "ring", {}, steps=3, model=SMALL))
    found, expected = (
        [r["grad_norm"] for r in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("1", "ring")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("model", [MODEL, DENSE], ids=["gpt", "dense"])
def test_fixed_order_gives_the_same_fifty_steps_on_1_2_4_and_8(tmp_path, model):
    """In accumulated pieces too, and with windows, grouped heads, norms and biases."""
    assert_same_bits(tmp_path, (1, 2, 4, 8), steps=50, model=model, accumulate=2)


def assert_same_bits(folder, shards, **changes):
    expected = None
    for seq in shards:
        config = run(folder / str(seq), {"seq": seq}, strategy=FixedOrder(), **changes)
        result = train(config)
        records = read_metrics(result.metrics_path)
        found = [(r["loss"], r["grad_norm"]) for r in records]
        found += [np.asarray(x).tobytes() for x in jax.tree.leaves(result.model)]
        assert expected is None or found == expected, seq
        expected = found
