# SPDX-License-Identifier: Apache-2.0
"""Choices are counted in integers: the selection bias moves alike on any mesh, in any pieces."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxcp
from jaxcp.layers.router_stats import RouterStats, router_stats
from jaxcp.layers.routing import Routing
from jaxcp.training.step import balance, routing_health

NAME = "layers.0.mlp.router_bias"
MOST = 2**31 - 1


@functools.partial(jax.jit, static_argnums=1)
def moved(counts, rate=1.0):
    return balance({NAME: jnp.zeros(counts.shape[-1])}, counts[None], rate)[NAME]


def exactly(counts):
    """Python's integers do not wrap."""
    total = sum(map(int, counts))
    return [int(np.sign(total - int(c) * len(counts))) for c in counts]


@pytest.mark.parametrize("experts", [7, 8, 256])
def test_counts_of_any_size_are_compared_exactly(experts):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, high, experts) for high in (2, 5, 1000, 2**24 + 3, MOST)]
    rows += [np.full(experts, n) for n in (0, 1, 5, 2**24 + 1, MOST)]
    near = np.full((2, experts), 2**30 + 1)
    near[0, 0] += 1  # one choice of a billion apart from the mean
    near[1, :2] += [1, -1]
    for row in (*rows, *near):
        assert moved(jnp.asarray(row, jnp.int32)).tolist() == exactly(row), row
    assert exactly(near[1])[2:] == [0] * (experts - 2)  # exactly the mean: not moved


def test_fractions_that_were_summed_are_even_within_their_rounding():
    rng = np.random.default_rng(0)
    even = 0
    for _ in range(100):
        counts = rng.multinomial(74, np.ones(8) / 8, size=4)
        load = functools.reduce(jnp.add, jnp.asarray(counts, jnp.float32) / jnp.float32(74))
        assert moved(load).tolist() == exactly(counts.sum(0))
        even += (counts.sum(0) == 37).sum()
    assert even > 40


def test_health_of_counts():
    counts = jnp.array([[6, 6, 6, 6], [12, 12, 0, 0]])
    health_of = jax.jit(routing_health)
    health = health_of(RouterStats(counts, counts, jnp.zeros(2), jnp.array([3, 9])))
    assert health["router_flips"] == 12 / 48 and health["router_idle"] == 0.25
    assert health["router_load"].tolist() == [[1, 1, 1, 1], [2, 2, 0, 0]]
    none = RouterStats(0 * counts, 0 * counts, jnp.zeros(2), jnp.zeros(2, jnp.int32))
    assert all(np.isfinite(np.asarray(x)).all() for x in health_of(none).values())


ROWS, TOKENS, EXPERTS, RATE = 8, 15, 16, 2.0**-10


@jax.jit
def bias_after(batch):
    """The selection bias after a batch `[pieces, B, T, ...]`, and how many choices each expert had.

    Pieces add up as `training.step` adds them, devices as an MoE layer does.
    """

    def local(chosen, positions):
        rows = chosen.reshape(-1, 2)
        logits = jnp.zeros((rows.shape[0], EXPERTS))
        return router_stats(logits, rows, None, positions, Routing(), ("data", "seq"))

    run = jax.shard_map(local, in_specs=P("data", "seq"), out_specs=P(), check_vma=False)

    def add(total, piece):
        return jax.tree.map(jnp.add, total, run(*piece)), None

    zeros = RouterStats(jnp.zeros(EXPERTS, jnp.int32), jnp.zeros(EXPERTS), 0.0, jnp.int32(0))
    counts = jax.lax.scan(add, zeros, batch)[0].counts
    return balance({NAME: jnp.zeros(EXPERTS)}, counts[None], RATE)[NAME], counts


def test_the_bias_has_the_same_bits_on_any_mesh_and_in_any_pieces():
    """240 choices, 15 an expert in the mean; on two shards rows have pads, which do not count."""
    rng = np.random.default_rng(67)
    chosen = rng.integers(0, EXPERTS, (ROWS, TOKENS, 2), dtype=np.int32)
    positions = np.tile(np.arange(TOKENS, dtype=np.int32), (ROWS, 1))
    counts = np.bincount(chosen.reshape(-1))
    even = counts == 15
    pieces = (np.bincount(x.reshape(-1), minlength=EXPERTS) for x in np.split(chosen, 4))
    fractions = functools.reduce(np.add, [x.astype(np.float32) / np.float32(60) for x in pieces])
    assert (fractions.mean() != fractions[even]).sum() >= 2  # what the test would catch
    for axes, pieces in (({}, 1), ({}, 4), ({"data": 2, "seq": 2}, 2), ({"seq": 4}, 1)):
        mesh = jaxcp.make_mesh(**axes, devices=jax.devices()[: math.prod(axes.values())])
        natural = {"chosen": chosen, "positions": positions}
        there = jaxcp.Zigzag().permute(natural, mesh.shape["seq"]).values()
        cut = [x.reshape(pieces, ROWS // pieces, *x.shape[1:]) for x in there]
        with jax.set_mesh(mesh):
            bias, found = bias_after(jax.device_put(tuple(cut), P(None, "data", "seq")))
        np.testing.assert_array_equal(found, counts)
        np.testing.assert_array_equal(bias, RATE * np.sign(15 - counts))
