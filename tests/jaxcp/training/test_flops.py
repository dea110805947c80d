# SPDX-License-Identifier: Apache-2.0
"""FLOPs are counted as one would count them by hand, and only what the mask lets through."""

import dataclasses
import pathlib

import numpy as np
import pytest

import jaxcp
from jaxcp.layers.gated_delta import DeltaDims
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


def delta_products(length, heads, key, value):
    """FLOPs forward of one document, of products of masked matrices, a chunk of 64 at a time."""
    total = 0
    for start in range(0, length, 64):
        size = min(64, length - start)
        seen, below = np.tri(size).sum(), np.tri(size, k=-1).sum()
        scores = 2 * key * (seen + below)  # q k^T, k k^T
        system = 2 * (key + value) * below  # (I + beta A)^-1 of keys and of values
        read = 2 * value * seen  # of what the chunk's own tokens write
        total += scores + system + read + 3 * 2 * size * key * value  # W S, q S, K^T U
    return heads * total


def test_a_delta_layer_beside_gated_attention():
    model = jaxcp.Qwen3NextConfig(
        vocab_size=100, num_layers=4, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=16,
        delta=DeltaDims(num_key_heads=2, num_value_heads=4, key_dim=8, value_dim=12),
        mlp_pattern="D", mlp_dim=64,
    )  # fmt: skip
    keys, values = 2 * 8, 4 * 12
    projections = 32 * (2 * keys + 2 * values + 2 * 4) + values * 32  # q k v z, beta and decay; out
    delta = projections + 4 * (2 * keys + values)  # a tap a channel
    gated = 32 * 16 * (4 + 2 + 2 + 4) + 4 * 16 * 32
    weights = 3 * delta + gated + 4 * 3 * 32 * 64 + 100 * 32
    assert flops.matrix_weights(model) == weights
    assert flops.attended(model) == (flops.Attended(None, 64),)
    lengths = np.array([[30] * 30 + [71] * 70, [100] * 100])
    packed = batch(100, segment_ids=lengths)
    products = sum(delta_products(n, 3 * 4, 8, 12) for n in (30, 70, 100))
    pairs = sum(n * (n + 1) // 2 for n in (30, 70, 100))
    expected = 6 * weights * 200 + 12 * 64 * pairs + 3 * products
    assert flops.flops_of(model, packed) == expected


def test_kimi_attention_beside_latent_attention():
    model = jaxcp.load_config(FIXTURES / "kimi-linear-tiny")
    wide = 4 * 12
    delta = 64 * (3 * wide + 4) + 2 * (64 * 12 + 12 * wide) + wide * 64 + 4 * 3 * wide
    latent = 64 * 4 * (16 + 8) + 64 * (24 + 8) + 24 * 4 * (16 + 16) + 4 * 16 * 64
    moe = 64 * 8 + 3 * 64 * 32 * (2 + 1)
    weights = 3 * delta + latent + 3 * 64 * 96 + 3 * moe + 256 * 64
    assert flops.matrix_weights(model) == weights
    assert flops.attended(model) == (flops.Attended(None, 4 * (24 + 16) // 2),)
    causal, products = 130 * 131 // 2, delta_products(130, 3 * 4, 12, 12)
    expected = 2 * (6 * weights * 130 + 12 * 80 * causal + 3 * products)
    assert flops.flops_of(model, batch(130)) == expected


@pytest.mark.parametrize("name", ["deepseek-v32-tiny", "deepseek-v4-tiny"])
def test_attention_that_is_not_counted_leaves_the_number_out(name):
    selected = jaxcp.load_config(FIXTURES / name)
    assert flops.attended(selected) is None and flops.flops_of(selected, batch()) is None
