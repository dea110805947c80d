# SPDX-License-Identifier: Apache-2.0
"""Flash attention: the public signature, the gradient rule, and the checks before a backend runs.

A backend is a module with `forward` and `backward` (see `reference.py`) on checked arguments. It
never sees a sink: sinks enter the softmax's denominator once, after the last merge (`apply_sinks`).
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import resolve
from pallas_kernels.flash_attention.mask import NO_POSITION, PAD_POSITION, Mask

IMPLEMENTATIONS = ("reference", "xla", "triton", "mosaic_tpu")
BEST = {"cpu": "xla", "gpu": "triton", "tpu": "mosaic_tpu"}
RESULT = "attention"
"""The name of `out` and `lse` in policies of `jax.checkpoint`. With both saved no kernel of the
forward pass runs again."""


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    q_positions: Int[Array, "B T"] | None = None,
    kv_positions: Int[Array, "B S"] | None = None,
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: Float[Array, "N"] | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    carry: tuple[Float[Array, "B T N V"], Float[Array, "B T N"]] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Exact softmax attention that never holds the score matrix; `(out, lse)`.

    `lse` is the natural log of the sum of exponentials (sink included), float32; float64 in,
    float64 out (reference and xla). A row that sees nothing gives `out = 0, lse = -inf`. `N` is
    a multiple of `K` and query head `n` reads KV head `n // (N // K)`; nothing is repeated.

    Args:
      q_positions, kv_positions: global position of each token; default `0..T-1`, `0..S-1`.
        `PAD_POSITION` marks a pad or an empty slot. Numbers alone mask: where they start anew for
        each packed document, segment ids must keep documents apart.
      q_segment_ids, kv_segment_ids: tokens see only their own segment; both or neither.
      causal: a key is visible when its position is not after the query's.
      window: number of positions a query sees, its own included.
      sinks: a logit per head that takes part in the softmax and brings no value; `-inf` where a
        head has none. The gradient of an infinite sink is 0.
      soft_cap: scores become `soft_cap * tanh(score / soft_cap)`.
      scale: multiplies `q @ k`; default `H ** -0.5`.
      carry: `(out, lse)` over other keys, which the result includes: the kernel starts from it.
        `(0, -inf)` where there were none. It must not include the sinks.
      out_dtype: of `out`; default q's. float32 keeps a partial result unrounded.
      implementation: "reference", "xla", "triton", "mosaic_tpu"; None takes the platform's best.
    Raises:
      ValueError: shapes, dtypes or options that make no sense.
      NotImplementedError: the chosen implementation cannot; the message names those that can.

    Differentiable in `q`, `k`, `v`, `sinks` and `carry`, through both results. `V`, the width of
    a value, may differ from `H`.

    Infinities: `-inf` is allowed in sinks and in the `lse` of a carry. A row that sees nothing has
    no gradient but that of its `lse`, to a finite sink. A sink of `+inf` takes all, `out = 0` and
    `lse = inf`; one of NaN makes its head NaN. q, k, v and `q @ k` are to be finite.
    Source: Dao et al., FlashAttention (arXiv 2205.14135, 2307.08691).

    >>> x = jax.random.normal(jax.random.key(0), (1, 128, 4, 64))
    >>> out, lse = flash_attention(x, x[:, :, :2], x[:, :, :2], window=32)
    >>> out.shape, lse.shape
    ((1, 128, 4, 64), (1, 128, 4))
    """
    check(q, k, v, q_positions, kv_positions, q_segment_ids, kv_segment_ids, sinks, soft_cap)
    check_carry(q, v, carry)
    options = dict(
        mask=Mask(causal=causal, window=window),
        soft_cap=soft_cap,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
    )
    if q_positions is None:
        q_positions = default_positions(q)
    if kv_positions is None:
        kv_positions = default_positions(k)
    backend = resolve("flash_attention", implementation, IMPLEMENTATIONS, BEST)
    arrays = (q_positions, kv_positions, q_segment_ids, kv_segment_ids)
    dtype = jnp.dtype(q.dtype if out_dtype is None else out_dtype)
    out, lse = _attend(backend, dtype, tuple(options.items()), q, k, v, carry, *arrays)
    return (out, lse) if sinks is None else apply_sinks(out, lse, sinks)


def attention_forward(
    q,
    k,
    v,
    q_pos,
    kv_pos,
    q_seg,
    kv_seg,
    *,
    mask,
    soft_cap,
    scale,
    carry=None,
    out_dtype=None,
    implementation=None,
):
    """Run the forward pass alone, for callers that write their own gradient (a ring).

    Takes the arrays of `flash_attention`, positions included. `out_dtype` (default q's) keeps
    partial results in float32.
    """
    backend = resolve("flash_attention", implementation, IMPLEMENTATIONS, BEST)
    return backend.forward(
        q,
        k,
        v,
        hide_pads(q_pos),
        kv_pos,
        q_seg,
        kv_seg,
        mask=mask,
        soft_cap=soft_cap,
        scale=scale,
        carry=carry,
        out_dtype=q.dtype if out_dtype is None else out_dtype,
    )


