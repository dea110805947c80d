# SPDX-License-Identifier: Apache-2.0
"""Windows of tokens, and the embedding that sees them."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from jaxcp import HybridMoE, HybridMoEConfig
from jaxcp.data.windows import NONE, windows
from jaxcp.layers.ngram import NGram
from jaxcp.models import config_from_dict, config_to_dict
from jaxcp.models.hybrid_moe.config import NGramConfig

CONFIG = HybridMoEConfig(
    vocab_size=8, num_layers=1, embed_dim=8, num_heads=1, num_kv_heads=1, head_dim=4, mlp_dim=4,
    moe_dim=4, num_experts=2, num_experts_per_tok=1, ngram=NGramConfig(width=3, dim=2),
)  # fmt: skip


@given(
    cut=st.integers(0, 9),
    width=st.integers(1, 5),
    ends=st.lists(st.integers(1, 9), max_size=3),
)
def test_windows(cut, width, ends):
    """Token by token from the definition; and in two turns what it is in one."""
    tokens = np.arange(20, dtype=np.int32).reshape(2, 10)
    segment_ids = np.tile((np.arange(10) >= np.array([*ends, 99])[:, None]).sum(0), (2, 1))
    found = windows(tokens, width, segment_ids=segment_ids).reshape(2, 10, width)
    for b, t, i in np.ndindex(found.shape):
        same = t >= i and segment_ids[b, t] == segment_ids[b, t - i]
        assert found[b, t, i] == (tokens[b, t - i] if same else NONE)
    whole = windows(tokens, width)
    if 0 < cut and width > 1:
        first = windows(tokens[:, :cut], width)
        second = windows(tokens[:, cut:], width, before=first[:, -1, : width - 1])
        np.testing.assert_array_equal(np.concatenate([first, second], axis=1), whole)
    if width == 1:
        np.testing.assert_array_equal(whole, tokens)


def test_the_embedding_is_a_sum_over_the_window():
    layer = NGram(8, 2, 3, 5, rngs=nnx.Rngs(0))
    window = np.array([[[3, NONE, NONE], [7, 3, NONE], [0, 7, 3]]], np.int32)
    table, proj = np.asarray(layer.table), np.asarray(layer.proj)
    for t, ids in enumerate(window[0]):
        expected = sum(table[i] @ proj[place] for place, i in enumerate(ids) if i != NONE)
        found = layer(jnp.asarray(window), jnp.float32)[0, t]
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="width and dim must be at least 1; got 0 and 2"):
        NGramConfig(width=0, dim=2)
    model, ids = HybridMoE(CONFIG, rngs=nnx.Rngs(0)), jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"windows of 3 tokens; got ids \(1, 4\)"):
        model(ids, ids)


def test_a_round_trip_of_the_config():
    assert config_from_dict(config_to_dict(CONFIG)) == CONFIG
