# SPDX-License-Identifier: Apache-2.0
"""`FixedOrder`: bit-identical outputs and gradients for every number of shards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_attention import dense
from jax.sharding import PartitionSpec as P
from slow import slow_but

import jaxcp
from jaxcp import Contiguous
from jaxcp.attention.over_cache import OverCache
from pallas_kernels.flash_attention import Mask

B, T, N, K, H = 2, 96, 4, 2, 16
OPTIONS = {"window": 41, "soft_cap": 3.0}
FIXED = jaxcp.FixedOrder()
CASES = [(FIXED, 2), (FIXED, 4), (FIXED, 8), (jaxcp.FixedOrder(layout=Contiguous()), 8)]


@functools.cache
def problem(dtype):
    rng = np.random.default_rng(0)
    x = {name: rng.normal(size=(B, T, n, H)) for name, n in zip("qkvd", (N, K, K, N), strict=True)}
    x = {name: jnp.asarray(y, dtype) for name, y in x.items()}
    segments = (np.arange(T) >= np.array([[30], [71]])).astype(np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return x | {"positions": positions, "segment_ids": segments}


@functools.partial(jax.jit, static_argnums=0)
def both(strategy, x):
    def attend(q, k, v):
        return jaxcp.context_parallel_attention(
            q, k, v, x["positions"], segment_ids=x["segment_ids"], strategy=strategy, **OPTIONS
        )

    out, pull = jax.vjp(attend, x["q"], x["k"], x["v"])
    return out, *pull(x["d"])


@functools.cache
def found(strategy, shards, dtype):
    mesh = jaxcp.make_mesh(seq=shards, devices=jax.devices()[:shards])
    with jax.set_mesh(mesh):
        there = jax.device_put(strategy.layout.permute(problem(dtype), shards), P(None, "seq"))
        return strategy.layout.inverse(both(strategy, there), shards, T)


IN_BOTH = [(*case, dtype) for case in CASES for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize(
    "strategy, shards, dtype",
    slow_but(IN_BOTH, lambda case: case[2] == "float32" or case[:2] == (FIXED, 8)),
    ids=str,
)
def test_the_same_bits(strategy, shards, dtype):
    for name, ours, one in zip(
        ("out", "dq", "dk", "dv"),
        found(strategy, shards, dtype),
        found(FIXED, 1, dtype),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, one, err_msg=name)


def test_the_same_bits_from_a_shard_map_of_ones_own(mesh_of):
    """Nobody but `attend` itself is there to see to it."""
    mesh_of(seq=4)
    x = {k: v for k, v in problem("float32").items() if k != "d"}
    there = jax.device_put(FIXED.layout.permute(x, 4), P(None, "seq"))

    def local(x):
        positions, segments = x["positions"], x["segment_ids"]
        return FIXED.attend(
            x["q"], x["k"], x["v"], positions, positions, segments, segments, axis_name="seq",
            mask=Mask(window=OPTIONS["window"]), soft_cap=OPTIONS["soft_cap"], scale=H**-0.5,
        )[0]  # fmt: skip

    spec = P(None, "seq")
    out = jax.jit(jax.shard_map(local, in_specs=spec, out_specs=spec, check_vma=False))(there)
    np.testing.assert_array_equal(FIXED.layout.inverse(out, 4, T), found(FIXED, 1, "float32")[0])


def test_the_right_bits():
    x = problem("float32")
    wanted = dense(
        x["q"], x["k"], x["v"], x["positions"], segment_ids=x["segment_ids"], dout=x["d"], **OPTIONS
    )
    for ours, theirs in zip(found(FIXED, 8, "float32"), wanted, strict=False):
        np.testing.assert_allclose(ours, theirs, atol=5e-6, rtol=0)


def test_without_it_the_bits_differ():
    """Else the test above could not fail."""
    results = [found(jaxcp.Ring(), shards, "float32")[0] for shards in (1, 8)]
    assert not np.array_equal(*results)


def test_where_it_cannot_be_kept():
    x, positions = jnp.ones((1, 16, 2, 8)), jnp.zeros((1, 16), jnp.int32)
    with pytest.raises(ValueError, match="needs a mesh"):
        jaxcp.context_parallel_attention(x, x, x, positions, strategy=FIXED)
    with pytest.raises(NotImplementedError, match="prefill over a cache"):
        OverCache(None, positions, None, sharded=True, strategy=FIXED)


@pytest.mark.parametrize("shards, tokens", [(3, 96), (4, 88)])
def test_what_does_not_fit(shards, tokens, mesh_of):
    mesh_of(seq=shards)
    x = jnp.ones((1, tokens, 2, 8))
    positions = jnp.zeros((1, tokens), jnp.int32)
    with pytest.raises(ValueError, match="1, 2, 4, 8 or 16 shards, a multiple of 16 tokens"):
        jaxcp.context_parallel_attention(x, x, x, positions, strategy=FIXED)
