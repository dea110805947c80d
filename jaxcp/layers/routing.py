# SPDX-License-Identifier: Apache-2.0
"""Chooses the experts of a token, and weighs them.

A new way to score is an entry of `SCORES`; a new way to select is a field of `Routing` that
`select` reads. Experts that a table of token ids names are weighed by `weigh` just the same.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def _sqrt_softplus(x):
    y = jax.nn.softplus(x)
    some = y > 0  # below about -90 y is 0, where the slope of a root is infinite
    return jnp.where(some, jnp.sqrt(jnp.where(some, y, 1.0)), 0.0)


SCORES = {
    "sigmoid": jax.nn.sigmoid,  # Hy3, DeepSeek-V3
    "softmax": jax.nn.softmax,  # Qwen3-MoE; gpt-oss, whose softmax over the chosen is `normalise`
    "sqrt_softplus": _sqrt_softplus,  # DeepSeek-V4
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """The rule by which a router scores all experts, chooses the highest scores and weighs them.

    `selection_bias`: a float32 bias that balances load; it selects and does not weigh.
    `linear_bias`: the router's projection has a bias, which does both.
    `normalise`: weights of the chosen sum to one, before `scale`.
    `num_groups`, `top_groups`: experts lie in groups, and only those of the `top_groups` with the
    highest sum of two best scores are open to a token. Source: arXiv 2412.19437.
    """

    scores: str = "sigmoid"
    selection_bias: bool = True
    linear_bias: bool = False
    normalise: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1

    def __post_init__(self):
        if self.scores not in SCORES:
            raise ValueError(f"scores must be one of {sorted(SCORES)}; got {self.scores!r}")
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(
                f"needs 1 <= top_groups <= num_groups; got {self.top_groups} of {self.num_groups}"
            )

    def check(self, experts: int, k: int) -> None:
        """Raise ValueError unless `num_groups` divides `experts` into groups of two and more, and
        the open groups hold `k` or more."""
        size = experts // self.num_groups
        if self.num_groups > 1 and (
            size * self.num_groups != experts or size < 2 or size * self.top_groups < k
        ):
            raise ValueError(
                "num_groups must divide the experts into groups of two and more, top_groups of "
                f"which hold k; got {self.top_groups} of {self.num_groups} groups, "
                f"{experts} experts, k={k}"
            )

    def select(
        self, scores: Float[Array, "M E"], k: int, bias: Float[Array, "E"] | None = None
    ) -> Int[Array, "M k"]:
        """Choose `k` experts for each token; of equal scores the lower index.

        Raises:
          ValueError: groups that `check` refuses.
        """
        self.check(scores.shape[-1], k)
        ranked = lax.stop_gradient(scores if bias is None else scores + bias)
        if self.num_groups > 1:
            ranked = self._only_top_groups(ranked)
        return lax.top_k(ranked, k)[1]

    def probabilities(self, logits: Float[Array, "M E"]) -> Float[Array, "M E"]:
        """Score all experts, chosen or not, with scores that sum to one: softmax as it is, sigmoid
        and sqrt_softplus over their sum, as DeepSeek-V3's balance loss has it."""
        scores = SCORES[self.scores](logits)
        if self.scores == "softmax":
            return scores
        return _over_their_sum(scores)

    def weigh(self, scores: Float[Array, "M E"], chosen: Int[Array, "M k"]) -> Float[Array, "M k"]:
        """Weigh each of the `chosen` by its score without the selection bias."""
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if self.normalise:
            weights = _over_their_sum(weights)
        return weights * self.scale

    def _only_top_groups(self, ranked):
        tokens, experts = ranked.shape
        size = experts // self.num_groups
        grouped = ranked.reshape(tokens, self.num_groups, size)
        best = lax.top_k(grouped, 2)[0].sum(-1)
        open_groups = lax.top_k(best, self.top_groups)[1]
        is_open = (open_groups[..., None] == jnp.arange(self.num_groups)).any(1)
        return jnp.where(is_open[..., None], grouped, -jnp.inf).reshape(tokens, experts)


def _over_their_sum(scores):
    total = scores.sum(-1, keepdims=True) + 1e-20
    # where all scores have vanished: the gradient has 0 / total**2, and that square is 0
    return scores / jnp.where(total > 1e-19, total, lax.stop_gradient(total))
