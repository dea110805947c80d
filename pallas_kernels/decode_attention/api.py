# SPDX-License-Identifier: Apache-2.0
"""Decode attention: the public signature, the cache's quantization, the checks before a backend.

A backend is a module with `forward` (see `reference.py`) on checked arguments; it returns float32.
It never sees a sink: sinks enter the softmax's denominator once, after the last merge.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.dispatch import resolve
from pallas_kernels.flash_attention.api import (
    apply_sinks,
    check_shapes,
    default_positions,
    hide_pads,
)
from pallas_kernels.flash_attention.mask import Mask
from pallas_kernels.number_formats import LARGEST

IMPLEMENTATIONS = ("reference", "xla", "triton", "mosaic_tpu")
BEST = {"cpu": "xla", "gpu": "triton", "tpu": "mosaic_tpu"}
MAX_QUERIES = 16
"""Query rows a sequence. Beyond, a row of the cache is read for enough work: `flash_attention`."""


def decode_attention(
    q: Float[Array, "B T N H"],
    k: Num[Array, "*L B S K H"],
    v: Num[Array, "*L B S K V"],
    *,
    layer: Int[Array, ""] | int | None = None,
    pages: Int[Array, "B M"] | None = None,
    q_positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"] | None = None,
    k_scale: Float[Array, "*L B K S"] | None = None,
    v_scale: Float[Array, "*L B K S"] | None = None,
    window: int | None = None,
    sinks: Float[Array, "N"] | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Exact causal attention of 1 to 16 queries a sequence over a cache; `(out, lse)`.

    The cache is read where it lies and once: no slot is copied, converted or padded in memory
    (but see Raises), and a block of slots that no query sees is not read. What is left is dealt to
    several workers, whose results are merged. `lse` is the natural log of the sum of exponentials
    (sink included), float32; float64 in, float64 out (reference and xla). A row that sees nothing
    gives `out = 0, lse = -inf`. Query head `n` reads KV head `n // (N // K)`.

    Args:
      k, v: of q's dtype, of another float dtype (converted a block at a time), or quantized:
        int8 and float8_e4m3fn, with scales from `quantize_cache`.
      layer: which of L layers to read, where the cache is a stack of them, axis L in front of k, v
        and the scales. For a scan over layers: `k[layer]` in front of a kernel would copy the
        layer at every step. A traced one beyond the stack reads the nearest.
      pages: where each sequence's slots lie in a pool: k, v are `[*L, P, page, K, H]`, scales
        `[*L, P, K, page]`, and slot s of sequence b is slot `s % page` of page `pages[b, s //
        page]`; S is `M * page`. Sequences may share pages. A page where no query sees a slot is
        not read; numbers beyond the pool stand for the nearest page.
      q_positions, kv_positions: global position of each token. A slot belongs to no position:
        `kv_positions` (default `0..S-1`) says which token lies there, in any order;
        `PAD_POSITION` marks an empty slot, and a pad among the queries.
      k_scale, v_scale: what the stored values of a token's head are multiplied by; both or neither.
        Slots come last: a TPU pads the last axis to 128.
      window: number of positions a query sees, its own included.
      sinks: a logit per head that takes part in the softmax and brings no value; `-inf` where a
        head has none.
      soft_cap: scores become `soft_cap * tanh(score / soft_cap)`.
      scale: multiplies `q @ k`; default `H ** -0.5`.
      out_dtype: default q's; float32 for partial results that are yet to be merged.
      implementation: "reference", "xla", "triton", "mosaic_tpu"; None takes the platform's best
        (on a TPU "xla" where the number of KV heads does not divide 128).
    Raises:
      ValueError: shapes, dtypes or options that make no sense.
      NotImplementedError: the chosen implementation cannot; the message names those that can.
        And in a gradient: there is none, `flash_attention` has one.

    "triton" copies a cache whose head dim is no power of two, "mosaic_tpu" one of under 128 slots,
    of a head dim that 128 does not divide or of two KV heads in 8 bits; of a stack the layer alone.
    So does "triton" from an 8-bit stack of 2^31 to 2^32 entries.
    Source: split KV: Flash-Decoding (Dao et al., 2023, crfm.stanford.edu/2023/10/12/flashdecoding).

    >>> q = jax.random.normal(jax.random.key(0), (1, 1, 8, 64))
    >>> k, k_scale = quantize_cache(jax.random.normal(jax.random.key(1), (1, 256, 1, 64)), "int8")
    >>> now = jnp.full((1, 1), 255, jnp.int32)
    >>> out, lse = decode_attention(q, k, k, k_scale=k_scale, v_scale=k_scale, q_positions=now)
    >>> out.shape, lse.shape
    ((1, 1, 8, 64), (1, 1, 8))
    """
    cache = k, v, k_scale, v_scale
    shapes = _of_sequences(_of_layer(cache, layer), q, pages)
    if kv_positions is None:
        kv_positions = default_positions(shapes[0])
    check(q, *shapes, q_positions, kv_positions, sinks, soft_cap)
    if layer is not None:
        layer = jnp.clip(jnp.asarray(layer, jnp.int32), 0, k.shape[0] - 1)
    if pages is not None:
        pages = jnp.clip(pages, 0, k.shape[-4] - 1)
    options = dict(
        mask=Mask(window=window),
        soft_cap=soft_cap,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
    )
    best = BEST if 128 % k.shape[-2] == 0 else BEST | {"tpu": "xla"}
    backend = resolve("decode_attention", implementation, IMPLEMENTATIONS, best)
    arrays = q, cache, layer, pages, hide_pads(q_positions), kv_positions
    out, lse = _attend(backend, tuple(options.items()), *arrays)
    if sinks is not None:
        out, lse = apply_sinks(out, lse, sinks)
    return out.astype(q.dtype if out_dtype is None else out_dtype), lse


