# SPDX-License-Identifier: Apache-2.0
"""Tokens that come after a token, for layers that draft (MTP).

They are known on the host, in natural order, so they are put beside each token before tokens are
sharded, and no device asks another for its first one.
"""

import numpy as np

NONE = 0
"""Where there is no such token: after the end, or in another document. Its draft means nothing."""


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
