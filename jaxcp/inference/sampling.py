# SPDX-License-Identifier: Apache-2.0
"""Samples tokens from logits: greedy, temperature, top-k, top-p."""

import dataclasses
import math
import numbers
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from jaxcp.inference.checks import integer

MOST = np.iinfo(np.int32).max
COLDEST = float(np.finfo(np.float32).tiny)  # it and its reciprocal are normal numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """`temperature=0` is greedy. `top_k` and `top_p` cut the distribution, in that order.

    `top_k` leaves that many tokens, `top_p` the fewest whose probability reaches it; of tokens
    that tie, those with the smaller ids.

    Raises:
      ValueError: an option is no number, not finite, or out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        if not _is(numbers.Real, self.temperature) or not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be >= 0 (0 is greedy) and finite; got {self.temperature!r}"
            )
        if self.top_k is not None and (not _is(numbers.Integral, self.top_k) or self.top_k < 1):
            raise ValueError(f"top_k must be at least 1 or None; got {self.top_k!r}")
        if not _is(numbers.Real, self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1]; got {self.top_p!r}")

    def __call__(self, logits: Float[Array, "B V"], key: jax.Array) -> Int[Array, "B"]:
        """One token a row, int32. The same key gives the same tokens."""
        return sample(logits, key, self.options())

    def options(self) -> tuple[Any, ...] | None:
        """The argument of `sample`: None for greedy, else three scalars that may be traced."""
        if self.temperature == 0:
            return None
        temperature = min(max(float(self.temperature), COLDEST), 1 / COLDEST)
        top_k = MOST if self.top_k is None else min(int(self.top_k), MOST)
        return np.float32(temperature), np.int32(top_k), np.float32(self.top_p)


class RowOptions(NamedTuple):
    """The numbers by which a row of a batch is sampled."""

    temperature: float
    """0: greedy."""
    top_k: int
    top_p: float
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Sampler):
    """Options of a request.

    Args:
      seed: the token at a position is drawn by `(seed, position)`: the same seed gives the same
        text, whatever else runs beside it.
      stop_tokens: ids that end the answer; None takes the engine's.
    Raises:
      ValueError: an option is no number, or out of its range.
    """

    max_new_tokens: int = 256
    seed: int = 0
    stop_tokens: Collection[int] | None = None

    def __post_init__(self):
        super().__post_init__()
        integer("max_new_tokens", self.max_new_tokens, 1)
        integer("seed", self.seed, 0, 2**32 - 1)

    def row_options(self) -> RowOptions:
        options = self.options()
        temperature, top_k, top_p = (0.0, MOST, 1.0) if options is None else options
        return RowOptions(float(temperature), int(top_k), float(top_p), int(self.seed))


@jax.named_scope("sample")
def sample_rows(
    logits: Float[Array, "B V"],
    seeds: UInt32[Array, "B"],
    positions: Int[Array, "B"],
    temperature: Float[Array, "B"],
    top_k: Int[Array, "B"],
    top_p: Float[Array, "B"],
) -> Int[Array, "B"]:
    """One token a row, int32, each by its own options; it is drawn by `(seed, position)`."""
    logits = _whole_rows(logits)
    options = seeds, positions, temperature, top_k, top_p
    if not jax.sharding.get_abstract_mesh().empty:  # rows as those of the logits
        rows = jax.P(jax.typeof(logits).sharding.spec[0])
        options = tuple(jax.sharding.reshard(x, rows) for x in options)
    seeds, positions, temperature, top_k, top_p = options
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled = scaled / jnp.where(temperature > 0, temperature, 1.0)[:, None]
    cut = ((top_k < logits.shape[-1]) | (top_p < 1)).any()
    scaled = jax.lax.cond(cut, _cut, lambda x, *_: x, scaled, top_k[:, None], top_p[:, None])

    def draw(seed, position, row):
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), row)

    drawn = jax.vmap(draw)(seeds, positions, scaled).astype(jnp.int32)
    return jnp.where(temperature > 0, drawn, best)


@jax.named_scope("sample")
def sample(
    logits: Float[Array, "B V"], key: jax.Array, options: tuple[Any, ...] | None
) -> Int[Array, "B"]:
    """One token a row, int32, by `Sampler.options()`; under `jit` one program for all that draw."""
    logits = _whole_rows(logits)
    if options is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    temperature, top_k, top_p = options
    # the best one is 0 whatever the temperature: nothing overflows but to -inf
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    cut = (top_k < logits.shape[-1]) | (top_p < 1)
    logits = jax.lax.cond(cut, _cut, lambda x, *_: x, logits, top_k, top_p)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def _is(kind, value) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _whole_rows(logits):
    """`logits` with every row on one device: under a mesh the vocabulary may be sharded."""
    if jax.sharding.get_abstract_mesh().empty:
        return logits
    return jax.sharding.reshard(logits, jax.P(jax.typeof(logits).sharding.spec[0], None))


def _cut(logits, top_k, top_p):
    """-inf for all but the `top_k` best and, of those, the fewest whose probability reaches top_p.

    Of tokens that tie with the last one kept, the first. Source of top_p: arXiv 1904.09751.
    """
    ordered = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    probability = jax.nn.softmax(jnp.where(rank < top_k, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability  # mass of the tokens ranked above
    within = (rank < top_k) & ((before < top_p) | (top_p >= 1))
    kept = jnp.maximum(1, jnp.sum(within, axis=-1, keepdims=True, dtype=jnp.int32))
    last = jnp.max(jnp.where(rank >= kept - 1, ordered, -jnp.inf), axis=-1, keepdims=True)
    above, ties = logits > last, logits == last
    spare = kept - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    first = jnp.cumsum(ties, axis=-1, dtype=jnp.int32) <= spare
    return jnp.where(above | (ties & first), logits, -jnp.inf)
