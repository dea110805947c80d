# SPDX-License-Identifier: Apache-2.0
"""Changes logits by what a row has said, and by biases, before a token is chosen.

A row keeps two numbers for each token of the vocabulary beside the pool: how often the text has
it, and its bias. They are written when a request takes its seat, and the step that samples a token
counts it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int, Int32

from jaxcp.context_parallel.shards import on_shards
from jaxcp.inference.sampling import LARGEST, RowOptions, Sampling, as_rows_of, lines_of, whole_rows

ROWS = P("data")
IN_PROMPT = 1 << 30
"""Added to the count of a token that the prompt has."""


class Said(NamedTuple):
    """Counts and biases of rows `[R, V]`, or of one of them `[V]`."""

    counts: Int32[Array | np.ndarray, "R V"]
    """Count of a token in the answer, plus `IN_PROMPT`."""
    biases: Float32[Array | np.ndarray, "R V"]


def nothing_said(rows: int, vocab_size: int) -> Said:
    """Make those of rows that nobody has, on the host."""
    shape = rows, vocab_size
    return Said(np.zeros(shape, np.int32), np.zeros(shape, np.float32))


def said_by(
    prompt: Sequence[int], answer: Sequence[int], sampling: Sampling, vocab_size: int
) -> Said:
    """Make those of one row `[V]`, on the host."""
    counts = np.bincount(np.asarray(answer, np.int32), minlength=vocab_size).astype(np.int32)
    counts[np.unique(np.asarray(prompt, np.int32))] += IN_PROMPT
    biases = np.zeros(vocab_size, np.float32)
    biases[list(sampling.logit_bias)] = list(sampling.logit_bias.values())
    return Said(counts, biases)


def with_row(said: Said, row: Said, line: Int[Array, ""]) -> Said:
    """`said` with one row written."""

    def local(array, new, line):
        rank = 0 if jax.sharding.get_abstract_mesh().empty else jax.lax.axis_index("data")
        own = line // len(array) == rank
        return array.at[jnp.where(own, line % len(array), len(array))].set(new, mode="drop")

    write = on_shards(local, (ROWS, P(), P()), ROWS)
    return Said(*(write(x, new, line) for x, new in zip(said, row, strict=True)))


def counted(
    said: Said, lines: Int[Array, "B"], tokens: Int[Array, "B"], options: RowOptions
) -> Said:
    """`said` after one more token of each row that is penalized."""
    added = options.penalized * (tokens >= 0).astype(jnp.int32)
    count = on_shards(_counted, (ROWS,) * 4, ROWS)
    return said._replace(counts=count(said.counts, lines, tokens, added))


def _counted(counts, lines, tokens, added):
    return counts.at[lines, jnp.maximum(tokens, 0)].add(added, mode="drop")


@jax.named_scope("penalize")
def penalized(
    logits: Float[Array, "B V"], said: Said, lines: Int[Array, "B"], options: RowOptions
) -> Float[Array, "B V"]:
    """`logits`, changed in the rows that are penalized; where none is, at no cost.

    Args:
      lines: the rows of `said`. Of requests with no penalties they hold anything.
    """
    logits = whole_rows(logits)
    lines, options = as_rows_of(logits, (lines, options))

    def change(logits):
        counts, biases = (lines_of(jnp.asarray(x), lines, logits) for x in said)
        changed = changed_logits(logits, counts, biases, options)
        return jnp.where(options.penalized[:, None] > 0, changed, logits)

    return jax.lax.cond(jnp.any(options.penalized > 0), change, lambda x: x, logits)


def changed_logits(
    logits: Float[Array, "B V"],
    counts: Int[Array, "B V"],
    biases: Float[Array, "B V"],
    options: RowOptions,
) -> Float[Array, "B V"]:
    """Follow the rules of `Sampling`. What is finite stays finite; NaN and infinities stay."""
    repetition = options.repetition_penalty[:, None]
    presence, frequency = options.presence_penalty[:, None], options.frequency_penalty[:, None]
    changed = jnp.clip(logits + biases, -LARGEST, LARGEST)
    repeated = jnp.where(changed > 0, changed / repetition, changed * repetition)
    changed = jnp.where(counts > 0, jnp.clip(repeated, -LARGEST, LARGEST), changed)
    times = (counts & (IN_PROMPT - 1)).astype(jnp.float32)
    changed = changed - frequency * times - presence * jnp.minimum(times, 1)
    return jnp.where(jnp.isfinite(logits), jnp.clip(changed, -LARGEST, LARGEST), logits)
