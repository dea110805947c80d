# SPDX-License-Identifier: Apache-2.0
"""A nanoGPT-sized model on the text that every CPython has; eight emulated devices, or one."""

import jaxcp
from jaxcp.models.gpt.config import GPTConfig
from jaxcp.training import OptimizerConfig, TextSource, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        model=GPTConfig(
            vocab_size=256, max_positions=256, num_layers=4, num_heads=4, embed_dim=128
        ),
        mesh=jaxcp.MeshConfig(data=2, seq=4),
        strategy=jaxcp.Ring(),
        seq_len=256,
        batch_size=8,
        steps=800,
        data=TextSource(part=(0.0, 0.9)),
        out_dir="runs/gpt_cpu",
        optimizer=OptimizerConfig(
            learning_rate=3e-3, muon_learning_rate=0.02, warmup_steps=20, weight_decay=0.0
        ),
        checkpoint_every=200,
        log_every=5,
    )
