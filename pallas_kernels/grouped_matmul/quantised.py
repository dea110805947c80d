# SPDX-License-Identifier: Apache-2.0
"""Weights of 8 bits with scales: a product reads half of the bytes, and sums stay in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

BLOCK = 128  # rows and columns that share a scale, as in DeepSeek-V3 (arXiv 2412.19437, 3.3.2)
LARGEST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """`weights = values * scales`, with `scales` spread over what shares one.

    `values`: int8 or float8_e4m3fn `[E, D, F]`. `scales`: float32, `[E, 1, F]` for one a channel,
    `[E, ceil(D / 128), ceil(F / 128)]` for one a block. A pytree; no gradient flows into it.
    """

    values: Array
    scales: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def by_channel(self) -> bool:
        """One scale a channel; a matrix of 128 x 1 or less has both forms, with one meaning."""
        return self.scales.shape[1:] == (1, self.values.shape[2])


def quantise(weights: Float[Array, "E D F"], dtype=jnp.int8, *, block: bool = False) -> Quantised:
    """Round to the nearest: the greatest of what shares a scale becomes the dtype's greatest.

    Args:
      dtype: int8 or float8_e4m3fn.
      block: a scale for every 128 x 128 block instead of one for every column.
    Raises:
      ValueError: another dtype.

    >>> quantise(jnp.ones((2, 256, 384)), jnp.float8_e4m3fn, block=True).scales.shape
    (2, 2, 3)
    """
    largest = _largest(dtype)
    exact = weights.astype(jnp.float32)
    exact_blocks = jnp.abs(_blocks(exact) if block else exact)
    greatest = exact_blocks.max((2, 4)) if block else exact_blocks.max(1, keepdims=True)
    scales = jnp.where(greatest > 0, greatest / largest, 1.0)
    scaled = exact / spread(scales, weights.shape)
    if jnp.dtype(dtype) == jnp.int8:
        scaled = jnp.round(scaled)
    # a quotient may round to just above the greatest, which e4m3fn would make NaN
    return Quantised(jnp.clip(scaled, -largest, largest).astype(dtype), scales)


def dequantise(weights: Quantised, dtype=jnp.float32) -> Float[Array, "E D F"]:
    """The matrices that the values and scales stand for."""
    exact = weights.values.astype(jnp.float32) * spread(weights.scales, weights.shape)
    return exact.astype(dtype)


def spread(scales, shape):
    """Scales `[E, 1, F]` as they are, block scales repeated to `shape`."""
    if scales.shape[1:] == (1, shape[2]):
        return scales
    return columns(scales, shape[2]).repeat(BLOCK, axis=1)[:, : shape[1]]


def columns(scales, width):
    """Scales with one entry a column: `[E, blocks of rows, width]`."""
    if scales.shape[2] == width:
        return scales
    return scales.repeat(BLOCK, axis=2)[:, :, :width]


def check(weights: Quantised) -> None:
    """Raises ValueError: values or scales of a wrong dtype or shape."""
    _largest(weights.values.dtype)
    e, d, f = weights.shape
    forms = (e, 1, f), (e, -(-d // BLOCK), -(-f // BLOCK))
    if weights.scales.shape not in forms or weights.scales.dtype != np.float32:
        raise ValueError(
            f"scales of {weights.shape} are float32 {forms[0]} or {forms[1]}; "
            f"got {weights.scales.dtype} {weights.scales.shape}"
        )


def _largest(dtype):
    if jnp.dtype(dtype) not in LARGEST:
        raise ValueError(
            f"quantised weights are {', '.join(map(str, LARGEST))}; got {jnp.dtype(dtype)}"
        )
    return LARGEST[jnp.dtype(dtype)]


def _blocks(x):
    e, d, f = x.shape
    tall, wide = -(-d // BLOCK), -(-f // BLOCK)
    x = jnp.pad(x, ((0, 0), (0, tall * BLOCK - d), (0, wide * BLOCK - f)))
    return x.reshape(e, tall, BLOCK, wide, BLOCK)


def operand(weights, *, transpose: bool):
    """`(values, scales)` for a kernel; scales `[E, blocks of what is summed over, columns]`.

    None where there are none. Those by channel do not take part in a transposed product: they lie
    along what it sums over, and its caller has multiplied the other side by them.
    """
    if not isinstance(weights, Quantised):
        return weights, None
    if not transpose:
        return weights.values, columns(weights.scales, weights.shape[2])
    if weights.by_channel:
        return weights.values, None
    return weights.values, columns(weights.scales.swapaxes(1, 2), weights.shape[1])
