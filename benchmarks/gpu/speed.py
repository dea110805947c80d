# SPDX-License-Identifier: Apache-2.0
"""Times the kernels: medians beside cuDNN, Pallas' own, `lax.ragged_dot` and the memory's limit.

The inputs of successive calls differ and together exceed the L2 cache; a figure is the median of
rounds. FLOPs are those of visible pairs, and 3.5 times as many with the backward pass.
"""

import dataclasses
import functools
import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import (
    decode_attention,
    flash_attention,
    grouped_matmul,
    quantize,
    quantize_cache,
)
from pallas_kernels.devices import find


@dataclasses.dataclass(frozen=True)
class Timing:
    """One problem: `make(key)` gives inputs, `contenders` functions of them; ours comes first."""

    case: str
    make: Callable
    contenders: dict[str, Callable]
    flops: float
    bytes: float = 0.0  # that must be read


def attention(tokens, heads, kv_heads, head_dim, *, batch=1, causal=True, window=None):
    shape = f"B{batch} T{tokens} N{heads}/{kv_heads} H{head_dim}"
    shape += (" causal" if causal else " full") + (f" window {window}" if window else "")
    pairs = tokens * (tokens + 1) / 2 if causal else tokens**2
    if window:
        pairs = window * tokens - window * (window - 1) / 2
    flops = 4.0 * batch * heads * head_dim * pairs

    def make(key):
        keys = jax.random.split(key, 4)
        counts = heads, kv_heads, kv_heads, heads
        return tuple(
            jax.random.normal(k, (batch, tokens, n, head_dim), jnp.bfloat16)
            for k, n in zip(keys, counts, strict=True)
        )

    def ours(q, k, v):
        return flash_attention(q, k, v, causal=causal, window=window, implementation="triton")[0]

    def cudnn(q, k, v):
        local = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=causal, local_window_size=local, implementation="cudnn"
        )

    def pallas_mha(q, k, v):
        if window is not None:
            raise NotImplementedError("no window")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from jax.experimental.pallas.ops.gpu.attention import mha
        k, v = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
        return mha(q, k, v, None, sm_scale=head_dim**-0.5, causal=causal)

    attends = {"ours": ours, "cudnn": cudnn, "pallas mha": pallas_mha}
    forward = {name: functools.partial(_forward, f) for name, f in attends.items()}
    both = {name: functools.partial(_both, f) for name, f in attends.items()}
    yield Timing(f"{shape} forward", make, forward, flops)
    yield Timing(f"{shape} forward+backward", make, both, 3.5 * flops)


def _forward(attend, q, k, v, g):
    return attend(q, k, v)


def _both(attend, q, k, v, g):
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(g)


def decode(slots, *, cache="bfloat16", batch=1, heads=64, kv_heads=8, head_dim=128, queries=1):
    def make(key):
        keys = jax.random.split(key, 3)
        q = jax.random.normal(keys[0], (batch, queries, heads, head_dim), jnp.bfloat16)
        shape = batch, slots, kv_heads, head_dim
        k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[1:])
        if cache == "bfloat16":
            return q, k, v, None, None
        (k, k_scale), (v, v_scale) = (quantize_cache(x, cache) for x in (k, v))
        return q, k, v, k_scale, v_scale

    def ours(q, k, v, k_scale, v_scale):
        now = jnp.full((batch, queries), slots - 1, jnp.int32)
        return decode_attention(
            q, k, v, q_positions=now, k_scale=k_scale, v_scale=v_scale, implementation="triton"
        )[0]

    def cudnn(q, k, v, k_scale, v_scale):
        if cache != "bfloat16":
            raise NotImplementedError("no quantized cache")
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

    def xla(q, k, v, k_scale, v_scale):
        now = jnp.full((batch, queries), slots - 1, jnp.int32)
        return decode_attention(
            q, k, v, q_positions=now, k_scale=k_scale, v_scale=v_scale, implementation="xla"
        )[0]

    per_head = 2 * head_dim if cache == "bfloat16" else head_dim + 4
    total = 2.0 * batch * slots * kv_heads * per_head
    flops = 4.0 * batch * queries * heads * head_dim * slots
    name = f"decode B{batch} T{queries} S{slots} N{heads}/{kv_heads} H{head_dim} {cache}"
    yield Timing(name, make, {"ours": ours, "cudnn": cudnn, "our xla": xla}, flops, total)