def quantize_cache(
    x: Float[Array, "B S K H"], dtype: DTypeLike
) -> tuple[Num[Array, "B S K H"], Float[Array, "B K S"]]:
    """Quantize keys or values to int8 or float8_e4m3fn, with a float32 scale for each token's head.

    `x` is about `values * scales.swapaxes(1, 2)[..., None]`. The scale is the greatest magnitude
    over the head dim divided by 127 (int8) or 448 (e4m3), so nothing saturates. With `a` that
    magnitude, int8 is off by at most `a / 254` an entry; e4m3 by a sixteenth of the entry, or
    `a / 458752` where that is more: better where a few entries are far larger than the rest,
    worse elsewhere. Of a head that is not finite the scale is not, nor then what is read.

    Raises:
      ValueError: another dtype.

    Raises:
      ValueError: another dtype.
    """
    name = jnp.dtype(dtype).name
    if name not in LARGEST:
        raise ValueError(f"dtype must be one of {tuple(LARGEST)}; got {name}")
    most = LARGEST[name]
    x = x.astype(jnp.float32)
    greatest = jnp.max(jnp.abs(x), axis=-1)
    scales = jnp.where(greatest == 0, 1.0, greatest / most)  # of NaN: NaN
    values = jnp.clip(x / scales[..., None], -most, most)
    return (jnp.round(values) if name == "int8" else values).astype(dtype), scales.swapaxes(1, 2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attend(backend, options, *arrays):
    return backend.forward(*arrays, **dict(options))


@_attend.defjvp
def _no_gradient(backend, options, primals, tangents):
    raise NotImplementedError("decode_attention has no gradient; use flash_attention")


def check(q, k, v, k_scale, v_scale, q_positions, kv_positions, sinks, soft_cap):
    """Raise ValueError for arguments that no backend could make sense of."""
    check_shapes(q, k, v)
    if not 1 <= q.shape[1] <= MAX_QUERIES:
        raise ValueError(
            f"decode_attention takes 1 to {MAX_QUERIES} queries a sequence; got {q.shape[1]}; "
            "use flash_attention for more"
        )
    _check_dtypes(q, k, v, k_scale, v_scale)
    for name, x, tokens in (("q_positions", q_positions, q), ("kv_positions", kv_positions, k)):
        if x.shape != tokens.shape[:2] or x.dtype != jnp.int32:
            raise ValueError(f"{name} must be int32 {tokens.shape[:2]}; got {x.dtype} {x.shape}")
    if sinks is not None and sinks.shape != (q.shape[2],):
        raise ValueError(f"sinks must be one logit a query head, [{q.shape[2]}]; got {sinks.shape}")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap must be positive or None; got {soft_cap}")


def _of_layer(cache, layer):
    """Keys, values and scales as they are, or of stacks the shapes of a layer.

    Raises:
      ValueError: a layer and arrays that are no stack of it, or the other way round.
    """
    shapes = [x.shape for x in cache if x is not None]
    ranks = [4, 4, 3, 3] if layer is None else [5, 5, 4, 4]
    if [len(shape) for shape in shapes] != ranks[: len(shapes)]:
        raise ValueError(
            "k and v must be [B, S, K, H] and scales [B, K, S], or with layer=... each a stack "
            f"[L, ...]; got {'no layer' if layer is None else 'a layer'} and {shapes}"
        )
    if layer is None:
        return cache
    if jnp.ndim(layer) or not jnp.issubdtype(jnp.result_type(layer), jnp.integer):
        raise ValueError(f"layer must be one integer; got {jnp.result_type(layer)} {layer}")
    layers = {shape[0] for shape in shapes}
    if len(layers) > 1 or (isinstance(layer, int) and not 0 <= layer < min(layers)):
        raise ValueError(
            "layer must be below L, of which k, v and scales have one; "
            f"got layer={layer} and {shapes}"
        )
    return [x if x is None else jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in cache]


def _of_sequences(cache, q, pages) -> tuple[Any, Any, Any, Any]:
    """Keys, values and scales as they are, or the shapes of what sequences have of a pool.

    Raises:
      ValueError: pages that are no table, or pools of several sizes.
    """
    if pages is None:
        return tuple(cache)
    if pages.ndim != 2 or pages.shape[0] != q.shape[0] or pages.dtype != jnp.int32:
        raise ValueError(
            f"pages must be int32 [B, pages of a sequence], B={q.shape[0]}; got {pages.dtype} "
            f"{pages.shape}"
        )
    sizes = {(x.shape[0], x.shape[1 if x.ndim == 4 else 2]) for x in cache if x is not None}
    if len(sizes) > 1:
        raise ValueError(f"k, v and scales must have as many pages of one size; got {sizes}")
    (_, page), (batch, count) = sizes.pop(), pages.shape
    k, v, k_scale, v_scale = cache

    def wide(x):
        return jax.ShapeDtypeStruct((batch, count * page, *x.shape[2:]), x.dtype)

    def long(x):
        return x if x is None else jax.ShapeDtypeStruct((batch, x.shape[1], count * page), x.dtype)

    return wide(k), wide(v), long(k_scale), long(v_scale)


def _check_dtypes(q, k, v, k_scale, v_scale):
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q must be floating; got {q.dtype}")
    floating = jnp.issubdtype(k.dtype, jnp.floating)
    if k.dtype != v.dtype or not (floating or k.dtype.name in LARGEST):
        raise ValueError(
            f"k and v must share one dtype, floating or of {tuple(LARGEST)}; "
            f"got {k.dtype} and {v.dtype}"
        )
    if (k_scale is None) != (v_scale is None) or (k_scale is None and k.dtype.name in LARGEST):
        raise ValueError(
            f"give both k_scale and v_scale, or for a cache of floats neither; k, v are {k.dtype}, "
            f"and of the scales {sum(x is not None for x in (k_scale, v_scale))} came"
        )
    shape = k.shape[0], k.shape[2], k.shape[1]
    for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
        if x is not None and (x.shape != shape or x.dtype not in (jnp.float32, jnp.bfloat16)):
            raise ValueError(
                f"{name} must be float32 or bfloat16 [B, K, S], {shape}; got {x.dtype} {x.shape}"
            )
