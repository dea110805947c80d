# SPDX-License-Identifier: Apache-2.0
"""Slots of a pool in 8 bits: values, and for each token's head the scale that they are times.

What is written is quantized first, so new tokens see their own keys as later ones will: an answer
does not depend on how a prompt was cut or shared. Few queries read 8 bits where they lie
(`decode_attention`); many are given one layer of their rows in the dtype of the queries. A token
that is not finite gets a scale that is none, so what sees it is not finite either.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels import quantize_cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EightBits:
    """`values [L, P, page, K, H]`, int8 or float8_e4m3fn, and float32 `scales [L, P, K, page]`."""

    values: Any
    scales: Any


def spec_of(stack: Any, place: Any) -> Any:
    """Mesh axes of slots with heads, `stack` in 8 bits or not."""
    values = P(*place.stack, "model", None)
    if not isinstance(stack, EightBits):
        return values
    layers, pages, page = place.stack
    return EightBits(values, P(layers, pages, "model", page))


def write(place: Any, stack: Any, layer: Any, new: Any) -> Any:
    """The layer's slots with the rows `new [B, T, K, H]`, in 8 bits where the stack is."""
    if not isinstance(stack, EightBits):
        return place.write(stack, layer, new)
    values, scales = quantize_cache(new, stack.values.dtype)
    return EightBits(
        place.write(stack.values, layer, values),
        place.write(stack.scales, layer, scales.swapaxes(1, 2), slots_last=True),
    )


def read(place: Any, stack: Any, layer: Any, dtype: Any, used: int | None = None) -> jax.Array:
    """Rows `[B, used, K, H]` of this shard in `dtype`."""
    if not isinstance(stack, EightBits):
        return place.read(stack, layer, used).astype(dtype)
    values = place.read(stack.values, layer, used).astype(jnp.float32)
    scales = place.read(stack.scales, layer, used, slots_last=True)
    return (values * scales[..., None]).astype(dtype)


def in_place(k: Any, v: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Keys, values and scales as `decode_attention` takes them."""
    if not isinstance(k, EightBits):
        return k, v, {}
    return k.values, v.values, {"k_scale": k.scales, "v_scale": v.scales}
