# SPDX-License-Identifier: Apache-2.0
"""Rules from logical axes to mesh axes: what they give, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxcp import Rules
from jaxcp.sharding import sharding_of
from jaxcp.weights.placement import place


def weight(*axes):
    return nnx.Param(jnp.ones((8,) * len(axes)), axes=axes)


def test_axes_by_their_rules():
    assert sharding_of(weight("experts", "embed", "mlp")) == P("expert", None, "model")
    spread = Rules(experts="seq", embed="data")
    assert sharding_of(weight("experts", "embed", "mlp"), spread) == P("seq", "data", "model")
    assert sharding_of(weight("embed", None), spread) == P("data", None)
    assert sharding_of(nnx.Param(jnp.ones(3)), spread) == P()


def test_experts_lie_where_tokens_can_reach_them():
    with pytest.raises(ValueError, match="experts lie over expert, seq or data; got experts='mod"):
        Rules(experts="model")
    with pytest.raises(TypeError, match="expertz"):
        Rules(expertz="seq")


def test_two_axes_of_a_parameter_over_one_mesh_axis(mesh_of):
    mesh_of(data=2)
    rules = Rules(experts="data", embed="data")
    both = r"got experts and embed of \('experts', 'embed', 'mlp'\) both over 'data'.*jaxcp\.Rules"
    with pytest.raises(ValueError, match=both):
        place(nnx.Dict(w=weight("experts", "embed", "mlp")), rules=rules)


def test_a_parameter_may_lie_over_the_axis_of_the_rows(mesh_of):
    mesh_of(data=4, model=2)
    (leaf,) = jax.tree.leaves(place(nnx.Dict(w=weight("embed", "mlp")), rules=Rules(embed="data")))
    assert {shard.data.shape for shard in leaf.addressable_shards} == {(2, 4)}
    np.testing.assert_array_equal(leaf, np.ones((8, 8)))
