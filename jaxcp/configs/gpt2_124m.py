# SPDX-License-Identifier: Apache-2.0
"""GPT-2 124M at 32K tokens of context over eight chips; half a million tokens a step.

`data/*.bin` are uint16 tokens of the GPT-2 vocabulary, documents ended by token 50256, as
nanoGPT's data/openwebtext/prepare.py writes them.
"""

import jaxcp
from jaxcp.models.gpt.config import GPTConfig
from jaxcp.training import OptimizerConfig, TokenFiles, TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        model=GPTConfig(
            vocab_size=50_304,  # 50,257 rounded up to a multiple of 128
            max_positions=32_768,
            num_layers=12,
            num_heads=12,
            embed_dim=768,
            dtype="bfloat16",
            remat=True,
        ),
        mesh=jaxcp.MeshConfig(seq=8),
        strategy=jaxcp.Ring(),
        seq_len=32_768,
        batch_size=16,
        accumulate=16,
        steps=19_000,
        data=TokenFiles(pattern="data/*.bin", separator=50_256),
        out_dir="runs/gpt2_124m",
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=700),
        checkpoint_every=500,
    )
