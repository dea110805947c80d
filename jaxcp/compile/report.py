# SPDX-License-Identifier: Apache-2.0
"""Compile a program for a mesh, present or described, and say what it will cost there."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcp.compile.hlo import Collective, collectives, kernel_calls
from jaxcp.context_parallel.overlap import compiler_options as overlap
from pallas_kernels.devices import find

MIB = 1 << 20
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The compiler's account of one program. Bytes are per device, and exact.

    `total_bytes` are needed at once: arguments, outputs and temporaries, less donated arguments.
    `hbm_bytes` is the device's memory, None for one that is not in the table.
    `collectives` and `kernels` are None where this jaxlib cannot read the compiled program.
    """

    target: str
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    total_bytes: int
    hbm_bytes: int | None
    compile_seconds: float
    collectives: tuple[Collective, ...] | None
    kernels: int | None

    def __str__(self):
        sizes = [self.argument_bytes, self.output_bytes, self.temp_bytes, self.total_bytes]
        rows = zip(("arguments", "outputs", "temporaries", "together"), sizes, strict=True)
        lines = [self.target, f"compiled in {self.compile_seconds:.1f} s", "", "memory per device"]
        lines += [f"  {name:<20} {size / MIB:>12,.1f} MiB" for name, size in rows]
        if self.hbm_bytes:
            share = self.total_bytes / self.hbm_bytes
            lines[-1] += f" = {share:.1%} of {self.hbm_bytes / MIB / 1024:,.0f} GiB"
        if self.collectives is None:
            unread = (
                "collectives and kernels: not known, this jaxlib cannot read this libtpu's program"
            )
            return "\n".join([*lines, "", unread, "install the libtpu that jax pins: jax[tpu]"])
        lines += ["", f"{'collectives per step':<22} {'count':>12} {'MiB per device':>16}"]
        for c in self.collectives:
            lines.append(
                f"  {c.kind:<20} {c.count:>12,} {c.bytes / MIB:>16,.1f}  {c.note}".rstrip()
            )
        if not self.collectives:
            lines.append("  none")
        return "\n".join([*lines, "", f"{'Pallas kernel calls':<22} {self.kernels:>12,}"])


def compile_for(
    fn: Callable,
    args: tuple,
    target_mesh: Mesh,
    compiler_options: Mapping[str, Any] | None = None,
) -> Report:
    """Compile `fn(*args)` for the devices of `target_mesh` and read the result; run nothing.

    Args:
      fn: a function, jitted or not; the donation and static arguments of `jax.jit` hold.
      args: arrays or `jax.ShapeDtypeStruct`s, in any trees. A leaf keeps the `PartitionSpec` of
        its sharding; a leaf without one is replicated.
      target_mesh: `parse_target(...).mesh(...)`, or a mesh of devices that are there.
      compiler_options: as for `jax.jit`, besides those of `jaxcp.context_parallel`.
    Raises:
      jax.errors.JaxRuntimeError: the compiler refuses; out of memory it names the buffers.

    >>> mesh = parse_target("v6e:2x4").mesh(seq=8)
    >>> print(compile_for(step, (state, batch), mesh))
    """
    device = target_mesh.devices.flat[0]
    platform = "cuda" if device.platform == "gpu" else device.platform
    jitted = fn if hasattr(fn, "trace") else jax.jit(fn)
    start = time.perf_counter()
    # The abstract mesh tells Pallas which device it is for. A concrete one would let jax try to
    # put constants on devices that are not there.
    with jax.sharding.use_abstract_mesh(target_mesh.abstract_mesh):
        traced = jitted.trace(*on_mesh(args, target_mesh))
        lowered = traced.lower(lowering_platforms=(platform,))
    options = {**overlap(platform), **(compiler_options or {})}
    compiled = lowered.compile(compiler_options=options)
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), _text(compiled)
    sizes = (
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
    )
    chip = find(device.device_kind)
    axes = ", ".join(f"{name} {size}" for name, size in target_mesh.shape.items())
    return Report(
        target=f"{target_mesh.size} x {chip.name if chip else device.device_kind} ({axes})",
        argument_bytes=sizes[0],
        output_bytes=sizes[1],
        temp_bytes=sizes[2],
        total_bytes=sum(sizes) - memory.alias_size_in_bytes,
        hbm_bytes=chip.hbm_bytes_per_device if chip else None,
        compile_seconds=seconds,
        collectives=None if text is None else tuple(collectives(text)),
        kernels=None if text is None else kernel_calls(text),
    )


def _text(compiled: jax.stages.Compiled) -> str | None:
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        # Some programs of libtpu 0.0.52 hold an async-update that the jaxlib of jax 0.10 refuses;
        # libtpu 0.0.42, which that jax pins, writes none.
        if "RET_CHECK" not in str(error):
            raise
        logger.warning("this jaxlib cannot read the compiled program: %s", error)
        return None


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    """Describe a tree's arrays as `jax.ShapeDtypeStruct`s, sharded over `mesh` by their specs.

    A leaf whose sharding has no spec is replicated; a leaf that is no array stays.
    """

    def one(x):
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            return x
        sharding = getattr(x, "sharding", None)
        spec = sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, tree)