def attention_backward(
    q,
    k,
    v,
    q_pos,
    kv_pos,
    q_seg,
    kv_seg,
    lse,
    dout,
    delta,
    *,
    mask,
    soft_cap,
    scale,
    implementation=None,
):
    """Compute `(dq, dk, dv)` in float32 (float64 for float64) from the saved `lse` of whole rows.

    `delta[b,t,n] = sum_h(dout * out) - dlse`. With the lse of a row's full softmax and only part
    of its keys this is that part's exact contribution, which is what a ring adds up.
    """
    backend = resolve("flash_attention", implementation, IMPLEMENTATIONS, BEST)
    return backend.backward(
        q,
        k,
        v,
        hide_pads(q_pos),
        kv_pos,
        q_seg,
        kv_seg,
        lse,
        dout,
        delta,
        mask=mask,
        soft_cap=soft_cap,
        scale=scale,
    )


def apply_sinks(out, lse, sinks):
    """Let each head's sink into the denominator of finished rows, once, after the last merge.

    `-inf` is no sink, and `+inf` leaves `out = 0, lse = inf`; their gradient is 0.
    """
    sinks = sinks.astype(lse.dtype)
    # beside such a sink a row's own sum is nothing; inf - inf would be NaN, in gradients too
    alone = jnp.isinf(sinks) & (lse <= sinks)
    lse = jnp.where(alone, 0.0, lse)
    kept = jax.nn.sigmoid(lse - sinks)[..., None]
    total = jnp.where(alone, jax.lax.stop_gradient(sinks), jnp.logaddexp(lse, sinks))
    return (out.astype(lse.dtype) * kept).astype(out.dtype), total


def named(out, lse):
    """Give `(out, lse)` of a forward pass the name `RESULT`."""
    return checkpoint_name(out, RESULT), checkpoint_name(lse, RESULT)


def row_delta(out, dout, dlse):
    """The row constant of the softmax gradient."""
    acc = dlse.dtype
    return jnp.sum(out.astype(acc) * dout.astype(acc), axis=-1) - dlse


def default_positions(x):
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])


def hide_pads(q_positions):
    return jnp.where(q_positions == PAD_POSITION, NO_POSITION, q_positions)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(backend, out_dtype, options, q, k, v, carry, q_pos, *ids):
    arrays = q, k, v, hide_pads(q_pos), *ids
    return backend.forward(*arrays, carry=carry, out_dtype=out_dtype, **dict(options))


def _attend_fwd(backend, out_dtype, options, q, k, v, carry, *ids):
    out, lse = named(*_attend(backend, out_dtype, options, q, k, v, carry, *ids))
    return (out, lse), (q, k, v, carry, ids, out, lse)


def _attend_bwd(backend, out_dtype, options, saved, grads):
    q, k, v, carry, (q_pos, *ids), out, lse = saved
    dout, dlse = grads
    delta = row_delta(out, dout, dlse)
    arrays = q, k, v, hide_pads(q_pos), *ids, lse, dout, delta
    dq, dk, dv = backend.backward(*arrays, **dict(options))
    dcarry = None if carry is None else _carry_gradient(carry, lse, dout, delta)
    none = None, None, None, None
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dcarry, *none


def _carry_gradient(carry, total, dout, delta):
    """The gradient of a carry, which counts like one more key of score `lse` and value `out`."""
    out, lse = carry
    p = jnp.where(jnp.isneginf(lse), 0.0, jnp.exp(lse - total))
    dout = dout.astype(p.dtype)
    score = jnp.sum(dout * out.astype(p.dtype), axis=-1) - delta
    return (p[..., None] * dout).astype(out.dtype), (p * score).astype(lse.dtype)


_attend.defvjp(_attend_fwd, _attend_bwd)


def check(q, k, v, q_positions, kv_positions, q_segment_ids, kv_segment_ids, sinks, soft_cap):
    """Raise ValueError for arguments that no backend could make sense of."""
    check_shapes(q, k, v)
    if not (q.dtype == k.dtype == v.dtype) or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(
            f"q, k, v must share one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    for name, x, tokens in (
        ("q_positions", q_positions, q),
        ("kv_positions", kv_positions, k),
        ("q_segment_ids", q_segment_ids, q),
        ("kv_segment_ids", kv_segment_ids, k),
    ):
        if x is not None and (x.shape != tokens.shape[:2] or x.dtype != jnp.int32):
            raise ValueError(f"{name} must be int32 {tokens.shape[:2]}; got {x.dtype} {x.shape}")
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise ValueError("give both q_segment_ids and kv_segment_ids, or neither; got one")
    if sinks is not None and sinks.shape != (q.shape[2],):
        raise ValueError(f"sinks must be one logit a query head, [{q.shape[2]}]; got {sinks.shape}")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap must be positive or None; got {soft_cap}")


def check_shapes(q, k, v):
    """Raise ValueError for q, k and v that do not fit each other."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"q, k, v must be [batch, tokens, heads, head_dim]; got {q.shape}, {k.shape}, {v.shape}"
        )
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q [B,T,N,H], k [B,S,K,H] and v [B,S,K,V] must agree in B, S, K and H; "
            f"got {q.shape}, {k.shape}, {v.shape}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"query heads must be a multiple of KV heads; got {q.shape[2]} and {k.shape[2]}"
        )


def check_carry(q, v, carry):
    """Raise ValueError for a carry that is no `(out, lse)` of these queries and values."""
    if carry is None:
        return
    shapes = (*q.shape[:3], v.shape[3]), q.shape[:3]
    if len(carry) != 2 or tuple(x.shape for x in carry) != shapes:
        raise ValueError(
            f"carry must be (out, lse) of shapes {shapes}; got {[x.shape for x in carry]}"
        )