def grouped(tokens, *, experts=192, embed=4096, width=1536, weights="bfloat16"):
    """Hy3's expert layer; the groups differ in size as a router's do."""

    def make(key):
        keys = jax.random.split(key, 4)
        rows = tokens * experts
        lhs = jax.random.normal(keys[0], (rows, embed), jnp.bfloat16)
        rhs = jax.random.normal(keys[1], (experts, embed, width), jnp.bfloat16) * embed**-0.5
        choice = jax.random.choice(keys[2], experts, (rows,), p=_uneven(experts))
        sizes = jnp.bincount(choice, length=experts).astype(jnp.int32)
        dout = jax.random.normal(keys[3], (rows, width), jnp.bfloat16)
        return lhs, rhs if weights == "bfloat16" else quantize(rhs, weights), sizes, dout

    def ours(lhs, rhs, sizes, dout):
        return grouped_matmul(lhs, rhs, sizes, implementation="triton")

    def ragged(lhs, rhs, sizes, dout):
        if weights != "bfloat16":
            raise NotImplementedError("no quantized weights")
        return jax.lax.ragged_dot(lhs, rhs, sizes)

    def both(product, lhs, rhs, sizes, dout):
        out, pull = jax.vjp(lambda lhs, rhs: product(lhs, rhs, sizes, dout), lhs, rhs)
        return out, *pull(dout)

    flops = 2.0 * tokens * experts * embed * width
    bits = {"bfloat16": 16, "mxfp8": 8.25, "mxfp4": 4.25, "nvfp4": 4.5, "int4": 4.25}.get(
        weights, 8
    )
    total = experts * embed * width * bits / 8
    name = f"grouped {experts} x {embed} x {width}, {tokens} tokens an expert, {weights}"
    contenders: dict[str, Any] = {"ours": ours, "lax.ragged_dot": ragged}
    yield Timing(f"{name} forward", make, contenders, flops, total)
    if weights == "bfloat16":
        passes = {name: functools.partial(both, f) for name, f in contenders.items()}
        yield Timing(f"{name} forward+backward", make, passes, 3 * flops, 3 * total)


def _uneven(experts):
    weights = 1.0 + jnp.arange(experts) / experts
    return weights / weights.sum()


def timings(part: str, smoke: bool) -> list[Timing]:
    if smoke:
        small = {
            "time-attention": attention(64, 2, 1, 32, window=16),
            "time-decode": decode(64, heads=2, kv_heads=1, head_dim=32),
            "time-grouped": grouped(8, experts=3, embed=32, width=32),
        }
        return list(small[part])
    # what a goal is about comes first: a run that is cut off has it
    cases = {
        "time-attention": [
            attention(16384, 32, 32, 128),
            attention(4096, 32, 32, 64, batch=4),
            attention(16384, 16, 4, 256),
            attention(4096, 32, 8, 128, batch=4),
            attention(4096, 32, 8, 128, batch=4, causal=False),
            attention(1024, 16, 16, 128, batch=8),
            attention(32768, 16, 4, 128, window=4096),
            attention(65536, 16, 4, 128),
        ],
        "time-decode": [
            decode(131_072),
            decode(131_072, cache="int8"),
            decode(131_072, cache="float8_e4m3fn"),
            decode(8192, batch=16),
            decode(1 << 20, kv_heads=1, heads=8),
        ],
        "time-grouped": [
            grouped(512),
            grouped(8),
            grouped(8, weights="int8"),
            grouped(512, weights="float8_e4m3fn"),
            grouped(8, weights="mxfp8"),
            grouped(8, weights="mxfp4"),
            grouped(8, weights="nvfp4"),
            grouped(8, weights="int4"),
            grouped(512, weights="mxfp4"),
        ],
    }
    return [timing for case in cases[part] for timing in case]


def rows(part: str, smoke: bool):
    """Pairs of what a row is called and a function that gives it."""
    for timing in timings(part, smoke):
        for name in timing.contenders:
            yield (
                f"{timing.case} | {name}",
                functools.partial(measure, timing, name, 1 if smoke else 10),
            )


def measure(timing: Timing, contender: str, rounds: int) -> dict:
    chip = find(jax.devices()[0].device_kind)
    cache = chip.nvidia.l2_bytes if chip and chip.nvidia else 128 << 20
    inputs = jax.tree.leaves(jax.eval_shape(timing.make, jax.random.key(0)))
    nbytes = sum(x.size * x.dtype.itemsize for x in inputs)
    copies = max(2, min(16, math.ceil(3 * cache / nbytes))) if rounds > 1 else 2
    make = jax.jit(timing.make)
    sets = [make(jax.random.key(i)) for i in range(copies)]
    times = clock(jax.jit(timing.contenders[contender]), sets, rounds)
    median = statistics.median(times)
    row = {"case": timing.case, "contender": contender, "ms": median * 1e3}
    row |= {"ms_min": min(times) * 1e3, "ms_max": max(times) * 1e3}
    row |= {"tflops": timing.flops / median / 1e12, "gbytes": timing.bytes / median / 1e9}
    if chip:  # of the limit that is nearer
        least = max(timing.flops / chip.bf16_flops, timing.bytes / chip.hbm_bytes_per_second)
        row["of_peak"] = least / median
    return row


def clock(fn, sets, rounds: int) -> list[float]:
    """Seconds a call, one number a round. Inputs rotate, and together exceed the cache."""
    jax.block_until_ready(fn(*sets[0]))  # compiles
    start = time.perf_counter()
    jax.block_until_ready(fn(*sets[0]))
    once = time.perf_counter() - start
    rounds = max(1, min(rounds, int(4 / (once * len(sets)))))  # four seconds are enough
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for inputs in sets:
            result = fn(*inputs)
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - start) / len(sets))
    return seconds
