# SPDX-License-Identifier: Apache-2.0
"""nanoGPT's character-level Shakespeare on a GPU: 10.7 M parameters, 5,000 steps of 16,384 tokens.

    jaxcp train shakespeare_char --export best

It was not run yet. nanoGPT publishes 1.4697, the best of its evaluations, with a dropout of 0.2,
which this model has not: expect the best evaluation earlier, and above that.
"""

import jaxcp


def config() -> jaxcp.TrainConfig:
    def text(start: float, stop: float) -> jaxcp.TextSource:
        return jaxcp.TextSource(
            path="tinyshakespeare", alphabet="characters", part=(start, stop), seed=1337
        )

    return jaxcp.TrainConfig(
        model=jaxcp.GPTConfig(
            vocab_size=65, max_positions=256, num_layers=6, num_heads=6, embed_dim=384,
            activation="gelu", dtype="bfloat16",
        ),
        seq_len=256,
        batch_size=64,
        steps=5_000,
        data=text(0.0, 0.9),
        eval_data=text(0.9, 1.0),
        eval_every=250,
        out_dir="runs/shakespeare_char",
        optimizer=jaxcp.OptimizerConfig(learning_rate=1e-3, warmup_steps=100, beta2=0.99),
        seed=1337,
        log_every=10,
    )  # fmt: skip
