# SPDX-License-Identifier: Apache-2.0
"""The checkpoint that jaxcp ships: a hybrid MoE that finds needles far beyond its training length.

    jaxcp train needle --out runs/needle        # at most 20 minutes on 2 cores

Four layers, L L N L: sliding windows with rotary positions, and one full layer without positions,
which is what lets 1,024 bytes of training answer at 131,072. The dense stage first: where a line
follows a line, retrieval is learnt in some hundred steps; sparse lines later are then easy.
"""

import jaxcp
from jaxcp.evaluate.haystack import NeedleSource, Stage


def config() -> jaxcp.TrainConfig:
    model = jaxcp.HybridMoEConfig(
        vocab_size=256,
        num_layers=4,
        embed_dim=128,
        num_heads=2,
        num_kv_heads=2,
        head_dim=64,
        mlp_dim=256,
        moe_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        num_shared_experts=2,
        route_scale=2.0,
        rope_theta=1_000.0,
        layer_pattern="LLNL",
        window=64,
        ngram_width=12,
    )
    stages = (
        Stage(document_length=256, spacing=(2, 16)),
        Stage(start=450, document_length=256, spacing=(4, 60)),
        Stage(start=600, document_length=512, spacing=(4, 120)),
        Stage(start=800, document_length=1_024, spacing=(4, 300)),
    )
    return jaxcp.TrainConfig(
        model=model,
        seq_len=1_024,
        batch_size=4,
        steps=1_200,
        data=NeedleSource(stages=stages, similar=0.5, repeat=0.7, text_weight=0.1),
        out_dir="runs/needle",
        mesh=jaxcp.MeshConfig(seq=2),
        attention=jaxcp.Ring(),
        optimizer=jaxcp.OptimizerConfig(
            learning_rate=3e-3,
            muon_learning_rate=0.02,
            warmup_steps=60,
            decay="linear",
            decay_fraction=0.3,
            final_fraction=0.02,
            beta2=0.99,
            weight_decay=0.0,
        ),
        seed=1,
        checkpoint_every=500,
        log_every=20,
    )
