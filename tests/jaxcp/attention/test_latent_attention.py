# SPDX-License-Identifier: Apache-2.0
"""Attention whose keys and values are made from a latent that travels: MLA, and shared K = V."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_attention import dense
from jax.sharding import PartitionSpec as P
from slow import slow_but

import jaxcp
from jaxcp import Zigzag
from jaxcp.compile import collectives
from jaxcp.context_parallel import Halo, latent_attention
from pallas_kernels.flash_attention import Mask

B, T, N, R, L, H, V = 2, 45, 4, 4, 12, 8, 6  # R: rotated part of a key; L: width of the latent
TOKENS = P("data", "seq")
STRATEGIES = (
    jaxcp.Ring(),
    jaxcp.Ring(bidirectional=True),
    jaxcp.RingPassQ(),
    jaxcp.AllGather(),
    jaxcp.AllGather(chunks=2),
    Halo(),
)


def mla(latent, w_k, w_v):
    """DeepSeek's: keys of a projected part and one rotated part that all heads share."""
    compressed, rotated = latent
    k = jnp.einsum("btl,lnh->btnh", compressed, w_k)
    rotated = jnp.broadcast_to(rotated[:, :, None], (*k.shape[:3], rotated.shape[-1]))
    return jnp.concatenate([k, rotated], axis=-1), jnp.einsum("btl,lnv->btnv", compressed, w_v)


def shared(latent):
    """One head that is key and value, as in DeepSeek-V4."""
    return latent[:, :, None], latent[:, :, None]


@functools.cache
def problem():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return {
        "q": draw(B, T, N, H + R), "latent": (draw(B, T, L), draw(B, T, R)),
        "dout": draw(B, T, N, V),
        "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
        "weights": (draw(L, N, H) / L**0.5, draw(L, N, V) / L**0.5),
    }  # fmt: skip


def expected(x, **options):
    """float64 attention, and its gradients pulled through `mla`."""
    (k, v), pull = jax.vjp(mla, x["latent"], *x["weights"])
    arrays = x["q"], k, v, x["positions"]
    out, dq, dk, dv, _ = dense(*arrays, dout=x["dout"], **options)
    dlatent, *dweights = pull((jnp.float32(dk), jnp.float32(dv)))
    return out, dq, dlatent, dweights


@pytest.mark.parametrize(
    "strategy, shards",
    # on an odd or an even number; `test_dense_attention` has both, and every mask
    [(strategy, n) for strategy, n in zip(STRATEGIES, (3, 8) * 3, strict=True)]
    + [(jaxcp.Ring(), n) for n in (1, 2, 8)],
    ids=str,
)
def test_mla(strategy, shards, mesh_of):
    mesh_of(seq=shards)
    x = problem()
    there = {k: v for k, v in x.items() if k != "weights"}
    there = jax.device_put(Zigzag().permute(there, shards), TOKENS)
    options = {"window": 17}

    @jax.jit
    def run(there, weights):
        def attend(q, latent, weights):
            return latent_attention(
                q, latent, weights, there["positions"], expand=mla, strategy=strategy, **options
            )

        out, pull = jax.vjp(attend, there["q"], there["latent"], weights)
        return out, *pull(there["dout"])

    out, dq, dlatent, dweights = run(there, x["weights"])
    found = *Zigzag().inverse((out, dq, dlatent), shards, T), dweights
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected(x, **options))), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(1, np.abs(theirs).max()), rtol=0)


def test_heads_over_model_and_no_mesh_at_all(mesh_of):
    x = problem()
    attend = functools.partial(latent_attention, expand=mla)
    out = attend(x["q"], x["latent"], x["weights"], x["positions"])
    np.testing.assert_allclose(out, expected(x)[0], atol=5e-6, rtol=0)
    mesh_of(data=2, seq=2, model=2)
    there = Zigzag().permute({k: x[k] for k in ("q", "latent", "positions")}, 2)
    q = jax.device_put(there["q"], P("data", "seq", "model"))
    latent, positions = jax.device_put((there["latent"], there["positions"]), TOKENS)
    weights = jax.device_put(x["weights"], P(None, "model"))
    out = jax.jit(attend)(q, latent, weights, positions)
    assert out.sharding.spec[2] == "model"
    np.testing.assert_allclose(Zigzag().inverse(out, 2, T), expected(x)[0], atol=5e-6, rtol=0)


def test_one_head_that_is_key_and_value(mesh_of):
    mesh_of(seq=4)
    x, kv = problem(), np.random.default_rng(1).normal(size=(B, T, H + R)).astype(np.float32)
    there = Zigzag().permute({"q": x["q"], "kv": kv, "positions": x["positions"]}, 4)
    q, kv_there, positions = jax.device_put(
        tuple(there[k] for k in ("q", "kv", "positions")), TOKENS
    )
    out = jax.jit(functools.partial(latent_attention, expand=shared))(q, kv_there, (), positions)
    wanted = dense(x["q"], kv[:, :, None], kv[:, :, None], x["positions"])
    np.testing.assert_allclose(Zigzag().inverse(out, 4, T), wanted, atol=5e-6, rtol=0)


