# SPDX-License-Identifier: Apache-2.0
"""What a step minimises: next tokens, and by `LossConfig` drafts and the routers' losses."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcp.layers.quantized import quantized_names
from jaxcp.layers.router_stats import RouterStats
from jaxcp.training.config import LossConfig
from jaxcp.training.loss import chunked_cross_entropy


class Totals(NamedTuple):
    """Of a piece of a batch; pieces add up."""

    weight: Float[Array, ""]
    parts: dict[str, Float[Array, ""]]
    """Losses by their name in the record, each times `weight`: `loss` is that of next tokens."""
    stats: RouterStats | None


def objective(
    model: Any, piece: Any, losses: LossConfig, *, draft_scale: Any, chunk: int, **options: Any
) -> tuple[Float[Array, ""], Totals]:
    """What to minimise, times the piece's weight, and its parts.

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
    drafts: list[jax.Array] = []
    if "following" in piece:
        following = piece["following"]
        x, drafts, stats = model.hidden_and_drafts(tokens, following, positions, **options)
    else:
        x, stats = model.hidden(tokens, positions, **options)
    head = model.head_kernel()
    total, weight = chunked_cross_entropy(x, head, piece["targets"], piece["weights"], chunk=chunk)
    parts, wanted = {"loss": total}, total
    if drafts:
        found = [
            chunked_cross_entropy(
                x, head, piece["draft_targets"][..., i], piece["draft_weights"][..., i], chunk=chunk
            )[0]
            for i, x in enumerate(drafts)
        ]
        parts["mtp_loss"] = draft_scale * sum(found)
        wanted = wanted + losses.mtp_loss_weight * parts["mtp_loss"]
    if stats is not None and losses.balance_loss_weight:
        parts["router_balance_loss"] = weight * stats.balance_loss()
        wanted = wanted + losses.balance_loss_weight * parts["router_balance_loss"]
    if stats is not None and losses.z_loss_weight:
        parts["router_z_loss"] = weight * stats.z_loss()
        wanted = wanted + losses.z_loss_weight * parts["router_z_loss"]
    return wanted, Totals(weight, parts, stats)


def draft_scale(batch: Any) -> Any:
    """`objective`'s, of all pieces together; the weight of drafts is that of every depth."""
    if "draft_weights" not in batch:
        return None
    return batch["weights"].sum() / jnp.maximum(batch["draft_weights"].sum(), 1e-9)
