# SPDX-License-Identifier: Apache-2.0
"""The gradient rules of the kernel backends, which differ only in the kernels they call.

A backend has `matmul(lhs, rhs, group_sizes, transpose=False)`, with `rhs` an array or `Quantized`,
`outer(lhs, dout, group_sizes, dtype)`, the product that the gradient of the weights is, and
`swiglu(lhs, gate, up, group_sizes, clamp, preactivations)`. The first and the last take a `layer`
as well, of weights `[L, E, D, F]`, which have no gradient.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import groups
from pallas_kernels.grouped_matmul.quantized import Quantized, channel_scales


@jax.custom_vjp
def refused(tree):
    """The tree as it is; whoever asks for a gradient through it is told what to do."""
    return tree


def _refused_forward(tree):
    raise NotImplementedError(
        "no gradient through weights of a stack of layers (layer=...); slice the layer instead: "
        "jax.tree.map(lambda x: x[layer], weights)"
    )


refused.defvjp(_refused_forward, lambda _, dout: (dout,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def matmul(backend, lhs, rhs, group_sizes):
    return backend.matmul(lhs, rhs, group_sizes)


def _matmul_forward(backend, lhs, rhs, group_sizes):
    return matmul(backend, lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _matmul_backward(backend, saved, dout):
    lhs, rhs, group_sizes = saved
    return *_both_sides(backend, lhs, rhs, group_sizes, dout), None


matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def swiglu(backend, lhs, gate, up, group_sizes, clamp):
    return backend.swiglu(lhs, gate, up, group_sizes, clamp, preactivations=False)[0]


def _swiglu_forward(backend, lhs, gate, up, group_sizes, clamp):
    out, g, u = backend.swiglu(lhs, gate, up, group_sizes, clamp, preactivations=True)
    return out, (lhs, gate, up, group_sizes, g, u)


def _swiglu_backward(backend, clamp, saved, dout):
    lhs, gate, up, group_sizes, g, u = saved

    def product(g, u):
        return activation(g.astype(jnp.float32), u.astype(jnp.float32), clamp).astype(dout.dtype)

    dg, du = jax.vjp(product, g, u)[1](dout)
    from_gate, dgate = _both_sides(backend, lhs, gate, group_sizes, dg)
    from_up, dup = _both_sides(backend, lhs, up, group_sizes, du)
    return from_gate + from_up, dgate, dup, None


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def activation(g, u, clamp):
    """`silu(g) * u`; with a clamp, of `min(g, clamp)` and of `u` within `[-clamp, clamp]`."""
    if clamp is not None:
        g, u = jnp.minimum(g, clamp), jnp.clip(u, -clamp, clamp)
    return g * jax.nn.sigmoid(g) * u


def _both_sides(backend, lhs, rhs, group_sizes, dout):
    if not isinstance(rhs, Quantized):
        dlhs = backend.matmul(dout, rhs, group_sizes, transpose=True)
        return dlhs, backend.outer(lhs, dout, group_sizes, rhs.dtype)
    if not rhs.has_gradient:
        raise NotImplementedError(
            f"no gradient through weights of {rhs.values.dtype} with scales {rhs.scales.shape}; "
            "quantize them to int8 or float8_e4m3fn with a scale a channel or 128 x 128 block"
        )
    if rhs.by_channel:  # the scales lie along what is summed over: they go to the other side
        group = jnp.minimum(groups.of_rows(group_sizes, dout.shape[0]), rhs.shape[0] - 1)
        dout = (dout.astype(jnp.float32) * channel_scales(rhs)[group, 0]).astype(dout.dtype)
    return backend.matmul(dout, rhs, group_sizes, transpose=True), None
