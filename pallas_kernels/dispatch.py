# SPDX-License-Identifier: Apache-2.0
"""Chooses the implementation of an operation: the caller's name, or the platform's best."""

import importlib
from types import ModuleType
from typing import TypeVar

import jax
import jax.numpy as jnp

INTERPRETED = "interpreted"
"""The kind of device that stands for the interpreter in a table of block sizes."""

Row = TypeVar("Row")

# A part of the key of every jit cache: a program traced under one row never serves another.
_trial = jax.make_user_context(default_value=None)


def trying(op: str, row):
    """Try block sizes: inside `with`, `row` goes before the table that has `op`.

    >>> with trying("triton_forward", Blocks(q=64, kv=64)):
    ...     jax.jit(attend)(q, k, v)
    """
    return _trial((op, row))


def target_platform() -> str:
    """The platform that the code being traced is for: "cpu", "gpu" or "tpu".

    The mesh in scope knows it even when its devices are described and not there; without a mesh
    it is the default backend's.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else getattr(mesh, "abstract_device", None)
    platform = getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm", "gpu") else platform


def device_kind() -> str:
    """The chip that the code being traced is for: the mesh's, or the default backend's."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else getattr(mesh, "abstract_device", None)
    kind = getattr(device, "device_kind", None) or jax.devices()[0].device_kind
    return "TPU v5p" if kind == "TPU v5" else kind  # no row for it could leave out "TPU v5 lite"


def block_sizes(
    table: tuple[tuple[str, str, int, int, Row], ...],
    op: str,
    size: int,
    dtype,
    *,
    interpret: bool,
    what: str,
) -> Row:
    """Look up the first row of `table` for `op` on the device in scope.

    A line of the table: operation, start of the device kind, most `size`, most bytes an element of
    `dtype`, row. `what` says in the error what `size` is.

    Raises:
      NotImplementedError: no line holds this.
    """
    if _trial.value is not None and _trial.value[0] == op:
        return _trial.value[1]
    kind = INTERPRETED if interpret else device_kind()
    itemsize = jnp.dtype(dtype).itemsize
    for name, target, most, most_bytes, row in table:
        if name == op and kind.startswith(target) and size <= most and itemsize <= most_bytes:
            return row
    raise NotImplementedError(f"{op}: no block sizes for {kind!r}, {what}={size}, {dtype}")


def resolve(
    op: str, implementation: str | None, names: tuple[str, ...], best: dict[str, str]
) -> ModuleType:
    """Import the module of `pallas_kernels.<op>` that implements it.

    Args:
      implementation: a name in `names`, or None for `best[target_platform()]`, else "xla".
    Raises:
      ValueError: the name is unknown.
    """
    if implementation is None:
        implementation = best.get(target_platform(), "xla")
    if implementation not in names:
        raise ValueError(
            f"{op}: implementation must be one of {names} or None; got {implementation!r}"
        )
    return importlib.import_module(f"pallas_kernels.{op}.{implementation}")