def test_only_the_latent_travels(mesh_of):
    mesh_of(seq=4)
    x = problem()
    there = {k: v for k, v in x.items() if k not in ("weights", "dout")}
    there = jax.device_put(Zigzag().permute(there, 4), TOKENS)
    attend = functools.partial(latent_attention, expand=mla)
    arrays = there["q"], there["latent"], x["weights"], there["positions"]
    (permutes,) = collectives(jax.jit(attend).lower(*arrays).compile().as_text())
    assert (permutes.kind, permutes.count) == ("collective-permute", 3 * 3)
    assert permutes.bytes == 3 * B * (48 // 4) * (L + R + 1) * 4


@pytest.mark.parametrize("strategy", [jaxcp.Ulysses(), jaxcp.USP(ulysses=2)], ids=str)
def test_heads_do_not_travel(strategy, mesh_of):
    mesh_of(seq=2)
    x = problem()
    with pytest.raises(NotImplementedError, match=r"sends heads.*use Ring\(\)"):
        latent_attention(
            x["q"][:, :44], jax.tree.map(lambda y: y[:, :44], x["latent"]), x["weights"],
            x["positions"][:, :44], expand=mla, strategy=strategy,
        )  # fmt: skip


# The same bits from any number of shards

FIXED, SAME = jaxcp.FixedOrder(), 48


@functools.cache
def reproduced(dtype, shards, **axes):
    """`(out, dq, dlatent, dweights)`; `axes` beside `seq`: copies of weights, and of the latent."""
    rng = np.random.default_rng(2)
    shapes = (N, H + R), (L,), (R,), (N, V)
    q, *latent, dout = (jnp.asarray(rng.normal(size=(B, SAME, *x)), dtype) for x in shapes)
    weights = tuple(jnp.asarray(rng.normal(size=(L, N, x)) / L**0.5, dtype) for x in (H, V))
    positions = np.broadcast_to(np.arange(SAME, dtype=np.int32), (B, SAME))
    x = {"q": q, "latent": tuple(latent), "dout": dout, "positions": positions}
    devices = jax.devices()[: shards * math.prod(axes.values())]

    @jax.jit
    def run(x, weights):
        def attend(q, latent, weights):
            return latent_attention(
                q, latent, weights, x["positions"], expand=mla, strategy=FIXED, window=29
            )

        out, pull = jax.vjp(attend, x["q"], x["latent"], weights)
        return out, *pull(x["dout"])

    with jax.set_mesh(jaxcp.make_mesh(seq=shards, **axes, devices=devices)):
        heads = P("data", "seq", "model")
        specs = {"q": heads, "latent": TOKENS, "dout": heads, "positions": TOKENS}
        there = Zigzag().permute(x, shards)
        there = {k: jax.device_put(y, specs[k]) for k, y in there.items()}
        *found, dweights = run(there, jax.device_put(weights, P(None, "model")))
        found = *Zigzag().inverse(found, shards, SAME), dweights
    return x | {"weights": weights}, jax.tree.map(np.asarray, found)


@pytest.mark.parametrize(
    "dtype, shards, axes",
    slow_but(
        [("float32", 8, {}), ("bfloat16", 2, {"data": 2, "model": 2})], lambda case: case[1] == 8
    ),
    ids=str,
)
def test_the_same_bits(dtype, shards, axes):
    for ours, one in zip(
        *(jax.tree.leaves(reproduced(dtype, n, **axes)[1]) for n in (shards, 1)), strict=True
    ):
        bits = np.uint16 if dtype == "bfloat16" else np.uint32
        np.testing.assert_array_equal(ours.view(bits), one.view(bits))


def test_the_right_bits():
    x, found = reproduced("float32", 8)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected(x, window=29))), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1, np.abs(theirs).max()), rtol=0)


def test_where_the_bits_cannot_be_kept(mesh_of):
    x = problem()
    arrays = x["q"], x["latent"], x["weights"], x["positions"]
    with pytest.raises(ValueError, match="needs a mesh"):
        latent_attention(*arrays, expand=mla, strategy=FIXED)
    mesh_of(seq=2)

    def local(q, positions):
        return FIXED.attend(
            q, q, None, positions, positions, None, None, axis_name="seq", mask=Mask(),
            soft_cap=None, scale=1.0, expand=mla,
        )[0]  # fmt: skip

    run = jax.shard_map(local, out_specs=P(None, "seq"), check_vma=False)
    tokens = jax.device_put((x["q"][:, :32], x["positions"][:, :32]), P(None, "seq"))
    with pytest.raises(NotImplementedError, match=r"call jaxcp\.latent_attention"):
        run(*tokens)


def test_weights_lie_as_heads_do(mesh_of):
    mesh_of(data=2, seq=2)
    x = problem()
    weights = jax.device_put(x["weights"], P("data"))
    with pytest.raises(ValueError, match=r"whole or sharded as heads are \(None\).*reshard"):
        latent_attention(
            x["q"][:, :44], jax.tree.map(lambda y: y[:, :44], x["latent"]), weights,
            x["positions"][:, :44], expand=mla,
        )  # fmt: skip
