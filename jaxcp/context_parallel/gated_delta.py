# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule, and short convolutions, over sequences that are sharded.

A shard works the chunks of its pieces at once, sends what they sum up to, and then reads from the
states that its pieces start from. Communication a device and call: see `recurrent`; of the rule
`shards * pieces * B * N * H * (H + V)` float32, of a convolution `shards * pieces * B * (taps - 1)`
inputs and their numbers, and with segment ids theirs. Of every piece's end three integers travel.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxcp.context_parallel.recurrent import Pieces
from jaxcp.context_parallel.shards import on_shards
from jaxcp.layout import Layout
from pallas_kernels import PAD_POSITION
from pallas_kernels.gated_delta import gated_delta, gated_delta_chunks

AXIS = "seq"
NOBODY = -(2**31) + 1
"""The segment of pads."""
TOKENS, HEADS, WIDE = P("data", AXIS), P("data", AXIS, "model"), P("data", AXIS, "model", None)
"""Mesh axes of `[B, T]`, `[B, T, N]` and `[B, T, N, H]`."""


def context_parallel_gated_delta(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N V"],
    log_decay: Float[Array, "B T N *H"],
    beta: Float[Array, "B T N"],
    positions: Int[Array, "B T"],
    *,
    layout: Layout,
    length: int | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N V"]:
    """`gated_delta` of rows that lie over `seq` in the places of `layout`; zeros before each row.

    Pads (`PAD_POSITION`) change nothing. A document begins where `segment_ids` change from one
    token to the next; pads may lie between documents, and where one lies inside, the rest of its
    row is NaN: a convolution would see it.

    Args:
      length: tokens of a row before the layout filled it up; needed on more than one shard.
    Raises:
      ValueError: no `length`.
      NotImplementedError: a layout that scatters consecutive tokens.
    """
    local = functools.partial(_delta, layout=layout, length=checked_length(length))
    decay = HEADS if log_decay.ndim == 3 else WIDE
    run = on_shards(local, (WIDE, WIDE, WIDE, decay, HEADS, TOKENS, TOKENS), WIDE)
    return run(q, k, v, log_decay, beta, positions, segment_ids)


def context_parallel_convolution(
    inputs: tuple[Float[Array, "B T N H"], ...],
    taps: tuple[Float[Array, "W N H"], ...],
    positions: Int[Array, "B T"],
    *,
    layout: Layout,
    length: int | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T N H"], ...]:
    """Causal convolutions of each channel, `sum_i taps[W - 1 - i] * x[t - i]` of each of `inputs`.

    The rest is as in `context_parallel_gated_delta`: a document sees its own tokens alone, and
    before its first there are zeros.
    """
    local = functools.partial(_convolution, layout=layout, length=checked_length(length))
    run = on_shards(local, (WIDE, P(None, "model", None), TOKENS, TOKENS), WIDE)
    return run(inputs, taps, positions, segment_ids)


def checked_length(length: int | None) -> int | None:
    """Raise ValueError where `length` is missing and cannot be known."""
    if length is None and jax.sharding.get_abstract_mesh().shape.get(AXIS, 1) > 1:
        raise ValueError(
            "recurrent layers need the order of tokens: give length=, the tokens of a row before "
            "the layout filled it up (jaxcp.logits and train do)"
        )
    return length


def delta_of_pieces(pieces: Pieces, *arrays, starts=None, pads=None, before=None, scale=None):
    """`(out, state after all)` of local `q, k, v, log_decay, beta`; `before`: the state before."""
    if pieces.alone:
        pads = pieces.numbers == PAD_POSITION if pads is None else pads
        pads = jnp.broadcast_to(pads, arrays[0].shape[:2])
        return gated_delta(*arrays, starts=starts, pads=pads, state=before, scale=scale)
    real = jnp.ones(arrays[0].shape[:2], bool) if pads is None else ~pads
    starts = jnp.zeros(arrays[0].shape[:2], bool) if starts is None else starts
    parts, starts, real = pieces.split((arrays, starts, real))
    most, rows, size = real.shape

    def as_rows(x):
        return x.reshape(most * rows, *x.shape[2:])

    chunks = gated_delta_chunks(
        *(as_rows(x) for x in parts), starts=as_rows(starts), pads=as_rows(~real), scale=scale
    )
    summary = (x.reshape(most, rows, *x.shape[1:]) for x in chunks.summary())
    begins, after = pieces.starts(*summary, apply=_applied, before=before)
    out, _ = chunks.outputs(as_rows(begins), size)
    out = out.reshape(most, rows, *out.shape[1:]).astype(arrays[2].dtype)
    return pieces.join(out), after


def convolution_of_pieces(pieces: Pieces, x, taps, *, segments=None, before=None, keeps=0):
    """`(out, inputs)` of local `x [B, t, C]` and `taps [W, C]`; `inputs.at` finds what comes next.

    `segments [B, t]`: `NOBODY` for pads, whose inputs must be zero. `before`: `(x, numbers)` of
    earlier tokens, `[B, m, ...]`. `keeps`: latest tokens of each piece that `inputs` has, where not
    those that the taps see.
    """
    width, parts = len(taps) - 1, pieces.split(x)
    size, wanted = parts.shape[2], pieces.before(width)

    def behind(inputs, parts):
        head = jnp.stack([inputs.at(numbers) for numbers in wanted])
        rows = jnp.concatenate([head, parts], axis=2)
        return [rows[:, :, i : i + size] for i in range(width + 1)]

    inputs = pieces.inputs(x, max(width, keeps), before)
    rows = behind(inputs, parts)
    if segments is not None:
        own = pieces.split(segments)
        ids = behind(pieces.inputs(segments, width), own)
        rows = [
            jnp.where((of == own)[..., None], row, jnp.zeros_like(row))
            for of, row in zip(ids, rows, strict=True)
        ]
    out = sum(tap * row for tap, row in zip(taps.astype(x.dtype), rows, strict=True))
    return pieces.join(out), inputs


def flat(arrays):
    """`[..., N, H]` each, side by side as one `[..., all N * H]`."""
    return jnp.concatenate([x.reshape(*x.shape[:-2], -1) for x in arrays], axis=-1)


def like(x, arrays):
    """Undo `flat`, of arrays with these heads."""
    ends = list(itertools.accumulate(math.prod(y.shape[-2:]) for y in arrays))
    parts = jnp.split(x, ends[:-1], axis=-1)
    return tuple(
        part.reshape(*part.shape[:-1], *y.shape[-2:]) for part, y in zip(parts, arrays, strict=True)
    )


def _applied(transition, state):
    return jnp.einsum("bnij,bnjk->bnik", transition, state, precision=lax.Precision.HIGHEST)


def _pieces(layout, length, tokens):
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape[AXIS] == 1:
        return Pieces.of_one_shard(tokens.shape[1])
    return Pieces.of_layout(layout, length, AXIS)


def _segments(positions, segment_ids):
    """The document of each token, `NOBODY` for pads."""
    ids = jnp.zeros_like(positions) if segment_ids is None else segment_ids
    return jnp.where(positions == PAD_POSITION, NOBODY, ids)


def _delta(q, k, v, log_decay, beta, positions, segment_ids, *, layout, length):
    pieces = _pieces(layout, length, positions)
    segments = _segments(positions, segment_ids)
    numbers = jnp.broadcast_to(pieces.numbers, segments.shape)
    pads = segments == NOBODY
    latest = pieces.carried(jnp.stack([segments, numbers], -1), ~pads, (NOBODY, -1))
    starts = latest[..., 0] != segments
    gap = ~pads & ~starts & (latest[..., 1] != numbers - 1)
    v = jnp.where(gap[..., None, None], jnp.nan, v)
    return delta_of_pieces(pieces, q, k, v, log_decay, beta, starts=starts, pads=pads)[0]


def _convolution(inputs, taps, positions, segment_ids, *, layout, length):
    pieces = _pieces(layout, length, positions)
    segments = _segments(positions, segment_ids)
    x = flat(inputs)
    x = jnp.where((segments != NOBODY)[..., None], x, jnp.zeros_like(x))
    segments = None if segment_ids is None else segments
    out, _ = convolution_of_pieces(pieces, x, flat(taps), segments=segments)
    return like(out, inputs)
