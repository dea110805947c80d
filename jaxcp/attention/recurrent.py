# SPDX-License-Identifier: Apache-2.0
"""The kind of a recurrent layer: one matrix a head, and the last inputs of its convolutions.

Both are constant in length, float32 and the layer's dtype, the same on every shard of `seq`: a
state. What they held before a row's first token does not count.

A matrix cannot take a token back. So where guesses may be wrong (`Waiting`), what the last few
tokens write waits for the next step, whose `before` says how many of them count: those it writes
first, and then goes on. A row of 20 tokens, 3 of 4 guesses wrong, that has 22 afterwards:

    step            state after    waiting              writes first
    20 + 1 + 4      20             20 21 22 23 24       what the step before has left
    22 + 1          22             22                   20 21

Communication of a prefill, a device and layer: as in `context_parallel.gated_delta`, and an integer
of each piece for each of the two. In a short turn and in decoding: nothing.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxcp.attention.cache import Room
from jaxcp.attention.slots import ROWS, TOKENS, axis_in_scope
from jaxcp.context_parallel.gated_delta import (
    HEADS,
    WIDE,
    convolution_of_pieces,
    delta_of_pieces,
    flat,
    like,
)
from jaxcp.context_parallel.recurrent import Pieces
from jaxcp.context_parallel.shards import on_shards
from pallas_kernels import PAD_POSITION
from pallas_kernels.gated_delta import gated_delta

STATE, INPUTS = ("model", None, None), (None, "model", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Waiting:
    """Inputs by which the latest tokens, F at most, would write the state; the first ones real."""

    k: jax.Array
    """`[L, B, F, K, H]`, and `v [L, B, F, N, V]`."""
    v: jax.Array
    log_decay: jax.Array
    """Float32 `[L, B, F, N]` or `[L, B, F, N, H]`, and `beta [L, B, F, N]`."""
    beta: jax.Array
    reach: jax.Array
    """int32 `[L, B, 2]`: tokens that the state has, and those with the waiting ones."""

    @classmethod
    def empty(
        cls, room: Room, *, layers: int, keys: tuple[int, int], values: tuple[int, int],
        decay: tuple[int, ...],
    ) -> "Waiting":  # fmt: skip
        """`keys`, `values`: heads and channels; `decay`: the shape of a token's decays."""
        size = layers, room.rolled_back
        return cls(
            k=room.for_state(*size, *keys, spec=INPUTS),
            v=room.for_state(*size, *values, spec=INPUTS),
            log_decay=room.for_state(
                *size, *decay, spec=INPUTS[: 1 + len(decay)], dtype=jnp.float32
            ),
            beta=room.for_state(*size, values[0], spec=INPUTS[:2]),
            reach=room.for_state(layers, 2, spec=(None,), dtype=jnp.int32),
        )

    @property
    def specs(self) -> Any:
        """Mesh axes of the stacks, as a tree like this one."""
        wide, narrow = P(None, "data", *INPUTS), P(None, "data", *INPUTS[:2])
        decay = narrow if self.log_decay.ndim == 4 else wide
        specs: tuple[Any, ...] = wide, wide, decay, narrow, P(None, "data", None)
        return Waiting(*specs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recurrent:
    """`state [L, B, N, H, V]`, and each of `inputs [L, B, W - 1 + F, N, H]` of latest tokens."""

    state: jax.Array
    inputs: tuple[jax.Array, ...]
    waiting: Waiting | None = None
    """The latest tokens, F at most, which may turn out to be none; None: F = 0."""

    keeps_slots = False
    in_pages = ()

    @property
    def rolls_back(self) -> bool:
        """Tell whether latest tokens may be taken back: what is in the state stays there."""
        return self.waiting is not None

    @classmethod
    def empty(
        cls, room: Room, *, layers: int, num_heads: int, key_dim: int, value_dim: int, width: int,
        inputs: Sequence[tuple[int, int]], decay: tuple[int, ...],
    ) -> "Recurrent":  # fmt: skip
        """`width`: inputs that a convolution sees before a token's own; `inputs`: the heads of
        query, key and value, and their channels; `decay`: the shape of a token's decays."""
        shape, width = (layers, num_heads, key_dim, value_dim), width + room.rolled_back
        waiting = None
        if room.rolled_back:
            waiting = Waiting.empty(
                room, layers=layers, keys=inputs[1], values=inputs[2], decay=decay
            )
        return cls(
            state=room.for_state(*shape, spec=STATE, dtype=jnp.float32),
            inputs=tuple(room.for_state(layers, width, *heads, spec=INPUTS) for heads in inputs),
            waiting=waiting,
        )

    def convolved(self, tokens, layer, inputs, taps):
        """`(inputs convolved, what is kept then)`: see `WholeSequence.convolved`."""
        wide = _of(tokens, WIDE)
        stack, place = P(None, "data", *INPUTS), tokens.place
        reach, reaches = None, None
        if self.waiting is not None:
            reach, reaches = self.waiting.reach, self.waiting.specs.reach
        local = functools.partial(_convolved, layout=tokens.layout, sharded=tokens.sharded)
        run = on_shards(
            local,
            (wide, P(None, "model", None), _positions(tokens), stack, reaches, P(), ROWS, ROWS,
             place.specs),
            (wide, stack),
        )  # fmt: skip
        out, kept = run(
            inputs, taps, tokens.positions, self.inputs, reach, jnp.int32(layer), tokens.before,
            tokens.after, place,
        )  # fmt: skip
        return out, dataclasses.replace(self, inputs=kept)

    def delta(self, tokens, layer, q, k, v, log_decay, beta):
        """`(out [B, T, N, V], what is kept then)`: see `WholeSequence.delta`; after `convolved`."""
        wide, narrow = _of(tokens, WIDE), _of(tokens, HEADS)
        place = tokens.place
        waiting = None if self.waiting is None else self.waiting.specs
        stacks = P(None, "data", *STATE), waiting
        decay = narrow if log_decay.ndim == 3 else wide
        local = functools.partial(_delta, layout=tokens.layout, sharded=tokens.sharded)
        run = on_shards(
            local,
            (wide, wide, wide, decay, narrow, _positions(tokens), stacks, P(), ROWS, ROWS,
             place.specs),
            (wide, stacks),
        )  # fmt: skip
        out, (state, waiting) = run(
            q, k, v, log_decay, beta, tokens.positions, (self.state, self.waiting),
            jnp.int32(layer), tokens.before, tokens.after, place,
        )  # fmt: skip
        return out, dataclasses.replace(self, state=state, waiting=waiting)


def _of(tokens, spec):
    return spec if tokens.sharded else P(spec[0], None, *spec[2:])


def _positions(tokens):
    return TOKENS if tokens.sharded else ROWS


def _pieces(positions, layout, sharded):
    return Pieces.of_positions(positions, layout, axis_in_scope() if sharded else None)


def _convolved(
    inputs, taps, positions, stacks, reach, layer, before, after, place, *, layout, sharded
):  # fmt: skip
    """`(out, stacks)` of local tokens."""
    ago = jnp.arange(-stacks[0].shape[2], 0, dtype=jnp.int32)
    end = before if reach is None else place.state(reach, layer)[:, 1]
    numbers = end[:, None] + ago
    count = (numbers >= 0) & (numbers < before[:, None])
    numbers, kept = jnp.where(count, numbers, PAD_POSITION), flat(place.state(stacks, layer))
    kept = jnp.where(count[..., None], kept, jnp.zeros_like(kept))
    pieces = _pieces(positions, layout, sharded)
    keeps = 0 if reach is None or sharded else min(len(ago), positions.shape[1])
    out, seen = convolution_of_pieces(
        pieces, flat(inputs), flat(taps), before=(kept, numbers), keeps=keeps
    )
    latest = like(seen.at(after[:, None] + ago), inputs)
    new = tuple(x.astype(stack.dtype) for stack, x in zip(stacks, latest, strict=True))
    return like(out, inputs), place.with_state(stacks, layer, new)


def _delta(
    q, k, v, log_decay, beta, positions, stacks, layer, before, after, place, *, layout, sharded
):  # fmt: skip
    """`(out, stacks)` of local tokens."""
    state, waiting = place.state(stacks, layer)
    state = jnp.where((before > 0)[:, None, None, None], state, 0)
    pads = positions == PAD_POSITION
    if waiting is not None:
        state = _with_those_that_count(state, waiting, before, after)
    pieces = _pieces(positions, layout, sharded)
    out, later = delta_of_pieces(pieces, q, k, v, log_decay, beta, pads=pads, before=state)
    if waiting is not None and not sharded and positions.shape[1] <= waiting.k.shape[1]:
        later, waiting = state, _waiting(waiting, (k, v, log_decay, beta), before, after)
    elif waiting is not None:
        reach = jnp.stack([after, after], axis=1)
        waiting = dataclasses.replace(waiting, reach=reach)
    return out, place.with_state(stacks, layer, (later, waiting))


def _with_those_that_count(state, waiting, before, after):
    """The state after `before` tokens, of which those behind its own were waiting.

    NaN where they are fewer, or the state has more: such a row must not go on.
    """
    has, reach = waiting.reach[:, 0], waiting.reach[:, 1]
    count = jnp.where(before > 0, before - has, 0)[:, None]
    pads = jnp.arange(waiting.k.shape[1]) >= count
    arrays = waiting.k, waiting.k, waiting.v, waiting.log_decay, waiting.beta
    state = gated_delta(*arrays, pads=pads, state=state)[1]
    lost = (before > 0) & (after > before) & ((before < has) | (before > reach))
    return jnp.where(lost[:, None, None, None], jnp.nan, state)


def _waiting(like, arrays, before, after):
    """`arrays [B, T, ...]` as those that wait now, T of F; pads are behind."""
    spare = like.k.shape[1] - arrays[0].shape[1]
    k, v, log_decay, beta = (
        jnp.pad(x, [(0, 0), (0, spare), *[(0, 0)] * (x.ndim - 2)]) for x in arrays
    )
    return Waiting(k, v, log_decay, beta, reach=jnp.stack([before, after], axis=1))
