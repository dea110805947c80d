# SPDX-License-Identifier: Apache-2.0
"""The stock-Flax adapter, and what context parallelism refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxcp
from jaxcp.context_parallel import STRATEGIES
from jaxcp.layout import Zigzag


def heads(tokens=8, num=4, spec=("data", "seq")):
    return jax.device_put(jnp.ones((2, tokens, num, 8)), P(*spec))


def places(tokens=8):
    return jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (2, tokens))


# Stock Flax


def flax_attention(**options):
    return nnx.MultiHeadAttention(
        num_heads=4, in_features=16, decode=False, rngs=nnx.Rngs(0), **options
    )


def test_stock_flax_with_one_line_changed(mesh_of):
    x = np.random.default_rng(0).normal(size=(2, 24, 16)).astype(np.float32)
    stock = flax_attention()
    expected = stock(x, mask=nnx.make_causal_mask(jnp.ones((2, 24))))
    mesh_of(data=2, seq=4)
    ours = flax_attention(attention_fn=jaxcp.attention_fn(jaxcp.Ring()))
    there = jax.device_put(Zigzag().permute(x, 4), P("data", "seq"))
    out = jax.jit(lambda model, x: model(x))(ours, there)
    np.testing.assert_allclose(Zigzag().inverse(out, 4, 24), expected, atol=2e-6, rtol=0)


def test_what_the_adapter_cannot_honour():
    attend = jaxcp.attention_fn()
    q = jnp.ones((1, 4, 2, 8))
    with pytest.raises(NotImplementedError, match=r"cannot honour \['mask'\]: masks come from pos"):
        attend(q, q, q, mask=jnp.ones((1, 1, 4, 4), bool))
    with pytest.raises(NotImplementedError, match=r"\['bias'\]"):
        attend(q, q, q, bias=jnp.ones((1, 1, 4, 4)))
    with pytest.raises(NotImplementedError, match=r"\['dropout'\]"):
        attend(q, q, q, dropout_rate=0.1, deterministic=False)
    with pytest.raises(NotImplementedError, match=r"\['sow_weights'\]"):
        attend(q, q, q, module=nnx.Module())
    with pytest.raises(NotImplementedError, match="Flax's cache"):
        attend(q[:, :1], q, q)
    model = flax_attention(attention_fn=attend)
    with pytest.raises(NotImplementedError, match="mask"):
        model(jnp.ones((2, 4, 16)), mask=nnx.make_causal_mask(jnp.ones((2, 4))))


def test_dropout_that_is_off_is_fine():
    q = jnp.ones((1, 4, 2, 8))
    out = jaxcp.attention_fn()(q, q, q, dropout_rate=0.1, deterministic=True)
    np.testing.assert_allclose(out, q, rtol=1e-6)


def test_the_adapter_wants_whole_layouts(mesh_of):
    mesh_of(data=1, seq=4)
    q = jax.device_put(jnp.ones((2, 12, 4, 8)), P("data", "seq"))
    with pytest.raises(ValueError, match=r"12 tokens do not fill the layout \(16 places\)"):
        jaxcp.attention_fn()(q, q, q)


# Meshes and shapes that do not fit


def test_a_mesh_without_the_axis(mesh_of):
    mesh_of(seq=2)
    q = heads()
    with pytest.raises(ValueError, match=r"no axis 'cp'; it has \('data', 'seq', .*make_mesh"):
        jaxcp.ring_attention(q, q, q, places(), axis_name="cp")


def test_inside_shard_map(mesh_of):
    mesh_of(seq=2)
    q = heads()

    def local(q):
        return jaxcp.ring_attention(q, q, q, places(4))

    with pytest.raises(ValueError, match=r"already inside shard_map: call strategy\.attend"):
        jax.shard_map(local, in_specs=P("data", "seq"), out_specs=P("data", "seq"))(q)


@pytest.mark.parametrize(
    "shape, kv_heads, message",
    [
        ((2, 9, 4, 8), 4, "9 tokens do not divide over 2 shards of mesh axis 'seq'"),
        ((3, 8, 4, 8), 4, "3 batch do not divide over 2 shards"),
        ((2, 8, 4, 8), 1, "1 KV heads do not divide over 2 shards of mesh axis 'model'"),
    ],
)
def test_shapes_that_the_mesh_does_not_divide(shape, kv_heads, message):
    types = (AxisType.Auto,) * 3  # an explicit mesh would refuse the arrays themselves
    mesh = jax.make_mesh((2, 2, 2), ("data", "seq", "model"), axis_types=types)
    q = jnp.ones(shape)
    k = jnp.ones((*shape[:2], kv_heads, shape[3]))
    positions = jnp.zeros(shape[:2], jnp.int32)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        jaxcp.ring_attention(q, k, k, positions)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_options_that_make_no_sense(kind, mesh_of):
    """Under a mesh as without one: the strategies check what the kernels check."""

    strategy = kind(ulysses=2) if kind is jaxcp.USP else kind()

    def raises(match, q, k, positions, **options):
        options = {"window": 4, **options}
        with pytest.raises(ValueError, match=match):
            jaxcp.context_parallel_attention(q, k, k, positions, strategy=strategy, **options)

    for under_mesh in (True,) if strategy.same_bits else (False, True):
        if under_mesh:
            mesh_of(seq=2)
        q, ids = jnp.ones((2, 16, 4, 8)), places(16)
        raises("window must be at least 1 or None; got window=0", q, q, ids, window=0)
        raises("multiple of KV heads; got 4 and 3", q, q[:, :, :3], ids)
        raises("must be int32", q, q, ids.astype(jnp.float32))
        raises("soft_cap must be positive", q, q, ids, soft_cap=-1.0)
        raises(r"sinks must be one logit a query head, \[4\]", q, q, ids, sinks=jnp.ones(3))
        raises("implementation must be one of", q, q, ids, implementation="cuda")
        raises("share one floating dtype", q, q.astype(jnp.bfloat16), ids)
        raises("agree in B, S, K and H", q, q[..., :4], ids)
        raises("q_positions must be int32", q, q, places(6))


def test_the_base_strategy_does_nothing(mesh_of):
    mesh_of(seq=2)
    q = heads()
    with pytest.raises(NotImplementedError):
        jaxcp.context_parallel_attention(
            q, q, q, places(), strategy=jaxcp.context_parallel.Strategy()
        )
