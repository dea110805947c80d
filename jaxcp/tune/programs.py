# SPDX-License-Identifier: Apache-2.0
"""The programs that stand for an operation when it is tuned or its machine code is read.

Each is `(fn, args)` with `jax.ShapeDtypeStruct`s for arguments; every option that a model may turn
on and that costs something in the inner loop (positions, segment ids, scales) is on.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.dispatch import resolve
from pallas_kernels.flash_attention import Mask, attention_backward, flash_attention
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from pallas_kernels.grouped_matmul.api import BEST, IMPLEMENTATIONS

FLASH = dict(tokens=16384, heads=2, kv_heads=1, head_dim=128)
DECODE = dict(slots=65536, heads=64, kv_heads=8, head_dim=128)  # Hy3, one query
EXPERTS = dict(experts=192, embed=4096, width=1536, tokens=512)  # Hy3; tokens of one expert

array = jax.ShapeDtypeStruct


def flash_forward(implementation=None, dtype=jnp.bfloat16, *, tokens, heads, kv_heads, head_dim):
    """Causal attention of a sequence to itself, `head_dim` wide."""

    def run(q, k, v, positions, segments):
        return flash_attention(
            q, k, v, q_positions=positions, kv_positions=positions, q_segment_ids=segments,
            kv_segment_ids=segments, implementation=implementation,
        )  # fmt: skip

    q, kv = (array((1, tokens, n, head_dim), dtype) for n in (heads, kv_heads))
    ids = array((1, tokens), jnp.int32)
    return run, (q, kv, kv, ids, ids)


def flash_backward(
    implementation=None,
    dtype=jnp.bfloat16,
    *,
    tokens,
    heads,
    kv_heads,
    head_dim,
    wanted=("dq", "dk", "dv"),
):
    """Gradients of `flash_forward`; the compiler drops a kernel with no result in `wanted`."""

    def run(q, k, v, positions, segments, lse, dout, delta):
        gradients = attention_backward(
            q, k, v, positions, positions, segments, segments, lse, dout, delta, mask=Mask(),
            soft_cap=None, scale=head_dim**-0.5, implementation=implementation,
        )  # fmt: skip
        return [x for name, x in zip(("dq", "dk", "dv"), gradients, strict=True) if name in wanted]

    q, kv = (array((1, tokens, n, head_dim), dtype) for n in (heads, kv_heads))
    row, ids = array((1, tokens, heads), jnp.float32), array((1, tokens), jnp.int32)
    return run, (q, kv, kv, ids, ids, row, q, row)


def decode(
    implementation=None,
    dtype=jnp.bfloat16,
    *,
    cache=None,
    slots,
    heads,
    kv_heads,
    head_dim,
    page=None,
):
    """One query a head against a cache, whole or in pages, of type `cache` (default `dtype`)."""
    cache, dtype = jnp.dtype(dtype if cache is None else cache), jnp.dtype(dtype)

    def run(q, k, v, q_positions, kv_positions, *rest):
        *pages, k_scale, v_scale = rest if quantized else (*rest, None, None)
        return decode_attention(
            q, k, v, q_positions=q_positions, kv_positions=kv_positions,
            pages=pages[0] if pages else None, k_scale=k_scale, v_scale=v_scale,
            implementation=implementation,
        )  # fmt: skip

    quantized = cache != dtype
    count, size = (1, slots) if page is None else (slots // page, page)
    kv = array((count, size, kv_heads, head_dim), cache)
    ids = [array((1, n), jnp.int32) for n in (1, slots)]
    pages = [] if page is None else [array((1, count), jnp.int32)]
    scales = [array((count, kv_heads, size), jnp.float32)] * 2 * quantized
    return run, (array((1, 1, heads, head_dim), dtype), kv, kv, *ids, *pages, *scales)


def matmul(implementation=None, dtype=jnp.bfloat16, *, experts, embed, width, tokens):
    """Rows of `tokens` an expert times its matrix."""

    def run(lhs, rhs, sizes):
        return grouped_matmul(lhs, rhs, sizes, implementation=implementation)

    return run, _experts(dtype, experts, embed, width, tokens)


def swiglu(implementation=None, dtype=jnp.bfloat16, *, experts, embed, width, tokens):
    """Rows times two matrices of each expert, gated."""

    def run(lhs, rhs, sizes):
        return grouped_swiglu(lhs, rhs, rhs, sizes, implementation=implementation)

    return run, _experts(dtype, experts, embed, width, tokens)


def outer(implementation=None, dtype=jnp.bfloat16, *, experts, embed, width, tokens):
    """The gradient of each expert's matrix."""
    backend = resolve("grouped_matmul", implementation, IMPLEMENTATIONS, BEST)

    def run(lhs, dout, sizes):
        return backend.outer(lhs, dout, sizes, dtype)

    lhs, _, sizes = _experts(dtype, experts, embed, width, tokens)
    return run, (lhs, array((experts * tokens, width), dtype), sizes)


def _experts(dtype, experts, embed, width, tokens):
    return (
        array((experts * tokens, embed), dtype),
        array((experts, embed, width), dtype),
        array((experts,), jnp.int32),
    )
