# SPDX-License-Identifier: Apache-2.0
"""Samples a token of each row, and behind it as many as its guesses are right.

A guess is right if it is the token that would have been sampled without it: drawn by the same seed
and position, from the same logits, under the same penalties. So an answer has the tokens that it
has without guesses, and sampled ones the same distribution.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxcp.inference.logprobs import LogProbs, log_probs
from jaxcp.inference.masks import only_allowed
from jaxcp.inference.penalties import Said, counted, penalized
from jaxcp.inference.sampling import RowOptions, as_rows_of, sample_rows, whole_rows


class Verified(NamedTuple):
    """Tokens that rows have sampled at T positions one after the other."""

    tokens: Int[Array, "T B"]
    """Samples; behind a wrong guess they mean nothing."""
    accepted: Int[Array, "B"]
    """Guesses that are right: so many tokens and one more are the row's."""
    logprobs: LogProbs
    """Arrays `[T, B, ...]`."""
    drafts: Int[Array, "n B"]
    """Tokens that the model's own layer drafts behind these; -1 for none."""


def sampled(
    logits: Float[Array, "B V"],
    positions: Int[Array, "B"],
    said: Said,
    allowed: Any,
    row: dict[str, Any],
    alive: Any = None,
) -> tuple[Int[Array, "B"], LogProbs, Said]:
    """`(token [B], its log-probabilities, said)` of logits at `positions`.

    Args:
      row: see `batch.columns`.
      alive: `[B]`, rows whose token is said; None: all.
    """
    options, line = RowOptions.of_columns(row), row["line"]
    changed = penalized(logits, said, line, options)
    changed = only_allowed(changed, allowed, line, options)
    token = sample_rows(changed, positions, options)
    counts = token if alive is None else jnp.where(as_rows_of(logits, alive), token, -1)
    return token, log_probs(logits, token, options), counted(said, line, counts, options)


def verified(
    logits: Float[Array, "B T V"],
    ids: Int[Array, "B T"],
    said: Said,
    allowed: Any,
    row: dict[str, Any],
) -> tuple[Verified, Said]:
    """Tokens after the last of each row that is no guess, and after every guess that is right.

    Args:
      ids: the row's `added` tokens of this step, the last `drafts` guessed; then pads.
    """
    places = jnp.arange(ids.shape[1], dtype=jnp.int32)
    first = row["added"] - 1 - row["drafts"]

    def step(carry, count):
        said, alive, accepted = carry
        here = places == (first + count)[:, None]
        of_place = whole_rows(jnp.where(here[:, :, None], logits, 0).sum(1))
        positions = row["before"] + first + count
        token, logprobs, said = sampled(of_place, positions, said, allowed, row, alive)
        guess = jnp.where(places == (first + count + 1)[:, None], ids, 0).sum(1)
        ends = (token[:, None] == row["stops"]).any(1) | (token < 0)
        right = alive & (count < row["drafts"]) & (guess == token) & ~ends
        return (said, right, accepted + right.astype(jnp.int32)), (token, logprobs)

    start = said, row["added"] > 0, jnp.zeros_like(row["added"])
    (said, _, accepted), (tokens, logprobs) = lax.scan(step, start, places)
    return Verified(tokens, accepted, logprobs, no_drafts(accepted)), said


def no_drafts(rows: Int[Array, "B"]) -> Int[Array, "1 B"]:
    """The drafts of a step that makes none, with rows where those of `rows` are."""
    return jnp.full_like(rows[None], -1)
