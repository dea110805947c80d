# SPDX-License-Identifier: Apache-2.0
"""Training with `FixedOrder`: the same bits of losses and weights on 1, 2, 4 and 8 devices."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxcp import Ring
from jaxcp.context_parallel import FixedOrder
from jaxcp.layout import Contiguous
from jaxcp.mesh import MeshConfig
from jaxcp.models.dense.config import DenseConfig
from jaxcp.models.gpt.config import GPTConfig
from jaxcp.training import OptimizerConfig, TextSource, TrainConfig, read_metrics, train

SMALL = GPTConfig(vocab_size=65, max_positions=64, num_layers=1, num_heads=2, embed_dim=16)
GPT = GPTConfig(vocab_size=65, max_positions=64, num_layers=2, num_heads=8, embed_dim=64)
DENSE = DenseConfig(
    vocab_size=65, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64,
    layer_pattern="LG", window=20, qkv_bias=True, qk_norm=True,
)  # fmt: skip


def run(out_dir, seq, **changes):
    fields = {
        "model": GPT, "seq_len": 64, "batch_size": 8, "steps": 50, "out_dir": out_dir,
        "data": TextSource(path="tinyshakespeare", alphabet="characters"),
        "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=10),
        "mesh": MeshConfig(seq=seq), "log_every": 1, "keep_programs": False,
        "strategy": FixedOrder(),
    }  # fmt: skip
    return TrainConfig(**fields | changes)


def trained(config):
    """Losses and norms of all steps, and the bytes of every weight."""
    result = train(config)
    records = read_metrics(result.metrics_path)
    assert len(records) == config.steps
    curve = [(r["loss"], r["grad_norm"]) for r in records]
    return curve, [np.asarray(x).tobytes() for x in jax.tree.leaves(result.model)]


def same_bits(folder, shards, **changes):
    """The curve that all of them have."""
    curves = [trained(run(folder / str(seq), seq, **changes)) for seq in shards]
    for seq, found in zip(shards[1:], curves[1:], strict=True):
        assert found == curves[0], seq
    return np.array(curves[0][0])


def test_a_few_steps_on_one_device_and_on_eight(tmp_path):
    """They have the losses and the norms of a ring's too, but for rounding."""
    few = {"steps": 3, "model": SMALL}
    curve = same_bits(tmp_path, (1, 8), **few)
    expected, _ = trained(run(tmp_path / "ring", 1, strategy=Ring(), **few))
    np.testing.assert_allclose(curve, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, "attention_saveable"])
def test_roundings_to_bfloat16_are_those_of_one_device(tmp_path, remat):
    """XLA may leave some out, and did on one device alone."""
    model = dataclasses.replace(DENSE, dtype="bfloat16", remat=remat)
    same_bits(tmp_path, (1, 2, 8), steps=2, model=model)


CASES = {
    "gpt": {},
    "windows, grouped heads, norms, biases, pieces": {"model": DENSE, "accumulate": 2},
    "blocks computed again": {"model": dataclasses.replace(DENSE, remat=True)},
    "attention saved": {"model": dataclasses.replace(GPT, remat="attention_saveable")},
    "contiguous, muon": {
        "strategy": FixedOrder(layout=Contiguous()),
        "optimizer": OptimizerConfig(muon_learning_rate=0.02, warmup_steps=2),
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_fifty_steps_on_1_2_4_and_8(tmp_path, case):
    curve = same_bits(tmp_path, (1, 2, 4, 8), **CASES[case])
    assert curve[-1, 0] < curve[0, 0] - 0.5, "nothing was learnt"
