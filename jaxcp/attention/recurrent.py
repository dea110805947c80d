# SPDX-License-Identifier: Apache-2.0
"""The kind of a recurrent layer: one matrix a head, and the last inputs of its convolutions.

Both are constant in length, float32 and the layer's dtype, the same on every shard of `seq`: a
state. What they held before a row's first token does not count.

Communication of a prefill, a device and layer: as in `context_parallel.gated_delta`, and an integer
of each piece for each of the two. In a short turn and in decoding: nothing.
"""

import dataclasses
import functools
from collections.abc import Sequence

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

STATE, INPUTS = ("model", None, None), (None, "model", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recurrent:
    """`state [L, B, N, H, V]`, and each of `inputs [L, B, W - 1, N, H]` of the latest tokens."""

    state: jax.Array
    inputs: tuple[jax.Array, ...]

    keeps_slots = False
    in_pages = ()
    rolls_back = False  # what is written cannot be taken back

    @classmethod
    def empty(
        cls, room: Room, *, layers: int, num_heads: int, key_dim: int, value_dim: int, width: int,
        inputs: Sequence[tuple[int, int]],
    ) -> "Recurrent":  # fmt: skip
        """`width`: inputs that a convolution sees before a token's own; `inputs`: the heads of each
        and their channels."""
        shape = layers, num_heads, key_dim, value_dim
        return cls(
            state=room.for_state(*shape, spec=STATE, dtype=jnp.float32),
            inputs=tuple(room.for_state(layers, width, *heads, spec=INPUTS) for heads in inputs),
        )

    def convolved(self, tokens, layer, inputs, taps):
        """`(inputs convolved, what is kept then)`: see `WholeSequence.convolved`."""
        wide = _of(tokens, WIDE)
        stack, place = P(None, "data", *INPUTS), tokens.place
        local = functools.partial(_convolved, layout=tokens.layout, sharded=tokens.sharded)
        run = on_shards(
            local,
            (wide, P(None, "model", None), _positions(tokens), stack, P(), ROWS, ROWS, place.specs),
            (wide, stack),
        )
        out, kept = run(
            inputs, taps, tokens.positions, self.inputs, jnp.int32(layer), tokens.before,
            tokens.after, place,
        )  # fmt: skip
        return out, dataclasses.replace(self, inputs=kept)

    def delta(self, tokens, layer, q, k, v, log_decay, beta):
        """`(out [B, T, N, V], what is kept then)`: see `WholeSequence.delta`."""
        wide, narrow = _of(tokens, WIDE), _of(tokens, HEADS)
        stack, place = P(None, "data", *STATE), tokens.place
        decay = narrow if log_decay.ndim == 3 else wide
        local = functools.partial(_delta, layout=tokens.layout, sharded=tokens.sharded)
        run = on_shards(
            local,
            (wide, wide, wide, decay, narrow, _positions(tokens), stack, P(), ROWS, place.specs),
            (wide, stack),
        )
        out, state = run(
            q, k, v, log_decay, beta, tokens.positions, self.state, jnp.int32(layer),
            tokens.before, place,
        )  # fmt: skip
        return out, dataclasses.replace(self, state=state)


def _of(tokens, spec):
    return spec if tokens.sharded else P(spec[0], None, *spec[2:])


def _positions(tokens):
    return TOKENS if tokens.sharded else ROWS


def _pieces(positions, layout, sharded):
    return Pieces.of_positions(positions, layout, axis_in_scope() if sharded else None)


def _convolved(inputs, taps, positions, stacks, layer, before, after, place, *, layout, sharded):
    """`(out, stacks)` of local tokens."""
    width = stacks[0].shape[2]
    ago = jnp.arange(-width, 0, dtype=jnp.int32)
    numbers = before[:, None] + ago
    kept = flat(place.state(stacks, layer))
    kept = jnp.where((numbers >= 0)[..., None], kept, jnp.zeros_like(kept))
    pieces = _pieces(positions, layout, sharded)
    out, seen = convolution_of_pieces(pieces, flat(inputs), flat(taps), before=(kept, numbers))
    latest = like(seen.at(after[:, None] + ago), inputs)
    new = tuple(x.astype(stack.dtype) for stack, x in zip(stacks, latest, strict=True))
    return like(out, inputs), place.with_state(stacks, layer, new)


def _delta(q, k, v, log_decay, beta, positions, stack, layer, before, place, *, layout, sharded):
    """`(out, stack)` of local tokens."""
    state = place.state(stack, layer)
    state = jnp.where((before > 0)[:, None, None, None], state, 0)
    pieces = _pieces(positions, layout, sharded)
    out, state = delta_of_pieces(
        pieces, q, k, v, log_decay, beta, pads=positions == PAD_POSITION, before=state
    )
    return out, place.with_state(stack, layer, state)
