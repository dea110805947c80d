# SPDX-License-Identifier: Apache-2.0
"""MXFP4 as gpt-oss publishes its experts: 4 bits a value, one scale for each 32.

Two tensors in place of one, `X_blocks [E, out, in / 32, 16]` and `X_scales [E, out, in / 32]`, both
bytes. A byte holds two values of E2M1, the lower half first; a scale is a power of two, 127 more
than its exponent. Source: OCP Microscaling Formats 1.0.
"""

from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np

NAME = "MXFP4"
SUFFIXES = "_blocks", "_scales"
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = np.array([*MAGNITUDES, *(-x for x in MAGNITUDES)], np.float32)


def packed(dtypes: Mapping[str, str]) -> Iterable[str]:
    """Find the tensors that come in two parts."""
    blocks, scales = SUFFIXES
    names = [name.removesuffix(blocks) for name in dtypes if name.endswith(blocks)]
    return [n for n in names if dtypes[n + blocks] == dtypes.get(n + scales) == "U8"]


def shape(blocks: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...]:
    """The shape `[E, in, out]` of the tensor that two parts stand for, as gpt-oss has it unpacked.

    Raises:
      ValueError: parts that do not belong together.
    """
    if len(blocks) != 4 or blocks[:-1] != scales or blocks[-1] != 16:
        raise ValueError(
            "MXFP4: blocks are [E, out, in / 32, 16] and scales [E, out, in / 32]; "
            f"got {blocks} and {scales}"
        )
    experts, out, groups, _ = blocks
    return experts, 32 * groups, out


def unpack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Decode to `[E, in, out]` in bfloat16, which holds every value exactly."""
    result = np.empty(shape(blocks.shape, scales.shape), ml_dtypes.bfloat16)
    for expert, exponents in enumerate(scales.astype(np.int32) - 127):  # one at a time: memory
        both = np.stack([blocks[expert] & 0x0F, blocks[expert] >> 4], axis=-1)
        values = np.ldexp(VALUES[both].reshape(*exponents.shape, 32), exponents[..., None])
        result[expert] = values.reshape(len(values), -1).T.astype(ml_dtypes.bfloat16)
    return result
