# SPDX-License-Identifier: Apache-2.0
"""Ring attention: the public signature, the gradient rule, and the checks before a backend runs."""

import functools
from types import ModuleType

import jax
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import resolve, target_platform
from pallas_kernels.flash_attention import Mask, check, flash_attention, named, row_delta
from pallas_kernels.flash_attention.api import IMPLEMENTATIONS as FLASH
from pallas_kernels.flash_attention.api import hide_pads

IMPLEMENTATIONS = ("mosaic_tpu",)
INSTEAD = "use a ring of ppermute around flash_attention: jaxcp.Ring()"


def ring_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    axis_name: str | tuple[str, ...],
    q_positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    bidirectional: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Local queries over the keys of all n devices along `axis_name`; `(out, lse)`.

    To be called inside `shard_map(..., check_vma=False)` on local shards, whose lengths are the
    same everywhere. Differentiable in q, k and v, through both results.

    A device sends, forward, n - 1 times its K and V, `2 (n-1) S K H` elements of their type for
    equal head dims; backward the same again, and n - 1 times dK and dV in float32. Positions and
    segment ids, 4 bytes each a token and device, are gathered before. It holds two shards of K and
    V beside its own, backward also three of dK and dV in float32.

    Args:
      axis_name: the mesh axis the ring goes along, or several, the outer one first.
      bidirectional: every other chunk of keys goes the other way round: the same bytes, half on
        each direction of a link.
      implementation: "mosaic_tpu"; None takes it on TPUs. It is interpreted on a CPU, if named.
      Others as in `flash_attention`.
    Raises:
      ValueError: shapes, dtypes or options that make no sense.
      NotImplementedError: a platform without remote DMA, float64, head dims above 512.

    Source: Liu et al., Ring Attention (arXiv 2310.01889).

    >>> def local(q, k, v, positions):
    ...     return ring_attention(
    ...         q, k, v, axis_name="seq", q_positions=positions, kv_positions=positions
    ...     )
    >>> by_tokens = jax.sharding.PartitionSpec(None, "seq")
    >>> run = jax.shard_map(local, in_specs=by_tokens, out_specs=by_tokens, check_vma=False)
    """
    backend = _backend(implementation)
    check(q, k, v, q_positions, kv_positions, q_segment_ids, kv_segment_ids, None, soft_cap)
    widest = max(q.shape[3], v.shape[3])
    if q.dtype.name not in ("float32", "bfloat16", "float16") or widest > 512:
        raise NotImplementedError(
            "ring_attention: float32, bfloat16 or float16, and head dims up to 512; got "
            f"{q.dtype} and head dims {q.shape[3]} and {v.shape[3]}; {INSTEAD}"
        )
    if lax.axis_size(axis_name) == 1:
        return flash_attention(
            q, k, v,
            q_positions=q_positions, kv_positions=kv_positions,
            q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids,
            causal=causal, window=window, soft_cap=soft_cap, scale=scale,
            implementation=implementation,
        )  # fmt: skip
    options = dict(
        axis_name=axis_name,
        bidirectional=bidirectional,
        mask=Mask(causal=causal, window=window),
        soft_cap=soft_cap,
        scale=q.shape[3] ** -0.5 if scale is None else float(scale),
    )
    ids = hide_pads(q_positions), kv_positions, q_segment_ids, kv_segment_ids
    return _attend(backend, tuple(options.items()), q, k, v, *ids)


def _backend(implementation: str | None) -> ModuleType:
    platform = target_platform()
    elsewhere = implementation in FLASH and implementation not in IMPLEMENTATIONS
    unnamed = implementation is None and platform != "tpu"
    if elsewhere or unnamed or platform == "gpu":
        raise NotImplementedError(
            "ring_attention needs the remote DMA of TPUs, implementation='mosaic_tpu' (interpreted "
            f"on a CPU, if named); got implementation={implementation!r} on {platform}; {INSTEAD}"
        )
    return resolve("ring_attention", implementation, IMPLEMENTATIONS, {"tpu": "mosaic_tpu"})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(backend, options, q, k, v, *ids):
    out, lse = backend.forward(q, k, v, *ids, **dict(options))
    return out.astype(q.dtype), lse


def _attend_fwd(backend, options, q, k, v, *ids):
    out, lse = named(*_attend(backend, options, q, k, v, *ids))
    return (out, lse), (q, k, v, ids, out, lse)


def _attend_bwd(backend, options, saved, grads):
    q, k, v, ids, out, lse = saved
    dout, dlse = grads
    delta = row_delta(out, dout, dlse)
    dq, dk, dv = backend.backward(q, k, v, *ids, lse, dout, delta, **dict(options))
    none = None, None, None, None
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), *none


_attend.defvjp(_attend_fwd, _attend_bwd)
