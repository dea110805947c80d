# SPDX-License-Identifier: Apache-2.0
"""Steps that were skipped because their gradients are not finite, and why a run ends of them."""

from typing import Any


class Skips:
    """Counts the steps that were skipped: `total` of the run, `in_row` up to the last one.

    Args:
      limit: so many in a row are too many.
    """

    def __init__(self, limit: int, total: int):
        self.limit, self.total, self.in_row = limit, total, 0

    def add(self, out: Any) -> bool:
        """Count a step by what it returned, waiting for it; tell whether it was skipped."""
        skipped = bool(out["skipped"])
        self.total += skipped
        self.in_row = self.in_row + 1 if skipped else 0
        return skipped

    def too_many(self, step: int, *, last: bool) -> bool:
        """Tell whether the run must end: at its limit, or done with every step of it skipped."""
        return self.in_row >= self.limit or (last and self.total == step)


def sources_of(locate: Any, rows: int) -> str:
    """Say where the rows of a batch were read, by `locate(row, place)`; those of up to three."""
    if locate is None:
        return "its source does not say where it was read"
    more = f" and {rows - 3} more" if rows > 3 else ""
    return "its rows begin at " + "; ".join(locate(row, 0) for row in range(min(rows, 3))) + more


def verdict(before: float | None) -> str:
    """Say whether the batch or the rate is at fault.

    Args:
      before: the loss that the weights, which a skipped step leaves alone, give the batch of the
        last step that was not skipped; not finite, where it can no longer be trained on; None,
        where there was no such step.
    """
    if before is None:
        return (
            "No step before was finite: look at the weights that the run began with, or lower the "
            "learning rate or raise warmup_steps"
        )
    if before != before or abs(before) == float("inf"):
        return (
            "The batch of the last good step is not finite any more either: the weights have "
            "diverged. Lower the learning rate or raise warmup_steps"
        )
    return (
        f"The same weights give the batch of the last good step a loss of {before:.4g} and finite "
        "gradients: the data is at fault, not the learning rate. Take it out or mend it"
    )
