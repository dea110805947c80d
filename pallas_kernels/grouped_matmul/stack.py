# SPDX-License-Identifier: Apache-2.0
"""Weights of a stack of layers, `[L, E, ...]`, of which a product takes one layer's.

A slice in front of a kernel copies every expert of the layer. A kernel is given the whole stack
instead, as `L * E` matrices, and reads those of its layer where they lie.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.quantized import Quantized


def one_layer(weights, layer):
    """A layer's weights, `[E, ...]`."""
    if layer is None:
        return weights
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), weights)


def all_matrices(weights, layer):
    """The weights as `[L * E, ...]`; scales that no kernel reads as they are stay `[E, ...]`."""
    if layer is None:
        return weights
    whole = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), weights)
    if not isinstance(weights, Quantized) or weights.is_fine or weights.scales_are_final:
        return whole
    scales, channel_scales = one_layer((weights.scales, weights.channel_scales), layer)
    return dataclasses.replace(whole, scales=scales, channel_scales=channel_scales)


def matrix_of(group, groups, layer):
    """Choose which of `L * E` matrices each group has; rows past the last group are given any."""
    group = jnp.minimum(group, groups - 1)
    return group if layer is None else layer * groups + group


def index(matrix, length, matrices):
    """Find a matrix in an array of `length`: one of all, of a layer's, or the only one."""
    return matrix if length == matrices else jax.lax.rem(matrix, jnp.int32(length))
