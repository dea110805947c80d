# SPDX-License-Identifier: Apache-2.0
"""Reads the dtype of a checkpoint's tensors, for a config.json that does not say it."""

import collections
import math
import os

from jaxcp.weights.files import open_checkpoint

NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def stored_dtype(path: str | os.PathLike) -> str | None:
    """The dtype of most numbers that are not quantized; None where there are no tensors.

    Not of all: a published model in bfloat16 has selection biases in float32.

    Raises:
      ValueError: a file cannot be read.
    """
    try:
        checkpoint = open_checkpoint(path)
    except FileNotFoundError:
        return None
    counts: collections.Counter = collections.Counter()
    for name, dtype in checkpoint.dtypes.items():
        counts[dtype] += math.prod(checkpoint.shapes[name]) if dtype in NAMES else 0
    dtype, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
    return NAMES[dtype] if count else None
