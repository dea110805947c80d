# SPDX-License-Identifier: Apache-2.0
"""Grouped matmul: rows sorted by group, one weight matrix a group.

A backend with kernels (triton, mosaic_tpu) has the functions that `gradients.py` names; one that
leaves its gradient to JAX (reference, xla) has `forward(lhs, rhs, group_sizes)`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import resolve
from pallas_kernels.grouped_matmul import gradients, stack
from pallas_kernels.grouped_matmul.quantized import Quantized, dequantize
from pallas_kernels.grouped_matmul.quantized import check as check_scales
from pallas_kernels.varying import alike

IMPLEMENTATIONS = ("reference", "xla", "triton", "mosaic_tpu")
KERNELS = ("triton", "mosaic_tpu")
BEST = {"cpu": "xla", "gpu": "triton", "tpu": "mosaic_tpu"}


def grouped_matmul(
    lhs: Float[Array, "M D"],
    rhs: Float[Array, "*L E D F"] | Quantized,
    group_sizes: Int[Array, "E"],
    *,
    layer: Int[Array, ""] | int | None = None,
    implementation: str | None = None,
) -> Float[Array, "M F"]:
    """`out[m] = lhs[m] @ rhs[group of row m]`; rows lie sorted by group, groups may be empty.

    Rows past the sum of `group_sizes` give 0, and a gradient of 0; a sum above `M` is undefined.
    Accumulates in float32. Differentiable in `lhs`, and in `rhs` unless it is `Quantized`.

    Args:
      rhs: matrices, or `quantize(matrices)`, whose values stay 8 bits wide in memory.
      layer: where it is given, `rhs` is a stack of layers, each array `[L, E, ...]`, and that
        layer's weights are used. Kernels read them where they lie, so that a scan over layers
        copies none; but a layer's are copied where Mosaic pads them, and where an array of 8 bits
        in Triton takes 2 to 4 GiB. A traced index that is out of range takes the nearest layer.
      implementation: "reference", "xla", "triton", "mosaic_tpu"; None takes the platform's best.
    Raises:
      ValueError: shapes that do not fit, a layer that is not there, an unknown implementation.
      NotImplementedError: dtypes that the chosen implementation has no path for; a gradient where
        `layer` is given: slice the layer instead.

    Source: Gale et al., MegaBlocks (arXiv 2211.15841).

    >>> grouped_matmul(jnp.ones((4, 2)), jnp.ones((3, 2, 5)), jnp.array([1, 0, 3])).shape
    (4, 5)
    """
    _check(lhs, rhs, group_sizes, layer)
    backend = resolve("grouped_matmul", implementation, IMPLEMENTATIONS, BEST)
    if layer is not None:
        layer = _within(layer, rhs.shape[0])
        lhs, rhs = gradients.refused((lhs, rhs))
    if not _has_kernels(backend):
        rhs = stack.one_layer(rhs, layer)
        return backend.forward(lhs, _exact(rhs, lhs.dtype), group_sizes)
    _supported(backend, lhs, rhs)
    lhs, rhs, group_sizes, layer = alike(lhs, rhs, group_sizes, layer)
    if layer is not None:
        return backend.matmul(lhs, rhs, group_sizes, layer=layer)
    return gradients.matmul(backend, lhs, rhs, group_sizes)


def grouped_swiglu(
    lhs: Float[Array, "M D"],
    gate: Float[Array, "*L E D F"] | Quantized,
    up: Float[Array, "*L E D F"] | Quantized,
    group_sizes: Int[Array, "E"],
    *,
    layer: Int[Array, ""] | int | None = None,
    clamp: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "M F"]:
    """`silu(g) * u` with `g = lhs @ gate` and `u = lhs @ up` of each row's group, in one kernel.

    Neither product goes through memory; for a gradient both are written beside the result. As
    `grouped_matmul` in all else.

    Args:
      layer: where it is given, `gate` and `up` are stacks of layers, as in `grouped_matmul`.
      clamp: `min(g, clamp)` and `u` within `[-clamp, clamp]`, as DeepSeek-V4 has it.
    Raises:
      ValueError, NotImplementedError: as `grouped_matmul`; a clamp that is not positive.

    Source: Shazeer (arXiv 2002.05202).

    >>> w = jnp.ones((3, 2, 5))
    >>> grouped_swiglu(jnp.ones((4, 2)), w, w, jnp.array([1, 0, 3])).shape
    (4, 5)
    """
    _check(lhs, gate, group_sizes, layer)
    _check(lhs, up, group_sizes, layer)
    if _form(gate) != _form(up):
        raise ValueError(f"gate and up are alike; got {_form(gate)} and {_form(up)}")
    if clamp is not None and clamp <= 0:
        raise ValueError(f"clamp must be positive; got clamp={clamp}")
    backend = resolve("grouped_matmul", implementation, IMPLEMENTATIONS, BEST)
    if layer is not None:
        layer = _within(layer, gate.shape[0])
        lhs, gate, up = gradients.refused((lhs, gate, up))
    if not _has_kernels(backend):
        gate, up = stack.one_layer((gate, up), layer)
        acc = np.promote_types(lhs.dtype, np.float32)
        g, u = (backend.forward(lhs, _exact(w, lhs.dtype), group_sizes) for w in (gate, up))
        return gradients.activation(g.astype(acc), u.astype(acc), clamp).astype(lhs.dtype)
    _supported(backend, lhs, gate)
    _supported(backend, lhs, up)
    lhs, gate, up, group_sizes, layer = alike(lhs, gate, up, group_sizes, layer)
    if layer is not None:
        given = lhs, gate, up, group_sizes, clamp
        return backend.swiglu(*given, preactivations=False, layer=layer)[0]
    return gradients.swiglu(backend, lhs, gate, up, group_sizes, clamp)


def _form(weights):
    """The shapes and dtypes of arguments; of quantized weights the packing too."""
    if not isinstance(weights, Quantized):
        return weights.shape
    form = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", weights)
    return form


def _has_kernels(backend):
    return backend.__name__.split(".")[-1] in KERNELS


def _exact(rhs, dtype):
    return dequantize(rhs, dtype) if isinstance(rhs, Quantized) else rhs


def _check(lhs, rhs, group_sizes, layer):
    if (
        lhs.ndim != 2
        or rhs.ndim != (3 if layer is None else 4)
        or lhs.shape[1] != rhs.shape[-2]
        or group_sizes.shape != rhs.shape[-3:-2]
    ):
        form = "rhs [E,D,F]" if layer is None else "with a layer rhs [L,E,D,F]"
        raise ValueError(
            f"needs lhs [M,D], {form}, group_sizes [E]; "
            f"got {lhs.shape}, {rhs.shape}, {group_sizes.shape}, layer={layer}"
        )
    if isinstance(rhs, Quantized):
        check_scales(rhs)


def _within(layer, layers):
    """An index into a stack: a kernel would read whatever lies past it."""
    if isinstance(layer, int | np.integer) and not 0 <= layer < layers:
        raise ValueError(f"layer must be one of {layers}, from 0; got layer={layer}")
    index = jnp.asarray(layer)
    if index.ndim or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(f"layer is one integer; got {index.dtype} {index.shape}")
    return jnp.clip(index.astype(jnp.int32), 0, layers - 1)


def _supported(backend, lhs, rhs):
    dtypes = {lhs.dtype} if isinstance(rhs, Quantized) else {lhs.dtype, rhs.dtype}
    if len(dtypes) > 1 or lhs.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(
            f"grouped_matmul {backend.__name__.split('.')[-1]}: rows and weights both float32 or "
            f"both bfloat16, or weights quantized; got {', '.join(map(str, dtypes))}; "
            "use implementation='xla' or 'reference'"
        )
