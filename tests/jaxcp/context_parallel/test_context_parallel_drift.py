# SPDX-License-Identifier: Apache-2.0
"""More shards, no more error: bfloat16 against float64, output and gradients.

Partial results are carried, and gradients travel and are summed, in float32; they are rounded to
bfloat16 once, whatever the number of shards. (ring-flash-attention's error grows with it.)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_attention import dense

import jaxcp
from jaxcp import AllGather, Ring, RingPassQ, Ulysses
from jaxcp.layout import Zigzag

T, N, K, H = 1024, 8, 2, 64


@functools.cache
def problem():
    """Arrays that bfloat16 holds exactly, and float64's `(out, dq, dk, dv)`."""
    keys = jax.random.split(jax.random.key(0), 4)
    drawn = {
        name: jax.random.normal(key, (1, T, heads, H), jnp.bfloat16)
        for name, key, heads in zip(("q", "k", "v", "dout"), keys, (N, K, K, N), strict=True)
    }
    x = {name: np.asarray(value) for name, value in drawn.items()}
    x["positions"] = np.arange(T, dtype=np.int32)[None]
    return x, dense(**{k: v.astype(np.float64) if k != "positions" else v for k, v in x.items()})


def errors(strategy, shards):
    """RMS error of out, dq, dk and dv, each relative to the RMS of the true one."""
    x, expected = problem()

    @jax.jit
    def run(x):
        def attend(q, k, v):
            return jaxcp.context_parallel_attention(q, k, v, x["positions"], strategy=strategy)

        out, pull = jax.vjp(attend, x["q"], x["k"], x["v"])
        return out, *pull(x["dout"])

    with jax.set_mesh(jaxcp.make_mesh(seq=shards, devices=jax.devices()[:shards])):
        there = {
            name: jax.device_put(value, jax.P(None, "seq"))
            for name, value in Zigzag().permute(x, shards).items()
        }
        found = Zigzag().inverse(run(there), shards, T)
    return [
        np.sqrt(np.mean((np.asarray(a, np.float64) - b) ** 2) / np.mean(b**2))
        for a, b in zip(found, expected[:4], strict=True)
    ]


STRATEGIES = Ring(), AllGather(), Ulysses(), RingPassQ()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_error_does_not_grow_with_shards(strategy):
    few, many = errors(strategy, 2), errors(strategy, 8)
    for name, before, after in zip(("out", "dq", "dk", "dv"), few, many, strict=True):
        assert after <= 1.05 * before, f"{name}: {before:.3e} on 2 shards, {after:.3e} on 8"
    assert max(many) < 2**-8, "one rounding to bfloat16, and those inside a kernel"
