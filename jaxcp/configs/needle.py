# SPDX-License-Identifier: Apache-2.0
"""The checkpoint that jaxcp ships: a hybrid MoE that finds needles far beyond its training length.

    jaxcp train needle --out runs/needle --export-dtype bfloat16    # 18 to 20 minutes on 2 cores

Four layers, L N L L: sliding windows with rotary positions, and one full layer without positions,
which is why 128K is no harder than 2K. What makes it learn in minutes:
- an embedding of the last 12 bytes, so that the full layer can compare whole keys;
- the full layer near the bottom, before windows have mixed anything;
- first documents of 128 bytes with a line every 20 or so: retrieval is learnt in 150 steps.
  Lines lie further apart than a window reaches, or windows learn to copy from the line before.
Many different keys a document matter later: with few, two digits of a value name it.
"""

import jaxcp
from jaxcp.data.haystack import NeedleSource, Stage
from jaxcp.layers.rope import Rope
from jaxcp.layers.routing import Routing
from jaxcp.models.hybrid_moe.config import AttentionConfig, ExpertsConfig, Heads, NGramConfig


def config() -> jaxcp.TrainConfig:
    rope = Rope(theta=1_000.0)
    full = Heads(num_heads=2, num_kv_heads=2, head_dim=64, value_dim=64, rope=rope)
    model = jaxcp.HybridMoEConfig(
        vocab_size=256,
        num_layers=4,
        embed_dim=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        mlp_dim=256,
        moe_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        layer_pattern="LNLL",
        window=32,
        attention=AttentionConfig(rope=rope, full=full),
        experts=ExpertsConfig(num_shared=2, routing=Routing(scale=2.0)),
        ngram=NGramConfig(width=12),
    )
    stages = (
        Stage(document_length=128, spacing=(12, 30)),
        Stage(start=200, document_length=256, spacing=(8, 60)),
        Stage(start=350, document_length=512, spacing=(8, 100)),
        Stage(start=550, document_length=1_024, spacing=(8, 150)),
        Stage(start=1_300, document_length=2_048, spacing=(8, 300)),
    )
    return jaxcp.TrainConfig(
        model=model,
        seq_len=2_048,
        batch_size=2,
        steps=2_200,
        data=NeedleSource(stages=stages, similar=0.5, repeat=0.55, text_weight=0.1),
        out_dir="runs/needle",
        mesh=jaxcp.MeshConfig(seq=2),
        strategy=jaxcp.Ring(),
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
        checkpoint_every=500,
        log_every=20,
    )
