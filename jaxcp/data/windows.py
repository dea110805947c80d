# SPDX-License-Identifier: Apache-2.0
"""Windows of token ids, for embeddings that see the tokens before.

What came before a token is known on the host, in natural order, so windows are made before tokens
are sharded and no device asks another for a neighbour.
"""

import numpy as np

NONE = -1
"""In a window, where there is no such token: before the start, or in another document."""


def windows(tokens: np.ndarray, width: int, *, before=None, segment_ids=None) -> np.ndarray:
    """`[B, T, width]`: each token and the `width - 1` before it, newest first.

    Width 1 is the tokens themselves, `[B, T]`.

    Args:
      before: `[B, width - 1]`, what came before the first token, newest first.
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
