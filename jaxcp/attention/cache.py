# SPDX-License-Identifier: Apache-2.0
"""The cache of a model: what each stack of its layers keeps, and which token lies in which slot.

A layer that sees everything keeps a row for each slot, and slots are sharded. A slot belongs to no
position: it holds whatever token was written there, and its position says which. So new tokens go
wherever there is room, shards fill evenly over any number of turns, and an empty slot (position
`PAD_POSITION`) masks itself. Rows of a batch fill their slots each for itself, as their lengths
say. Which kinds there are, and what they keep: `full`, `window`, `latent`, `compressed`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxcp.attention.places import OwnSlots
from jaxcp.attention.slots import (
    MAX_EXTEND,
    ROWS,
    TOKENS,
    check_size,
    on_mesh,
    shards_in_scope,
    slots_in_use,
)
from pallas_kernels import PAD_POSITION


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["layers", "positions", "lengths", "recent"],
    meta_fields=["shards", "max_len"],
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, by stack of layers. S = shards * slots a shard."""

    layers: dict[str, Any]
    """By the name of a stack of layers: a kind, whose arrays have a leading axis of layers."""
    positions: jax.Array | None  # int32 [B, S]; None where no kind `keeps_slots`
    lengths: jax.Array  # int32 [B]: tokens in the cache; the next token's position
    recent: jax.Array  # int32 [B, W - 1]: the latest token ids, newest first, for n-gram embeddings
    shards: int
    max_len: int

    @property
    def slots(self) -> int | None:
        """Slots a shard; None where no layer keeps slots."""
        return None if self.positions is None else self.positions.shape[1] // self.shards

    @property
    def fill(self) -> np.ndarray:
        """Slots in use of each shard, `[shards]`, by the longest row."""
        return slots_in_use(np.asarray(self.lengths).max(), np.arange(self.shards), self.shards)

    @property
    def windows(self) -> tuple[int, ...]:
        """The windows of layers that keep nothing else."""
        kinds = self.layers.values()
        return tuple(kind.window for kind in kinds if getattr(kind, "exchanges_window", False))

    def bytes_per_device(self) -> int:
        """Bytes of what layers keep that one device holds."""
        arrays = jax.tree.leaves(self.layers)
        return sum(x.addressable_shards[0].data.nbytes for x in arrays)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
    """Sizes that every kind needs to be made, empty."""

    batch_size: int
    max_len: int
    slots: int
    """Slots of all shards."""
    dtype: Any
    rolled_back: ClassVar[int] = 0
    """Latest tokens of a row that may turn out to be none."""

    def for_slots(self, layers: int, *shape: int, spec: tuple) -> jax.Array:
        """Zeros for each slot, `[layers, B, slots, *shape]`; `spec` says how `shape` is sharded."""
        array = jnp.zeros((layers, self.batch_size, self.slots, *shape), self.dtype)
        return on_mesh(array, P(*OwnSlots.stack, *spec))

    def for_heads(self, layers: int, num_kv_heads: int, head_dim: int) -> jax.Array:
        """Zeros for the keys, or values, of each slot."""
        return self.for_slots(layers, num_kv_heads, head_dim, spec=("model", None))

    def for_blocks(self, layers: int, *shape: int, ratio: int) -> jax.Array:
        """Zeros for each block of `ratio` tokens, `[layers, B, blocks, *shape]`, on every shard."""
        spec = (None,) * (1 + len(shape))
        return self.for_state(layers, max(1, self.max_len // ratio), *shape, spec=spec)

    def for_state(
        self, layers: int, *shape: int, spec: tuple, dtype: DTypeLike | None = None
    ) -> jax.Array:
        """Zeros for each row, `[layers, B, *shape]`, the same on every shard of `seq`."""
        dtype = self.dtype if dtype is None else dtype
        return on_mesh(jnp.zeros((layers, self.batch_size, *shape), dtype), P(None, "data", *spec))


def empty_cache(
    makers: Mapping[str, Callable[[Room], Any]],
    *,
    batch_size: int,
    max_len: int,
    dtype: Any,
    recent: int = 0,
) -> Cache:
    """A cache for `max_len` tokens a row, on the mesh in scope.

    Args:
      makers: by the name of a stack of layers, what makes its kind, empty.
      recent: token ids kept, for n-gram embeddings.
    Raises:
      ValueError: sizes below 1, or rows that the mesh's `data` does not divide.
    """
    check_size(batch_size, max_len)
    shards = shards_in_scope()
    slots = shards * (-(-max_len // shards) + MAX_EXTEND)
    room = Room(batch_size=batch_size, max_len=max_len, slots=slots, dtype=dtype)

    @jax.jit
    def make():
        layers = {name: maker(room) for name, maker in makers.items()}
        positions = None
        if any(kind.keeps_slots for kind in layers.values()):
            positions = on_mesh(jnp.full((batch_size, slots), PAD_POSITION, jnp.int32), TOKENS)
        return Cache(
            layers=layers,
            positions=positions,
            lengths=on_mesh(jnp.zeros(batch_size, jnp.int32), ROWS),
            recent=on_mesh(jnp.full((batch_size, recent), -1, jnp.int32), P("data", None)),
            shards=shards,
            max_len=max_len,
        )

    return make()
