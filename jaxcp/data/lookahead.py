# SPDX-License-Identifier: Apache-2.0
"""Tokens that come after a token, for layers that draft (MTP).

The host knows them in natural order and puts them beside each token before tokens are sharded, so
no device has to ask another for its first one.
"""

from collections.abc import Mapping

import numpy as np

NONE = 0
"""The id where no token follows: at the end of a row or document. No loss sees its draft."""


def following(tokens: np.ndarray, n: int = 1, *, segment_ids=None) -> np.ndarray:
    """`[B, T, n]`: the n tokens after each of `tokens [B, T]`, the nearest first.

    `segment_ids [B, T]`: a token of another document does not follow.
    """
    rows, length = tokens.shape
    padded = np.concatenate([tokens, np.full((rows, n), NONE, tokens.dtype)], axis=1)
    out = np.stack([padded[:, i : i + length] for i in range(1, n + 1)], axis=-1).astype(np.int32)
    if segment_ids is not None:
        none = np.full((rows, n), -1, np.int32)
        segments = np.concatenate([segment_ids, none], axis=1)
        after = np.stack([segments[:, i : i + length] for i in range(1, n + 1)], axis=-1)
        out = np.where(after == segment_ids[..., None], out, NONE)
    return out


def draft_batch(batch: Mapping[str, np.ndarray], depth: int) -> dict[str, np.ndarray]:
    """The leaves that MTP layers are trained on, `[B, T, depth]` each, of a batch in natural order.

    `following`, and the targets and weights of the token 1, 2, ... places on, `draft_targets` and
    `draft_weights`. In another document, or after the end, there is no target (-1, of weight 0).
    """
    segments = batch.get("segment_ids")
    after = following(batch["tokens"], depth, segment_ids=segments)
    rows, length = batch["tokens"].shape
    if segments is None:
        segments = np.zeros((rows, length), np.int32)
    targets = np.full((rows, length, depth), -1, np.int32)
    weights = np.zeros((rows, length, depth), np.float32)
    for i in range(min(depth, length - 1)):
        here, there = slice(None, length - 1 - i), slice(1 + i, None)
        same = segments[:, here] == segments[:, there]
        targets[:, here, i] = np.where(same, batch["targets"][:, there], -1)
        weights[:, here, i] = np.where(same, batch["weights"][:, there], 0)
    return {"following": after, "draft_targets": targets, "draft_weights": weights}
