# SPDX-License-Identifier: Apache-2.0
"""nanoGPT's character-level Shakespeare on a CPU: 0.8 M parameters, 2,000 steps of 768 tokens.

    jaxcp train shakespeare_char_cpu

It ends at 1.902 on all of the validation text (one seed), in 1,110 s on 2 busy cores; nanoGPT's own
command ends at 1.916. docs/training.md has both curves. GPT-2's checkpoints have biases, and so has
this model; nanoGPT's has none.
"""

import jaxcp


def config() -> jaxcp.TrainConfig:
    def text(start: float, stop: float) -> jaxcp.TextSource:
        return jaxcp.TextSource(
            path="tinyshakespeare", alphabet="characters", part=(start, stop), seed=1337
        )

    return jaxcp.TrainConfig(
        model=jaxcp.GPTConfig(
            vocab_size=65, max_positions=64, num_layers=4, num_heads=4, embed_dim=128,
            activation="gelu",
        ),
        seq_len=64,
        batch_size=12,
        steps=2_000,
        data=text(0.0, 0.9),
        eval_data=text(0.9, 1.0),
        eval_every=250,
        out_dir="runs/shakespeare_char_cpu",
        optimizer=jaxcp.OptimizerConfig(learning_rate=1e-3, warmup_steps=100, beta2=0.99),
        seed=1337,
        log_every=10,
    )  # fmt: skip
