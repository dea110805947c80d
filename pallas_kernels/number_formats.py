# SPDX-License-Identifier: Apache-2.0
"""Numbers of 8 bits and fewer: their values, and the one way in which they are rounded.

    e2m1    4 bits: a sign and 0, 0.5, 1, 1.5, 2, 3, 4 or 6
    int4    4 bits: -8 to 7 in two's complement
    e4m3    8 bits, to 448 (`float8_e4m3fn`)
    ue8m0   8 bits without a sign: a power of two, its exponent plus 127; 255 is NaN

`to_e2m1` and `to_ue8m0` take arrays of NumPy and of JAX: what a checkpoint holds and what
`quantize` makes are the same bits. `four_times_e2m1`, `from_int4` and `from_ue8m0` are arithmetic
that a kernel can do. Source: OCP Microscaling Formats 1.0.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*MAGNITUDES, *(-x for x in MAGNITUDES))
"""Values of e2m1 by their code."""
E2M1_LARGEST, E4M3_LARGEST, INT8_LARGEST, INT4_LARGEST = MAGNITUDES[-1], 448.0, 127.0, 7.0
LARGEST = {"int8": INT8_LARGEST, "float8_e4m3fn": E4M3_LARGEST}
"""The greatest value of a dtype of 8 bits."""
LEAST = 2.0**-100  # scales stay above what flushes to 0


def to_e2m1(x):
    """Codes, uint8, of the nearest; a tie goes to the even code."""
    size = abs(x)
    code = (x < 0).astype(np.uint8) << 3
    for i, (low, high) in enumerate(itertools.pairwise(MAGNITUDES)):
        middle = (low + high) / 2
        code += ((size >= middle) if i % 2 else (size > middle)).astype(np.uint8)
    return code


def four_times_e2m1(both, *, high: bool = False):
    """Decode 4 times the value in the low, or `high`, 4 bits of int32, to float32.

    Ignores other bits. Moved to where float32 has exponent and mantissa, with a bias, the bits are
    g: the result from a value of 1 on. Below, where a number has no leading 1, it is 2 g - 4.
    """
    shift = 4 if high else 0
    size = both << (22 - shift) & 7 << 22 | 128 << 23
    g = jax.lax.bitcast_convert_type(size, jnp.float32)
    size = jnp.minimum(g, 2 * g - 4)
    sign = both << (28 - shift) & -(1 << 31)
    bits = jax.lax.bitcast_convert_type(size, jnp.int32) | sign
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def to_int4(x):
    """Codes, uint8, of the nearest within -7 to 7; a tie goes to the even value."""
    return x.clip(-INT4_LARGEST, INT4_LARGEST).round().astype(np.int8).view(np.uint8) & 15


def from_int4(both, *, high=False):
    """Decode the value in the low, or `high`, 4 bits of int32, to float32; ignore other bits."""
    return (both << (24 if high else 28) >> 28).astype(jnp.float32)


def to_ue8m0(ratio):
    """The least power of two that `ratio` does not exceed, as uint8."""
    bits = ratio.astype(np.float32).clip(LEAST).view(np.int32)
    return (bits + ((1 << 23) - 1) >> 23).astype(np.uint8)  # any mantissa carries into the exponent


def from_ue8m0(code):
    """Decode to float32; code 0, which is 2 ** -127, flushes to 0, and 255 is NaN."""
    code = code.astype(jnp.int32)
    value = jax.lax.bitcast_convert_type(code << 23, jnp.float32)
    return jnp.where(code == 255, jnp.nan, value)


def to_float32(scales):
    """Decode scales in float32, bfloat16, e4m3 or ue8m0 (as uint8) to float32."""
    return from_ue8m0(scales) if scales.dtype == jnp.uint8 else scales.astype(jnp.float32)
