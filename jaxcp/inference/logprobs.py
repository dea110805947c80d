# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of the tokens of an answer, by the model's own distribution.

They are those before biases, penalties, grammars, temperature and cuts, in float32: what a forward
pass over the whole text gives. Those of a prompt are not kept: the pages of a prefix that is known
already hold no logits, and its tokens are not computed again; `Engine.score` has them.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcp.inference.sampling import MOST_LOGPROBS, RowOptions, as_rows_of, whole_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLogProbs:
    """A token of an answer, and the most probable ones in its place."""

    token: int
    logprob: float
    best: tuple[tuple[int, float], ...]
    """`(id, log-probability)` of as many as were asked for, the best first."""


class LogProbs(NamedTuple):
    """Log-probabilities of rows, on devices; zeros where no row wants them."""

    chosen: Float[Array, "B"]
    ids: Int[Array, "B K"]
    best: Float[Array, "B K"]

    def read(self, token: int, count: int) -> TokenLogProbs:
        """Log-probabilities of one row that is on the host, with as many of the best."""
        best = zip(self.ids[:count].tolist(), self.best[:count].tolist(), strict=True)
        return TokenLogProbs(token=token, logprob=float(self.chosen), best=tuple(best))


@jax.named_scope("logprobs")
def log_probs(
    logits: Float[Array, "B V"], tokens: Int[Array, "B"], options: RowOptions
) -> LogProbs:
    """Log-probabilities of `tokens` and of the best; where no row wants them, at no cost."""
    logits = whole_rows(logits)
    tokens, options = as_rows_of(logits, (tokens, options))
    count = min(MOST_LOGPROBS, logits.shape[-1])

    def all_of_them(logits, tokens):
        every = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        here = jnp.arange(every.shape[-1], dtype=jnp.int32) == tokens[:, None]
        chosen = jnp.sum(jnp.where(here, every, 0), axis=-1)
        best, ids = jax.lax.top_k(every, count)
        return as_rows_of(logits, LogProbs(chosen, ids, best))

    def none_of_them(logits, tokens):
        zeros = jnp.zeros((len(tokens), count), jnp.float32)
        return as_rows_of(logits, LogProbs(zeros[:, 0], zeros.astype(jnp.int32), zeros))

    return jax.lax.cond(jnp.any(options.logprobs > 0), all_of_them, none_of_them, logits, tokens)
