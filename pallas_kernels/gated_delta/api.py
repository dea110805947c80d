# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule: the public signature, and the checks before a backend.

A backend is a module with `local` and `scan`, and `tokens` of a chunk (see `xla.py`).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.dispatch import resolve
from pallas_kernels.gated_delta import chunks, reference
from pallas_kernels.gated_delta.chunks import Chunks

IMPLEMENTATIONS = ("reference", "xla", "triton", "mosaic_tpu")
BEST = {"gpu": "triton", "tpu": "mosaic_tpu"}
FEW = 16
"""Fewer tokens than that are no work for a kernel."""


def gated_delta(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N V"],
    log_decay: Float[Array, "B T N *H"],
    beta: Float[Array, "B T N"],
    *,
    state: Float[Array, "B N H V"] | None = None,
    starts: Bool[Array, "B T"] | None = None,
    pads: Bool[Array, "B T"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
    """Read and write a memory token by token; `(out, state after the last token)`.

    The state S `[H, V]` of a head, in order of tokens:

        S = exp(log_decay) * S                        a number a head, or one a channel of the key
        S = S + beta * k (v - S^T k)^T                what lies under k becomes v
        out = scale * S^T q

    Head `n` of v has key head `n // (N // K)`. The state and all sums are float32, float64 where
    the inputs are. Differentiable in all but `starts` and `pads`.

    Args:
      log_decay: `[B, T, N]` (gated delta rule) or `[B, T, N, H]` (Kimi delta attention),
        finite, 0 or less.
      beta: 0 to 1; keys of length one keep the state bounded then, nothing here makes them so.
      state: the state before the first token; default zeros.
      starts: a document begins with this token: it finds a state of zeros.
      pads: tokens that are none: the state passes by, their `out` is 0.
      scale: multiplies `out`; default `H ** -0.5`.
      implementation: "reference" (token by token), or products of matrices for chunks of 64
        tokens: "xla", "triton" (NVIDIA), "mosaic_tpu" (TPU); None takes the platform's kernel, and
        "xla" where there is none and for less than 16 tokens. Where q, k and v are bfloat16 the
        kernels round what they multiply to bfloat16, but for decays and the inverse.
    Raises:
      ValueError: shapes or dtypes that make no sense.
      NotImplementedError: a kernel that does not take these dtypes or this many channels (triton:
        128), naming one that does.

    Source: Yang et al., Gated Delta Networks (arXiv 2412.06464); Kimi Linear (arXiv 2510.26692).

    >>> q = k = jnp.ones((1, 100, 2, 8)) / 8**0.5
    >>> v, gate = jnp.ones((1, 100, 4, 16)), jnp.zeros((1, 100, 4))
    >>> out, state = gated_delta(q, k, v, gate, gate + 0.5)
    >>> out.shape, state.shape
    ((1, 100, 4, 16), (1, 4, 8, 16))
    """
    arrays = _checked(q, k, v, log_decay, beta, starts, pads)
    shape = (v.shape[0], *v.shape[2:3], k.shape[-1], v.shape[-1])
    acc = arrays[3].dtype
    state = jnp.zeros(shape, acc) if state is None else state
    if state.shape != shape:
        raise ValueError(f"state must be [B, N, H, V] = {list(shape)}; got {state.shape}")
    state, scale = state.astype(acc), _scale(scale, k)
    if implementation == "reference":
        q, k, v, log_decay, beta, begins = arrays
        out, state = reference.forward(q, k, v, log_decay, beta, begins, state, scale=scale)
    else:
        work = _chunks(arrays, scale, implementation)
        out, state = work.outputs(state, v.shape[1])
    return out.astype(v.dtype), state


def gated_delta_chunks(
    q, k, v, log_decay, beta, *, starts=None, pads=None, scale=None, implementation=None
) -> Chunks:
    """The part of `gated_delta` that needs no state, of the same arguments.

    `summary()` of it says what the tokens make of any state, `outputs(state)` what
    `gated_delta` gives: so that of a sequence in pieces each is worked at once.
    """
    arrays = _checked(q, k, v, log_decay, beta, starts, pads)
    return _chunks(arrays, _scale(scale, k), implementation)


def _chunks(arrays, scale, implementation) -> Chunks:
    if implementation is None and arrays[0].shape[1] < FEW:
        implementation = "xla"
    backend = resolve("gated_delta", implementation, IMPLEMENTATIONS, BEST)
    return chunks.prepare(backend, *arrays, scale=scale)


def _scale(scale, k):
    return k.shape[-1] ** -0.5 if scale is None else float(scale)


def _checked(q, k, v, log_decay, beta, starts, pads):
    """Gates in the dtype of sums, and pads made to change nothing."""
    _check(q, k, v, log_decay, beta, starts, pads)
    wide = any(x.dtype == jnp.float64 for x in (q, k, v))
    acc = jnp.float64 if wide else jnp.float32
    log_decay, beta = (x.astype(acc) for x in (log_decay, beta))
    starts = jnp.zeros(v.shape[:2], bool) if starts is None else starts
    if pads is not None:
        q, k, v, log_decay, beta = (
            jnp.where(pads.reshape(*pads.shape, *[1] * (x.ndim - 2)), jnp.zeros_like(x), x)
            for x in (q, k, v, log_decay, beta)
        )
        starts = starts & ~pads
    return q, k, v, log_decay, beta, starts


def _check(q, k, v, log_decay, beta, starts, pads):
    if not (q.ndim == k.ndim == v.ndim == 4 and q.shape == k.shape and 0 not in v.shape):
        raise ValueError(
            f"needs q and k [B, T, K, H] and v [B, T, N, V]; got {q.shape}, {k.shape}, {v.shape}"
        )
    if q.shape[:2] != v.shape[:2] or v.shape[2] % k.shape[2]:
        raise ValueError(
            "q, k and v must have the same B and T, and heads of v be a multiple of those of k; "
            f"got {k.shape} and {v.shape}"
        )
    gates = v.shape[:3], (*v.shape[:3], k.shape[-1])
    if log_decay.shape not in gates or beta.shape != gates[0]:
        raise ValueError(
            f"log_decay must be {gates[0]} or {gates[1]}, and beta {gates[0]}; "
            f"got {log_decay.shape} and {beta.shape}"
        )
    for name, x in (("starts", starts), ("pads", pads)):
        if x is not None and (x.shape != v.shape[:2] or x.dtype != jnp.bool_):
            raise ValueError(f"{name} must be bool {v.shape[:2]}; got {x.dtype} {x.shape}")
