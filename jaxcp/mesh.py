# SPDX-License-Identifier: Apache-2.0
"""The device mesh: axes data, seq, model, expert, explicit sharding."""

import dataclasses
import logging
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

logger = logging.getLogger(__name__)

AXES = ("data", "seq", "model", "expert")
LISTED = 8  # idle devices in a log line


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis: `data` rows, `seq` tokens of a row, `model` heads and widths,
    `expert` experts. `size` is their product, `make()` the mesh (`make_mesh`).

    Raises:
      ValueError: an axis below 1.
    """

    data: int = 1
    seq: int = 1
    model: int = 1
    expert: int = 1

    def __post_init__(self):
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise ValueError(f"mesh axis {axis} must be at least 1; got {getattr(self, axis)}")

    @property
    def size(self) -> int:
        """Devices that the mesh needs."""
        return math.prod(getattr(self, axis) for axis in AXES)

    def make(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """`make_mesh` with these axes."""
        return make_mesh(**{axis: getattr(self, axis) for axis in AXES}, devices=devices)


def make_mesh(
    *,
    data: int = 1,
    seq: int = 1,
    model: int = 1,
    expert: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Make a mesh with axes `data, seq, model, expert`, explicit, over `devices` (default: all).

    Enter it with `jax.set_mesh`. Neighbours along `seq` are neighbours in the device order that
    JAX finds best for the topology. Of more devices than the axes need the first ones are taken,
    as `jax.make_mesh` does; a warning in the log names those that stay idle.

    Raises:
      ValueError: an axis below 1, or axes that multiply to more than there are devices.

    >>> with jax.set_mesh(jaxcp.make_mesh(data=2, seq=4)):
    ...     model, tokenizer = jaxcp.load(path)
    """
    config = MeshConfig(data=data, seq=seq, model=model, expert=expert)
    available = list(jax.devices() if devices is None else devices)
    if config.size > len(available):
        kind = available[0].device_kind if available else "none"
        raise ValueError(
            f"mesh data={data} x seq={seq} x model={model} x expert={expert} needs {config.size} "
            f"devices; got {len(available)} ({kind}). Make an axis smaller, "
            f"or on CPU call jaxcp.emulate_devices({config.size}) before anything else uses jax"
        )
    taken, idle = available[: config.size], available[config.size :]
    if idle:
        names = ", ".join([*map(str, idle[:LISTED]), *["..."][: len(idle) > LISTED]])
        logger.warning(
            "the mesh takes %d of %d devices; idle: %s", len(taken), len(available), names
        )
    shape = tuple(getattr(config, axis) for axis in AXES)
    types = (AxisType.Explicit,) * len(AXES)
    if devices is None:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=taken)
    return Mesh(np.asarray(taken).reshape(shape), AXES, axis_types=types)


def emulate_devices(count: int) -> None:
    """Make this process see `count` CPU devices. Call before anything else uses jax.

    Args:
      count: devices; 1 or more. They share the machine's cores: for tests, not for speed.
    Raises:
      ValueError: a count below 1.
      RuntimeError: jax has already been used with another number of devices.
    """
    if count < 1:
        raise ValueError(f"emulate_devices needs 1 device or more; got count={count}")
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
