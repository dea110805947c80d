# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers over shards give what a scan over the whole sequence gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxcp.context_parallel.recurrent import Pieces
from jaxcp.layout import Contiguous, Striped, Zigzag

B, H, D = 2, 2, 4
TOLERANCE = 1e-5


def problem(length):
    rng = np.random.default_rng(length)
    q, k, v = (rng.normal(size=(B, length, H, D)).astype(np.float32) / 2 for _ in range(3))
    decay = rng.uniform(0.7, 1, (B, length, H)).astype(np.float32)
    decay[:, length // 3] = 0  # a document begins: nothing before it counts
    beta = rng.uniform(0, 1, (B, length, H)).astype(np.float32)
    return {"q": q, "k": k, "v": v, "decay": decay, "beta": beta}


def linear(x):
    """Linear attention with decay: the transition of a token."""
    return x["decay"][..., None, None] * np.eye(D, dtype=np.float32), x["k"][..., None] * x["v"][
        ..., None, :
    ]


def delta(x):
    """The gated delta rule: a token's transition is decay * (I - beta k k^T)."""
    k, beta = x["k"], x["beta"][..., None, None]
    outer = k[..., :, None] * k[..., None, :]
    eye = np.eye(D, dtype=np.float32)
    return x["decay"][..., None, None] * (eye - beta * outer), beta * (
        k[..., None] * x["v"][..., None, :]
    )


def scan(rule, x, start, real):
    """`(out [B, T, H, D], transition, state)` of consecutive tokens, one after the other."""

    def token(carry, now):
        total, state = carry
        (a, b, q), is_real = now
        new = jnp.einsum("bhij,bhjk->bhik", a, total), jnp.einsum("bhij,bhjk->bhik", a, state) + b
        total, state = jax.tree.map(lambda n, o: jnp.where(is_real, n, o), new, (total, state))
        return (total, state), jnp.einsum("bhi,bhij->bhj", q, state)

    eye = jnp.broadcast_to(jnp.eye(D), start.shape)
    steps = jax.tree.map(lambda y: jnp.moveaxis(y, 1, 0), (*rule(x), x["q"]))
    (total, state), out = jax.lax.scan(token, (eye, start), (steps, real))
    return jnp.moveaxis(out, 0, 1), total, state


def whole(rule, x):
    zero = jnp.zeros((B, H, D, D))
    return scan(rule, x, zero, jnp.ones(x["q"].shape[1], bool))[0]


def sharded(rule, pieces, x):
    """The layer on local shards: sum up, chain, run again from the right states."""
    parts, real = pieces.split(x), pieces.real()
    zeros = jnp.zeros((len(real), B, H, D, D))
    run = jax.vmap(functools.partial(scan, rule))
    _, transition, state = run(parts, zeros, real)
    product = functools.partial(jnp.einsum, "bhij,bhjk->bhik")
    start = pieces.states(transition, state, apply=product, compose=product)
    return pieces.join(run(parts, start, real)[0])


def over_shards(local, layout, shards, length, x):
    there = layout.permute(x, shards)
    pieces = Pieces(layout, "seq", length)
    run = jax.shard_map(
        functools.partial(local, pieces),
        in_specs=P(None, "seq"),
        out_specs=P(None, "seq"),
        check_vma=False,
    )
    return run, {k: jax.device_put(v, P(None, "seq")) for k, v in there.items()}


@pytest.mark.parametrize("rule", [linear, delta])
@pytest.mark.parametrize("layout", [Zigzag(), Contiguous()], ids=str)
@pytest.mark.parametrize("shards, length", [(1, 9), (2, 16), (3, 31), (4, 61), (8, 128)])
def test_the_same_as_one_scan(shards, length, layout, rule, mesh_of):
    mesh_of(seq=shards)
    x = problem(length)
    run, there = over_shards(functools.partial(sharded, rule), layout, shards, length, x)
    out = layout.inverse(jax.jit(run)(there), shards, length)
    np.testing.assert_allclose(out, whole(rule, x), atol=TOLERANCE, rtol=0)


def test_gradients_are_those_of_one_scan(mesh_of):
    mesh_of(seq=4)
    length, layout = 45, Zigzag()
    x = problem(length)
    dout = np.random.default_rng(1).normal(size=x["q"].shape).astype(np.float32)
    run, there = over_shards(functools.partial(sharded, delta), layout, 4, length, x)
    upstream = jax.device_put(layout.permute(dout, 4), P(None, "seq"))
    (found,) = jax.jit(lambda x, d: jax.vjp(run, x)[1](d))(there, upstream)
    (expected,) = jax.vjp(functools.partial(whole, delta), x)[1](dout)
    for name in ("q", "k", "v", "decay", "beta"):
        ours = layout.inverse(found[name], 4, length)
        np.testing.assert_allclose(ours, expected[name], atol=1e-4, rtol=0, err_msg=name)


@pytest.mark.parametrize("shards, length", [(2, 16), (3, 31), (4, 61)])
def test_a_short_convolution_takes_its_halo(shards, length, mesh_of):
    mesh_of(seq=shards)
    taps = np.array([0.5, -1.0, 2.0, 0.25], np.float32)  # the last is for the token itself
    x = {"v": problem(length)["v"]}

    def convolve(past, now):
        row = jnp.concatenate([past, now], axis=1)
        return sum(t * row[:, i : i + now.shape[1]] for i, t in enumerate(taps))

    def local(pieces, x):
        parts = pieces.split(x["v"])
        return pieces.join(jax.vmap(convolve)(pieces.last(parts, 3), parts))

    run, there = over_shards(local, Zigzag(), shards, length, x)
    out = Zigzag().inverse(jax.jit(run)(there), shards, length)
    expected = convolve(np.zeros((B, 3, H, D), np.float32), x["v"])
    np.testing.assert_allclose(out, expected, atol=1e-6, rtol=0)


def test_what_cannot_be(mesh_of):
    mesh_of(seq=4)
    for layout, width, error, match in (
        (Striped(), 1, NotImplementedError, r"pieces of consecutive tokens.*Zigzag\(\)"),
        (Zigzag(), 3, ValueError, "a piece of Zigzag.* has 2"),
    ):
        x = {"v": problem(9)["v"]}
        run, there = over_shards(
            lambda pieces, x, w=width: pieces.join(pieces.last(pieces.split(x["v"]), w)),
            layout, 4, 9, x,
        )  # fmt: skip
        with pytest.raises(error, match=match):
            run(there)
