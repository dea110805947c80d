# SPDX-License-Identifier: Apache-2.0
"""The mask: one rule, which every backend implements, on who may see whom.

A key is visible to a query when both hold real tokens, both are of one segment, and the key's
position is not after the query's (causal) and inside the window. Nothing else masks: padding,
packing, ragged batches, zigzag shards and empty cache slots are all positions.
"""

import dataclasses

import jax.numpy as jnp

PAD_POSITION = 2**31 - 1
"""The position of a pad token or an empty cache slot: after every query, so no query sees it."""

NO_POSITION = -1
"""The position that the API gives a pad query: before every key, so it sees nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """The static part of the rule; its arrays (positions, segment ids) are passed beside it.

    `window` counts the query's own position: `window=1` sees only itself. With `causal=False`
    the window reaches as far to the right as to the left.
    """

    causal: bool = True
    window: int | None = None

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 or None; got window={self.window}")

    def visible(self, q_positions, kv_positions, q_segment_ids=None, kv_segment_ids=None):
        """Compute the mask, boolean `[..., T, S]`, from int32 `[..., T]` and `[..., S]`."""
        q, kv = q_positions[..., :, None], kv_positions[..., None, :]
        seen = (kv <= q) if self.causal else (kv != PAD_POSITION) & (q != NO_POSITION)
        if self.window is not None:
            seen &= q - kv < self.window
            if not self.causal:
                seen &= kv - q < self.window
        if q_segment_ids is not None:
            seen &= q_segment_ids[..., :, None] == kv_segment_ids[..., None, :]
        return seen

    def may_see(self, q_min, q_max, kv_min, kv_max):
        """Return False only if no query in `[q_min, q_max]` can see a key in `[kv_min, kv_max]`.

        The bounds are of real positions only; see `bounds`.
        """
        seen = (kv_min <= q_max) & (kv_min != PAD_POSITION) & (q_max != NO_POSITION)
        if not self.causal:
            seen = (kv_min != PAD_POSITION) & (q_max != NO_POSITION)
        if self.window is not None:
            seen &= q_min - kv_max < self.window
            if not self.causal:
                seen &= kv_min - q_max < self.window
        return seen

    def sees_all(self, q_min, q_max, kv_min, kv_max):
        """Return True only if every query of the block sees every key (segments aside).

        The bounds are plain minimum and maximum, pads included.
        """
        seen = (
            (kv_max <= q_min) if self.causal else (kv_max != PAD_POSITION) & (q_min != NO_POSITION)
        )
        if self.window is not None:
            seen &= q_max - kv_min < self.window
            if not self.causal:
                seen &= kv_max - q_min < self.window
        return seen


def bounds(positions, *, pad):
    """Compute the `(min, max)` of each block over the last axis, without `pad` entries.

    A block of nothing but pads gives `(PAD_POSITION, NO_POSITION)`, which `may_see` rejects.
    """
    real = positions != pad
    return (
        jnp.min(jnp.where(real, positions, PAD_POSITION), -1),
        jnp.max(jnp.where(real, positions, NO_POSITION), -1),
    )
