# SPDX-License-Identifier: Apache-2.0
"""A model that is drawn in parts has the same numbers, and no device has a whole weight."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

import jaxcp
from jaxcp.layers.parameter import drawn_in_parts
from jaxcp.weights.placement import place

CONFIG = jaxcp.HybridMoEConfig(
    vocab_size=64, num_layers=3, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64,
    moe_dim=64, num_experts=4, num_experts_per_tok=2,
)  # fmt: skip


def weights(model):
    leaves = jax.tree_util.tree_leaves_with_path(
        model, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    return {jax.tree_util.keystr(path): leaf.get_value() for path, leaf in leaves}


@pytest.mark.parametrize("axes", [{"data": 2, "seq": 4}, {"seq": 2, "model": 2}])
def test_each_device_draws_its_own(axes, mesh_of):
    whole = weights(jaxcp.HybridMoE(CONFIG, rngs=nnx.Rngs(0)))
    mesh_of(**axes)
    with drawn_in_parts(jaxcp.Rules()):
        parts = weights(jaxcp.HybridMoE(CONFIG, rngs=nnx.Rngs(0)))
    assert whole.keys() == parts.keys()
    for name, x in parts.items():
        np.testing.assert_array_equal(x, whole[name], err_msg=name)
        if x.size > 512:  # norms and biases are whole
            here = math.prod(x.sharding.shard_shape(x.shape))
            assert here <= x.size // (axes.get("data", 1) * axes["seq"]), name


def test_a_part_of_few_columns_is_drawn_whole(mesh_of):
    """Eight devices divide only the columns of 61 rows: 4 each, which have other last bits."""
    config = jaxcp.GPTConfig(
        vocab_size=61, max_positions=61, num_layers=1, num_heads=2, embed_dim=32
    )
    whole = weights(jaxcp.GPT(config, rngs=nnx.Rngs(0)))
    mesh_of(seq=8)
    with drawn_in_parts(jaxcp.Rules()):
        parts = weights(jaxcp.GPT(config, rngs=nnx.Rngs(0)))
    for name, x in parts.items():
        np.testing.assert_array_equal(x, whole[name], err_msg=name)
    # the numbers above differ only where XLA optimizes as it does outside of tests
    assert parts[".embed"].is_fully_replicated and parts[".position_embed"].is_fully_replicated


def test_what_a_mesh_does_not_divide_is_named_by_who_places_it(mesh_of):
    mesh_of(model=3)
    with drawn_in_parts(jaxcp.Rules()):
        model = jaxcp.HybridMoE(CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="the mesh does not divide"):
        place(model)
