# SPDX-License-Identifier: Apache-2.0
"""FLOPs are counted as one would count them by hand, and only what the mask lets through."""

import dataclasses
import pathlib

import numpy as np
import pytest

import jaxcp
from jaxcp.training import flops
from pallas_kernels import PAD_POSITION

FIXTURES = pathlib.Path(__file__).parents[2] / "fixtures"
GPT2 = jaxcp.GPTConfig(
    vocab_size=50_257, max_positions=1024, num_layers=12, num_heads=12, embed_dim=768
)


def batch(length=1024, rows=2, **leaves):
    tokens = np.zeros((rows, length), np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return {"tokens": tokens, "positions": positions} | leaves


def test_gpt2_as_nanogpt_counts_it_but_for_the_mask():
    """6 N + 12 L H D T, of which nanoGPT counts all T positions of attention and its biases too."""
    weights = 12 * 12 * 768**2 + 50_257 * 768
    assert flops.matrix_weights(GPT2) == weights
    assert flops.matrix_weights(dataclasses.replace(GPT2, tie_embeddings=False)) == weights
    causal = 12 * 12 * 768 * 1024 * 1025 // 2
    assert flops.flops_of(GPT2, batch()) == 2 * (6 * weights * 1024 + causal)


def test_a_token_meets_its_own_experts_and_a_window():
    model = jaxcp.HybridMoEConfig(
        vocab_size=100, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=16,
        mlp_dim=64, moe_dim=24, num_experts=8, num_experts_per_tok=2, first_dense_layers=1,
        layer_pattern="LN", window=5, tie_embeddings=False,
    )  # fmt: skip
    attention = 32 * 16 * (4 + 2 + 2 + 4)
    shared = model.experts.num_shared
    moe = 32 * 8 + 3 * 32 * 24 * (2 + shared)
    assert flops.matrix_weights(model) == 2 * attention + 3 * 32 * 64 + moe + 100 * 32
    assert {layer.window: layer.width for layer in flops.attended(model)} == {5: 64, None: 64}
    assert flops.mask_of(model, batch()) == "causal+window"


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_pairs_are_those_of_the_mask(window):
    segments = np.array([[0, 0, 0, 0, 1, 1, 2, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5, 5, 9, 9]])
    positions = np.broadcast_to(np.arange(10), (2, 10)).copy()
    positions[0, 8:] = PAD_POSITION
    real = positions != PAD_POSITION
    ahead = positions[:, :, None] - positions[:, None, :]
    seen = (ahead >= 0) & (segments[:, :, None] == segments[:, None, :])
    seen &= real[:, :, None] & real[:, None, :]
    if window is not None:
        seen &= ahead < window
    packed = {"segment_ids": segments, "positions": positions}
    assert flops.visible_pairs(flops.document_lengths(packed), window) == seen.sum()
    assert flops.mask_of(GPT2, packed) == "causal+packed"


def test_attention_that_is_not_counted_leaves_the_number_out():
    latent = jaxcp.load_config(FIXTURES / "deepseek-v3-tiny")
    assert flops.attended(latent) is None and flops.flops_of(latent, batch()) is None
