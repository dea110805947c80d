# SPDX-License-Identifier: Apache-2.0
"""Decode attention over a million slots becomes machine code for chips that are not there.

That no copy of the cache is made is a fact about the compiled program: its temporaries.
"""

import functools
import itertools

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
@pytest.mark.parametrize(
    ("target", "cache", "page"),
    [
        ("rtx-pro-6000:1", "bfloat16", 64),
        ("v6e:2x2", "int8", 512),
        ("tpu7x:2x2x1", "bfloat16", 256),
    ],
)
def test_pages_of_a_stack_are_read_where_they_lie(target, cache, page):
    target = parse_target(target)
    layers, rows = 8, 2
    count = SLOTS // layers // page
    keys = jax.ShapeDtypeStruct((layers, rows * count, page, 8, 128), cache)
    scales = None
    if cache == "int8":
        scales = jax.ShapeDtypeStruct((layers, rows * count, 8, page), jnp.float32)
    args = jax.ShapeDtypeStruct((rows, 1, 64, 128), "bfloat16"), keys, keys, scales
    args += tuple(
        jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, 1), (rows, count), ())
    )

    def local(q, k, v, scales, now, pages, layer):
        return decode_attention(
            q, k, v, k_scale=scales, v_scale=scales, q_positions=now, pages=pages, layer=layer,
        )  # fmt: skip

    def step(*args):
        return jax.shard_map(local, in_specs=(P(),) * len(args), out_specs=(P(),) * 2)(*args)

    report = compile_for(step, args, target.mesh(seq=target.size))
    assert report.kernels == 1
    assert report.temp_bytes < 2 * rows * count * page * 8 * 128 / 16, "of 8 bits, a layer's"


LAYERS, LAYER_SLOTS = 8, 1 << 15


def scanned(target, cache, read, *, kv_heads):
    """A step of two sequences through `LAYERS` layers, each of which writes and then reads."""
    target = parse_target(target)
    mesh = target.mesh(seq=target.size)
    stack = jax.ShapeDtypeStruct((LAYERS, 2, LAYER_SLOTS, kv_heads, 128), cache)
    scales = None
    if jnp.dtype(cache).itemsize == 1:
        scales = jax.ShapeDtypeStruct((LAYERS, 2, kv_heads, LAYER_SLOTS), jnp.float32)
    q = jax.ShapeDtypeStruct((2, 1, 16, 128), "bfloat16")
    args = stack, stack, q, scales, jax.ShapeDtypeStruct((2, 1), jnp.int32)

    def local(k, v, q, scales, now):
        def body(carry, layer):
            k, v, q = carry
            new = q[None, :, :, :kv_heads].astype(cache)
            at = layer, 0, now[0, 0], 0, 0
            k, v = (jax.lax.dynamic_update_slice(x, new, at) for x in (k, v))
            return (k, v, read(q, k, v, scales, now, layer)), None

        return jax.lax.scan(body, (k, v, q), jnp.arange(LAYERS))[0]

    def step(*args):
        return jax.shard_map(local, in_specs=(P(),) * len(args), out_specs=(P(),) * 3)(*args)

    return compile_for(jax.jit(step, donate_argnums=(0, 1)), args, mesh)


def by_index(q, k, v, scales, now, layer):
    return decode_attention(
        q, k, v, layer=layer, k_scale=scales, v_scale=scales, q_positions=now
    )[0]  # fmt: skip


def by_slice(q, *cache_and_now_and_layer):
    *cache, now, layer = cache_and_now_and_layer
    take = functools.partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
    k, v, scales = jax.tree.map(take, cache)
    return decode_attention(q, k, v, k_scale=scales, v_scale=scales, q_positions=now)[0]


@pytest.mark.parametrize(
    ("target", "cache", "kv_heads"),
    slow_but(
        itertools.product(("rtx-pro-6000:1", "v5p:2x2x1"), ("bfloat16", "int8"), (8, 1)),
        lambda case: case == ("rtx-pro-6000:1", "bfloat16", 8),
    ),
)
def test_a_scan_over_layers_copies_none(target, cache, kv_heads):
    """A layer's keys and values are, where the caller slices a stack: what `layer` is for."""
    keys_bytes = 2 * LAYER_SLOTS * kv_heads * 128 * jnp.dtype(cache).itemsize
    report = scanned(target, cache, by_index, kv_heads=kv_heads)
    assert report.kernels == LAYERS
    assert report.temp_bytes < keys_bytes / (16 if kv_heads == 8 else 2)
    if kv_heads == 8:
        assert scanned(target, cache, by_slice, kv_heads=kv_heads).temp_bytes > 2 * keys_bytes


@pytest.mark.slow
def test_sixteen_queries_compile():
    assert compiled("v5p:2x2x1", "int8", queries=16).kernels == 1


def test_kv_heads_that_do_not_divide_the_lanes_take_xla_on_a_tpu():
    assert compiled("v6e:2x2", "bfloat16", heads=6, kv_heads=3).kernels == 0
