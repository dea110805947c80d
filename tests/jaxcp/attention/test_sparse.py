# SPDX-License-Identifier: Apache-2.0
"""Attention over selected keys, against the definition in float64, with many equal scores."""

import functools

import jax
import numpy as np
import pytest

from jaxcp.attention.full import merged
from jaxcp.attention.selected import attend_selected
from jaxcp.context_parallel.shards import on_shards
from pallas_kernels import PAD_POSITION

B, T, S, N, H, V, HEADS, C, TOP = 2, 13, 11, 2, 6, 4, 3, 2, 4


def arrays():
    """Small whole numbers in the index: scores tie, and many are 0 with either sign."""
    rng = np.random.default_rng(0)
    whole = functools.partial(rng.integers, -2, 3)
    positions = np.broadcast_to(np.arange(T), (B, T)).copy()
    positions[1, -2:] = PAD_POSITION
    key_positions = np.broadcast_to(np.arange(S) + 1, (B, S)).copy()
    key_positions[0, -1] = PAD_POSITION
    return {
        "q": rng.normal(size=(B, T, N, H)), "keys": rng.normal(size=(B, S, H)),
        "queries": whole(size=(B, T, HEADS, C)), "weights": whole(size=(B, T, HEADS)),
        "index_keys": whole(size=(B, S, C)), "positions": positions,
        "key_positions": key_positions,
    }  # fmt: skip


def expected(q, keys, queries, weights, index_keys, positions, key_positions):
    out, lse = np.zeros((B, T, N, V)), np.full((B, T, N), -np.inf)
    for b, t in np.ndindex(B, T):
        real = positions[b, t] != PAD_POSITION
        visible = [s for s in range(S) if real and key_positions[b, s] <= positions[b, t]]
        each = np.maximum(queries[b, t] @ index_keys[b].T, 0)
        score = weights[b, t] @ each
        chosen = sorted(visible, key=lambda s, score=score: (-score[s], s))[:TOP]
        if chosen:
            logits = 0.3 * q[b, t] @ keys[b, chosen].T
            p = np.exp(logits)
            lse[b, t] = np.log(p.sum(-1))
            out[b, t] = p @ keys[b, chosen, :V] / p.sum(-1, keepdims=True)
    return out, lse


@pytest.mark.parametrize("block", [None, 5])
def test_selected_keys(block):
    x = arrays()
    of = {k: v.astype(np.int32 if "positions" in k else np.float32) for k, v in x.items()}
    options = {"top_k": TOP, "scale": 0.3, "value_dim": V, "block": block}
    out, lse = jax.jit(functools.partial(attend_selected, **options))(**of)
    wanted = expected(**x)
    assert np.isneginf(wanted[1]).any()
    np.testing.assert_allclose(out, wanted[0], atol=2e-6, rtol=0)
    np.testing.assert_allclose(lse, wanted[1], atol=2e-6, rtol=0)


@pytest.mark.parametrize("block", [None, 5])
def test_keys_are_selected_among_those_of_all_shards(block, mesh_of):
    """Three keys a shard, fewer than a query selects, and of equal scores the earlier one."""
    x = arrays()
    wanted = expected(**x)
    of_shards = (np.arange(12) * 4 + np.arange(12) // 3) % 12  # shard 0 has the keys 0, 4, 8
    there = {}
    for name, pad in (("keys", 0), ("index_keys", 9), ("key_positions", PAD_POSITION)):
        rows = [(0, 0), (0, 12 - S), (0, 0)][: x[name].ndim]
        there[name] = np.pad(x.pop(name), rows, constant_values=pad)[:, of_shards]
    assert (np.diff(there["key_positions"][0, :3]) == 4).all()
    mesh_of(seq=4)
    options = {"top_k": TOP, "scale": 0.3, "value_dim": V, "block": block, "axis_name": "seq"}

    def local(x, there):
        return merged(*attend_selected(**x, **there, **options))

    run = on_shards(local, (jax.P(), jax.P(None, "seq")), jax.P())
    arguments = jax.tree.map(
        lambda v: v.astype(np.int32 if v.shape in {(B, T), (B, 12)} else np.float32), (x, there)
    )
    out, lse = jax.jit(run)(*arguments)
    np.testing.assert_allclose(out, wanted[0], atol=2e-6, rtol=0)
    np.testing.assert_allclose(lse, wanted[1], atol=2e-6, rtol=0)
