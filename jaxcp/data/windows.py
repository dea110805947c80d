# SPDX-License-Identifier: Apache-2.0
"""Windows of token ids, for embeddings that see the tokens before.

The host knows the tokens before each one in natural order and makes windows before tokens are
sharded, so no device has to ask another for a neighbour.
"""

import numpy as np

NONE = -1
"""The id in a window where there is no token: before the start, or in another document."""


def windows(tokens: np.ndarray, width: int, *, before=None, segment_ids=None) -> np.ndarray:
    """Put each token beside the `width - 1` before it, newest first: `[B, T, width]`.

    Width 1 is the tokens themselves, `[B, T]`.

    Args:
      before: `[B, width - 1]`, the tokens before the first one, newest first.
      segment_ids: `[B, T]`; a window ends where its document begins.
    """
    if width == 1:
        return tokens
    rows, length = tokens.shape
    past = np.full((rows, width - 1), NONE, tokens.dtype) if before is None else before[:, ::-1]
    stream = np.concatenate([past, tokens], axis=1)
    last = np.arange(width - 1, width - 1 + length)
    out = np.stack([stream[:, last - i] for i in range(width)], axis=-1).astype(np.int32)
    if segment_ids is not None:
        none = np.full((rows, width - 1), NONE, np.int32)
        segments = np.concatenate([none, segment_ids], axis=1)
        same = np.stack([segments[:, last - i] == segment_ids for i in range(width)], axis=-1)
        out = np.where(same, out, NONE)
    return out
