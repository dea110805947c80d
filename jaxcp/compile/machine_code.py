# SPDX-License-Identifier: Apache-2.0
"""Compile a kernel for a chip that is not there, and read its machine code: one process a chip.

libtpu and XLA take the flags that make them write their programs once, when they are loaded. So a
compiler here is made before anything else uses jax in its process, and serves one chip.
"""

import dataclasses
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxcp.compile import gpu_code, tpu_code
from jaxcp.compile.report import compile_for
from jaxcp.compile.target import parse_target

SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
"""A small slice of each TPU that libtpu knows."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program's kernels by name; seconds of compiling, on the clock and of CPU in all threads."""

    seconds: float
    cpu_seconds: float
    kernels: dict[str, tpu_code.Kernel] | dict[str, gpu_code.Kernel]


class Compiler:
    """Compiles programs for one device of `chip`, a name in `pallas_kernels.devices`.

    Args:
      chip: "v6e", "rtx-pro-6000", ...
      dumps: write and read machine code. Without, `kernels` is empty and compiling is timed as a
        user would see it.
    Raises:
      ImportError: the chip's compiler is not installed.
      FileNotFoundError: a GPU's machine code needs ptxas and nvdisasm.
    """

    def __init__(self, chip: str, *, dumps: bool = True):
        self.chip, self.dumps = chip, dumps
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix=f"{chip}-"))
        jax.config.update("jax_platforms", "cpu")
        tpu = chip in SLICES
        if dumps:
            self._dump("LIBTPU_INIT_ARGS" if tpu else "XLA_FLAGS", tpu)
        target = parse_target(SLICES[chip] if tpu else f"{chip}:1")
        devices = target.mesh(seq=target.size).devices.flat[:1]
        self.mesh = Mesh(devices.reshape(1), ("seq",))
        # the first program pays for loading the compiler
        compile_for(jnp.sin, (jax.ShapeDtypeStruct((8, 128), jnp.float32),), self.mesh)
        if dumps and not any(self.folder.iterdir()):
            raise RuntimeError(f"jax was used before the compiler for {chip} was made: no dumps")
        self._clean()

    def __call__(self, fn: Callable, args: tuple) -> Compiled:
        """Compile `fn(*args)` and read its kernels.

        Raises:
          jax.errors.JaxRuntimeError: the compiler refuses, for memory on the chip for instance.
          ValueError: the machine code is in another format than this version knows.
        """
        try:
            cpu, start = time.process_time(), time.perf_counter()
            report = compile_for(fn, args, self.mesh)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            read = tpu_code.kernels if self.chip in SLICES else gpu_code.kernels
            kernels = read(self.folder) if self.dumps else {}
            if self.dumps and report.kernels and not kernels:
                raise ValueError(f"no matrix work in {report.kernels} kernels; the format changed")
            return Compiled(seconds, cpu, kernels)
        finally:
            self._clean()

    def here(self):
        """A context in which code is traced for the chip."""
        return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _dump(self, variable: str, tpu: bool) -> None:
        if not tpu:
            for tool in gpu_code.TOOLS:
                gpu_code.find_tool(tool)
        flags = tpu_code.init_args(self.folder) if tpu else gpu_code.dump_flags(self.folder)
        os.environ[variable] = f"{os.environ.get(variable, '')} {flags}".strip()

    def _clean(self) -> None:
        for path in self.folder.iterdir():
            path.unlink() if path.is_file() else shutil.rmtree(path)
