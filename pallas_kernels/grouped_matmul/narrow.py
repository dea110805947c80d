# SPDX-License-Identifier: Apache-2.0
"""Numbers of 4 bits and scales of 8, made and read by arithmetic that a kernel can do too.

e2m1: a sign and 0, 0.5, 1, 1.5, 2, 3, 4 or 6. ue8m0: a power of two, its exponent plus 127.
Source: OCP Microscaling Formats 1.0.
"""

import jax
import jax.numpy as jnp

E2M1_LARGEST, E4M3_LARGEST = 6.0, 448.0
E2M1_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
LEAST = 2.0**-100  # scales stay above what flushes to 0


def to_e2m1(x):
    """Codes, uint8, of the nearest; a tie goes to the even code."""
    size = jnp.abs(x)
    code = jnp.zeros(x.shape, jnp.uint8)
    for i, middle in enumerate(E2M1_MIDDLES):
        code += ((size >= middle) if i % 2 else (size > middle)).astype(jnp.uint8)
    return code | (x < 0).astype(jnp.uint8) << 3


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


def to_ue8m0(ratio):
    """The least power of two that `ratio` does not exceed, as uint8."""
    mantissa, exponent = jnp.frexp(jnp.maximum(ratio, LEAST))
    return (exponent - (mantissa == 0.5).astype(exponent.dtype) + 127).astype(jnp.uint8)


def from_ue8m0(code):
    """Decode to float32; code 0, which is 2 ** -127, flushes to 0, and 255 is NaN."""
    code = code.astype(jnp.int32)
    value = jax.lax.bitcast_convert_type(code << 23, jnp.float32)
    return jnp.where(code == 255, jnp.nan, value)


def to_float32(scales):
    """Decode scales in float32, e4m3 or ue8m0 (as uint8) to float32."""
    return from_ue8m0(scales) if scales.dtype == jnp.uint8 else scales.astype(jnp.float32)
