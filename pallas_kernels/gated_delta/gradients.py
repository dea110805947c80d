# SPDX-License-Identifier: Apache-2.0
"""The gradient rules of the kernel backends, which differ only in the kernels they call.

A backend has `local` and `scan` (see `xla.py`), and where JAX cannot derive them
`local_backward(arrays, dparts)` and `scan_backward(parts, state, dout, dstate)`. Of a scan its
inputs are saved: states between chunks are made again.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta.tile import Chunk


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def local(backend, *arrays) -> Chunk:
    return backend.local(*arrays)


def _local_forward(backend, *arrays):
    return local(backend, *arrays), arrays


def _local_backward(backend, arrays, dparts):
    grads, document = backend.local_backward(arrays, dparts), arrays[-1]
    groups = (_of_key_heads(d, x) for d, x in zip(grads, arrays[:-1], strict=True))
    return *groups, jnp.zeros_like(document)


def _of_key_heads(grad, x):
    """Sum what heads that share a key head found, in its dtype."""
    if grad.shape != x.shape:
        c, b, heads, *rest = x.shape
        grad = grad.reshape(c, b, heads, -1, *rest).sum(3)
    return grad.astype(x.dtype)


local.defvjp(_local_forward, _local_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(backend, parts: Chunk, state):
    return backend.scan(parts, state)


def _scan_forward(backend, parts, state):
    return scan(backend, parts, state), (parts, state)


def _scan_backward(backend, saved, dresults):
    return backend.scan_backward(*saved, *dresults)


scan.defvjp(_scan_forward, _scan_backward)


class Derivable(NamedTuple):
    """The work of a backend, with its derivative."""

    local: Callable
    scan: Callable


def of(backend: ModuleType) -> Derivable:
    """The work of a backend, derived by its own rules where it has some."""
    if not hasattr(backend, "local_backward"):
        return Derivable(backend.local, backend.scan)
    return Derivable(functools.partial(local, backend), functools.partial(scan, backend))
