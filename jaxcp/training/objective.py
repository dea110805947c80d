# SPDX-License-Identifier: Apache-2.0
"""The objective of a step: the loss of next tokens, and by `LossConfig` of drafts and routers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcp.layers.quantized import quantized_names
from jaxcp.layers.router_stats import RouterStats
from jaxcp.training.config import LossConfig
from jaxcp.training.loss import chunked_cross_entropy
from pallas_kernels import PAD_POSITION


class Totals(NamedTuple):
    """Sums over a piece of a batch; those of several pieces add up."""

    weight: Float[Array, ""]
    parts: dict[str, Float[Array, ""]]
    """Losses by their name in the record, each times `weight`: `loss` is that of next tokens."""
    stats: RouterStats | None


class Scales(NamedTuple):
    """The whole batch's weight of next tokens, over what other losses are means of."""

    drafts: Float[Array, ""] | None
    """Over the weight of drafts of all depths; None without any."""
    tokens: Float[Array, ""]
    """Over the number of tokens, which routers see whether they are learnt or not."""


def objective(
    model: Any, piece: Any, losses: LossConfig, *, scales: Scales | None, chunk: int, **options: Any
) -> tuple[Float[Array, ""], Totals]:
    """Compute the objective times the piece's weight, and its parts.

    Args:
      scales: of the whole batch; None where next tokens alone are learnt.
      options: as `model.hidden` takes them.
    Raises:
      NotImplementedError: weights of the model are quantized.
    """
    if fixed := quantized_names(model):
        raise NotImplementedError(
            f"training needs plain weights, no gradient flows into quantized ones; got "
            f"{len(fixed)} of them, such as {fixed[0]}. Train the model that they were made of"
        )
    tokens, positions = piece["tokens"], piece["positions"]
    options["segment_ids"] = piece.get("segment_ids")
    options["length"] = positions.shape[1]  # where order counts, `TrainConfig` lets nothing fill up
    drafts: list[jax.Array] = []
    if "following" in piece:
        following = piece["following"]
        x, drafts, stats = model.hidden_and_drafts(tokens, following, positions, **options)
    else:
        x, stats = model.hidden(tokens, positions, **options)
    head = model.head_kernel()
    total, weight = chunked_cross_entropy(x, head, piece["targets"], piece["weights"], chunk=chunk)
    parts, minimized = {"loss": total}, total
    if drafts:
        draft_losses = [
            chunked_cross_entropy(
                x, head, piece["draft_targets"][..., i], piece["draft_weights"][..., i], chunk=chunk
            )[0]
            for i, x in enumerate(drafts)
        ]
        assert scales is not None and scales.drafts is not None
        parts["mtp_loss"] = scales.drafts * sum(draft_losses)
        minimized = minimized + losses.mtp_loss_weight * parts["mtp_loss"]
    for name, factor, mean in (
        ("router_balance_loss", losses.balance_loss_weight, RouterStats.balance_loss),
        ("router_z_loss", losses.z_loss_weight, RouterStats.z_loss),
    ):
        if stats is not None and factor:
            assert scales is not None
            parts[name] = scales.tokens * _tokens(piece) * mean(stats)
            minimized = minimized + factor * parts[name]
    return minimized, Totals(weight, parts, stats)


def scales_of(batch: Any) -> Scales:
    """The `Scales` of all pieces of a batch."""
    weight, drafts = batch["weights"].sum(), None
    if "draft_weights" in batch:
        drafts = weight / jnp.maximum(batch["draft_weights"].sum(), 1e-9)
    return Scales(drafts, weight / jnp.maximum(_tokens(batch), 1))


def _tokens(batch: Any) -> jax.Array:
    return jnp.asarray((batch["positions"] != PAD_POSITION).sum(), jnp.float32)
