# SPDX-License-Identifier: Apache-2.0
"""Rules out the tokens that a grammar does not allow: a bit a token, on the device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from jaxcp.inference.sampling import RowOptions, as_rows_of, lines_of, whole_rows

WORD = 32


def words(vocab_size: int) -> int:
    """Count the int32 that hold a bit for each token."""
    return -(-vocab_size // WORD)


@jax.named_scope("mask")
def only_allowed(
    logits: Float[Array, "B V"],
    allowed: Int32[Array, "R W"],
    lines: Int[Array, "B"],
    options: RowOptions,
) -> Float[Array, "B V"]:
    """`logits`, -inf where a row's bit is 0, in the rows that have a mask; NaN stays to be seen.

    Args:
      allowed: bits of each row, the lowest first. Of requests without a mask they are anything.
      lines: the rows of `allowed`.
    """
    logits = whole_rows(logits)
    lines, options = as_rows_of(logits, (lines, options))

    def mask(logits):
        of_row = lines_of(allowed, lines, logits)[..., None]
        bits = (of_row >> jnp.arange(WORD, dtype=jnp.int32)) & 1
        bits = bits.reshape(len(bits), -1)[:, : logits.shape[-1]]
        keep = (bits > 0) | (options.masked[:, None] == 0) | ~(logits < jnp.inf)
        return jnp.where(keep, logits, -jnp.inf)

    return jax.lax.cond(jnp.any(options.masked > 0), mask, lambda x: x, logits)
