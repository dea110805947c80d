# SPDX-License-Identifier: Apache-2.0
"""The device mesh: axes data, seq, model, expert, explicit sharding."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("data", "seq", "model", "expert")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis: `data` rows, `seq` tokens of a row, `model` heads and widths,
    `expert` experts."""

    data: int = 1
    seq: int = 1
    model: int = 1
    expert: int = 1
    experts: str = "expert"
    """The axis over which experts lie: with "seq" or "data" on the devices that hold tokens, which
    then travel to them; over `expert` every device sees the same tokens."""

    def __post_init__(self):
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise ValueError(f"mesh axis {axis} must be at least 1; got {getattr(self, axis)}")
        if self.experts not in ("expert", "seq", "data"):
            raise ValueError(f"experts lie over expert, seq or data; got experts={self.experts!r}")

    @property
    def size(self) -> int:
        return math.prod(getattr(self, axis) for axis in AXES)

    def make(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        return make_mesh(**{axis: getattr(self, axis) for axis in AXES}, devices=devices)


def make_mesh(
    *,
    data: int = 1,
    seq: int = 1,
    model: int = 1,
    expert: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with explicit axes `data, seq, model, expert` over `devices` (default: all there are).

    Enter it with `jax.set_mesh`. Neighbours along `seq` are neighbours in the device order that
    JAX finds best for the topology.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    config = MeshConfig(data=data, seq=seq, model=model, expert=expert)
    available = list(jax.devices() if devices is None else devices)
    if config.size != len(available):
        kind = available[0].device_kind if available else "none"
        raise ValueError(
            f"mesh data={data} x seq={seq} x model={model} x expert={expert} needs {config.size} "
            f"devices; got {len(available)} ({kind}). Change an axis, "
            f"pass devices=jax.devices()[:{config.size}], "
            f"or on CPU call jaxcp.emulate_devices({config.size}) before anything else uses jax"
        )
    shape = tuple(getattr(config, axis) for axis in AXES)
    types = (AxisType.Explicit,) * len(AXES)
    if devices is None:
        return jax.make_mesh(shape, AXES, axis_types=types)
    return Mesh(np.asarray(available).reshape(shape), AXES, axis_types=types)


def emulate_devices(count: int) -> None:
    """Make this process see `count` CPU devices. Call before anything else uses jax.

    Raises:
      RuntimeError: jax has already been used with another number of devices.
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        if jax.default_backend() == "cpu" and jax.device_count() == count:
            return
        raise RuntimeError(
            f"emulate_devices({count}) came after jax was first used with {jax.device_count()} "
            f"{jax.default_backend()} device(s); call it before any other jax call"
        ) from error
    jax.config.update("jax_platforms", "cpu")
