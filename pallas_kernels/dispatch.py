# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an operation runs: a name the caller gave, or the platform's best."""

import importlib
from types import ModuleType

import jax


def target_platform() -> str:
    """Platform that the code being traced is for: "cpu", "gpu" or "tpu".

    The mesh in scope knows it even when its devices are described and not there; without a mesh
    it is the default backend's.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else getattr(mesh, "abstract_device", None)
    platform = getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm", "gpu") else platform


def resolve(
    op: str, implementation: str | None, names: tuple[str, ...], best: dict[str, str]
) -> ModuleType:
    """The module of `pallas_kernels.<op>` that implements it.

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
