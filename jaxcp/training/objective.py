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


class Totals(NamedTuple):
    """Sums over a piece of a batch; those of several pieces add up."""

    weight: Float[Array, ""]
    parts: dict[str, Float[Array, ""]]
    """Losses by their name in the record, each times `weight`: `loss` is that of next tokens."""
    stats: RouterStats | None


def objective(
    model: Any, piece: Any, losses: LossConfig, *, draft_scale: Any, chunk: int, **options: Any
) -> tuple[Float[Array, ""], Totals]:
    """Compute the objective times the piece's weight, and its parts.

    Args:
      draft_scale: the whole batch's weight of next tokens over that of drafts.
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
        parts["mtp_loss"] = draft_scale * sum(draft_losses)
        minimized = minimized + losses.mtp_loss_weight * parts["mtp_loss"]
    if stats is not None and losses.balance_loss_weight:
        parts["router_balance_loss"] = weight * stats.balance_loss()
        minimized = minimized + losses.balance_loss_weight * parts["router_balance_loss"]
    if stats is not None and losses.z_loss_weight:
        parts["router_z_loss"] = weight * stats.z_loss()
        minimized = minimized + losses.z_loss_weight * parts["router_z_loss"]
    return minimized, Totals(weight, parts, stats)


def draft_scale(batch: Any) -> Any:
    """The `draft_scale` of `objective`, over all pieces and all depths of drafts."""
    if "draft_weights" not in batch:
        return None
    return batch["weights"].sum() / jnp.maximum(batch["draft_weights"].sum(), 1e-9)
