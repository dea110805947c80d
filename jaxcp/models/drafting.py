# SPDX-License-Identifier: Apache-2.0
"""Models with an MTP layer, which drafts the tokens after next: scored, served and trained."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxcp.attention.attend import Attend
from jaxcp.layers.linear import linear
from jaxcp.layers.parameter import normal
from jaxcp.layers.router_stats import RouterStats, joined, stacked
from jaxcp.models.base import LanguageModel, embed

MTP = "mtp"
"""The name of the layer that drafts, among those that keep something."""


class JoinedMTP(nnx.Module):
    """The layer that drafts the token after next, from the trunk's state and the next token.

    Source: arXiv 2412.19437, as vLLM serves Hy3, DeepSeek-V3 and Qwen3-Next: the state is the one
    after the final norm, and the embedding comes first. Position 0 embeds nothing, or, where
    `embeds_first`, as Qwen's does, its next token too.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        norm: Callable[[], nnx.Module],
        block: Callable[[], nnx.Module],
        embeds_first: bool = False,
        rngs: nnx.Rngs,
    ):
        d = embed_dim
        self.embed_norm, self.hidden_norm = norm(), norm()
        self.join = normal(rngs, (2, d, d), ("parts", "embed", "embed"), (2 * d) ** -0.5, summed=2)
        self.block = block()
        self.final_norm = norm()
        self.embeds_first = embeds_first

    def __call__(self, embedded, hidden, tokens, positions, attend):
        del tokens  # no block of these asks for ids
        if not self.embeds_first:
            embedded = jnp.where((positions == 0)[..., None], 0, embedded)
        parts = self.embed_norm(embedded.astype(hidden.dtype)), self.hidden_norm(hidden)
        x = linear("pbtc,pcd->btd", jnp.stack(parts), self.join)
        x, stats = self.block(x, positions, attend)
        return self.final_norm(x), stats


class DraftingModel(LanguageModel):
    """A model that drafts by `mtp(embedded, state, next_tokens, positions, attend)`.

    A model has, where `config.num_mtp_layers`, `mtp`. Where it drafts from something
    else than `forward` gives, it has `trunk`, `hidden_of` and `drafted` of its own.
    """

    mtp: Any

    def attentions(self):
        mtp = {MTP: (self.mtp.block.attention, 1)} if self.config.num_mtp_layers else {}
        return super().attentions() | mtp

    def trunk(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], attend: Attend
    ) -> tuple[Any, RouterStats | None]:
        """The state that `draft` starts from, and what the routers did."""
        return self.forward(tokens, positions, attend)

    def hidden_of(self, state: Any) -> Float[Array, "B T D"]:
        """Make what `forward` gives of what `trunk` gave."""
        return state

    def drafted(self, state: Any) -> Float[Array, "B T D"]:
        """Take from a draft the hidden states whose `logits` are those of the token after next."""
        return state

    def draft(self, state: Any, next_tokens: Int[Array, "B T"], positions, attend: Attend) -> Any:
        """The state of the token after next, for `drafted`.

        Of a draft again, with the tokens after those: one token further, and so on. The layer has
        a cache of its own, as layer `num_layers`.

        Args:
          state: what `trunk` gave, or `draft`.
          next_tokens: `[B, T]`, laid out as the state is: the token after the one at each place
            (after two, of a draft of a draft). See `jaxcp.data.lookahead.following`.
        Raises:
          ValueError: the model has no MTP layer.
        """
        return self._draft(state, next_tokens, positions, attend)[0]

    def hidden_and_drafts(self, tokens, following, positions, **options):
        attend = self.attend_over(positions, **options)
        state, stats = self.trunk(tokens, positions, attend)
        hidden, drafts = self.hidden_of(state), []
        for depth in range(following.shape[-1]):
            state, of_layer = self._draft(state, following[..., depth], positions, attend)
            drafts.append(self.drafted(state))
            stats = joined(stats, stacked([of_layer]))
        return hidden, drafts, stats

    def mtp_logits(self, tokens, following, positions, **options):
        """Float32 logits `[B, T, V]` a draft: of the token after next, the one after that, ...

        `following [B, T, n]` has the n tokens after each one, see there; `options` are those of
        `hidden`.
        """
        _, drafts, _ = self.hidden_and_drafts(tokens, following, positions, **options)
        return [self.logits(x) for x in drafts]

    @jax.named_scope("mtp")
    def _draft(self, state, next_tokens, positions, attend):
        if not self.config.num_mtp_layers:
            raise ValueError("drafting needs a model with an MTP layer; num_mtp_layers is 0")
        with jax.named_scope("embed"):
            embedded = embed(self.embed, next_tokens, state.dtype)
        mtp = self.recomputed(_mtp, attend, static_argnums=5)
        here = attend.of(attend.kept(MTP), 0)
        drafted = mtp(self.mtp, embedded, state, next_tokens, positions, here)
        attend.keep(MTP, here.state)
        return drafted


def _mtp(mtp, embedded, state, next_tokens, positions, attend):
    return mtp(embedded, state, next_tokens, positions, attend)
