# SPDX-License-Identifier: Apache-2.0
"""Decode attention over a million slots becomes machine code for chips that are not there.

That no copy of the cache is made is a fact about the compiled program: its temporaries.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from slow import slow_but

from jaxcp.compile import compile_for, parse_target
from pallas_kernels import decode_attention

# 2026-11: jax 0.11 and later warn when Pallas-Triton is used; it works through 0.12.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

SLOTS = 1 << 20
TARGETS = ("rtx-pro-6000:1", "h200:1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


def compiled(target, cache, *, queries=1, heads=64, kv_heads=8):
    """A step of one sequence over `SLOTS` slots, on every device of the target alike."""
    target = parse_target(target)
    mesh = target.mesh(seq=target.size)
    keys = jax.ShapeDtypeStruct((1, SLOTS, kv_heads, 128), cache)
    scales = None
    if jnp.dtype(cache).itemsize == 1:
        scales = jax.ShapeDtypeStruct((1, kv_heads, SLOTS), jnp.float32)
    ids = [jax.ShapeDtypeStruct((1, size), jnp.int32) for size in (queries, SLOTS)]
    args = jax.ShapeDtypeStruct((1, queries, heads, 128), "bfloat16"), keys, keys, scales, *ids

    def local(q, k, v, scales, q_positions, kv_positions):
        return decode_attention(
            q, k, v, k_scale=scales, v_scale=scales, q_positions=q_positions,
            kv_positions=kv_positions, window=SLOTS - 1000,
        )  # fmt: skip

    def step(*args):
        return jax.shard_map(local, in_specs=(P(),) * len(args), out_specs=(P(),) * 2)(*args)

    return compile_for(step, args, mesh)


@pytest.mark.parametrize(
    ("target", "cache"),
    slow_but(
        [
            *((target, "bfloat16") for target in TARGETS),
            ("rtx-pro-6000:1", "int8"),
            *((target, "int8") for target in TARGETS[2:]),
            ("tpu7x:2x2x1", "float8_e4m3fn"),
        ],
        lambda case: case in [("rtx-pro-6000:1", "bfloat16"), ("v6e:2x2", "int8")],
    ),
)
def test_a_million_slots_compile_and_are_not_copied(target, cache):
    report = compiled(target, cache)
    assert report.kernels == 1
    assert report.temp_bytes < 16 * SLOTS, "neither keys, values nor scales are copied"


@pytest.mark.slow
def test_sixteen_queries_compile():
    assert compiled("v5p:2x2x1", "int8", queries=16).kernels == 1


def test_kv_heads_that_do_not_divide_the_lanes_take_xla_on_a_tpu():
    assert compiled("v6e:2x2", "bfloat16", heads=6, kv_heads=3).kernels == 0
