# SPDX-License-Identifier: Apache-2.0
"""Tells whether this machine may have an accelerator, without starting jax.

An installed libtpu or CUDA plugin looks for its device as jax starts, and fills a screen where
there is none. Both are installed to compile for chips that are elsewhere.
"""

import glob
import importlib.util
import os
import pkgutil
import re
import sys
from collections.abc import MutableMapping
from importlib import metadata

FILES = (
    "/dev/nvidia[0-9]*", "/dev/nvidiactl", "/dev/dxg",  # dxg: a GPU in WSL2
    "/dev/nvhost*", "/dev/nvgpu*",  # Jetson
    "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/vfio/devices/*",  # a TPU
    "/dev/kfd",  # AMD
)  # fmt: skip
KNOWN = r"(.*\.)?(xla_cuda|xla_rocm|jax_cuda|jax_rocm)\w*"
"""The jax plugins whose device is one of `FILES`."""
SAID = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "PJRT_NAMES_AND_LIBRARY_PATHS")


def device_files() -> list[str]:
    """List the files in /dev that the drivers of GPUs and TPUs make."""
    return [path for pattern in FILES for path in glob.glob(pattern)]


def none_here() -> bool:
    """Tell whether jax surely finds no accelerator here. Linux only: elsewhere False."""
    if sys.platform != "linux" or device_files():
        return False
    return all(re.fullmatch(KNOWN, name) for name in plugins())


def choose_cpu(environment: MutableMapping[str, str] = os.environ) -> None:
    """Tell jax, before it is imported, to use CPUs where `none_here`, unless the user chose."""
    if not any(map(environment.get, SAID)) and none_here():
        environment["JAX_PLATFORMS"] = "cpu"


def plugins() -> set[str]:
    """List the installed jax plugins, as jax itself finds them, without importing any."""
    spec = importlib.util.find_spec("jax_plugins")
    folders = spec.submodule_search_locations if spec else None
    modules = {name for _, name, _ in pkgutil.iter_modules(folders or [])}
    return modules | {point.value for point in metadata.entry_points(group="jax_plugins")}
