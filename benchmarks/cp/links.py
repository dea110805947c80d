# SPDX-License-Identifier: Apache-2.0
"""Times a transfer on a slice's links: bytes of the fullest link / its rate, and hops.

A transfer goes from chip to chip along the axes in order, each axis the shorter way round; where
both ways are equally long half goes each way. All transfers of a step are on their way at once;
the link with the most bytes says how long they take. Devices of one chip need no link.

An all-gather and a reduce-scatter are given every link of the slice's corner, which no schedule
can beat: (n - d) shards / (links x rate), d devices a chip.

Assumed: HOP seconds for each hop, and which axes of a slice are closed: multiples of 4 on v5p and
tpu7x from a cube of 4x4x4 on, and 16 on v5e and v6e.
"""

import dataclasses
from collections.abc import Iterable

from jaxcp.compile.target import Target
from pallas_kernels.devices import Chip

HOP = 1e-6

Coords = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Torus:
    chip: Chip
    shape: tuple[int, ...]
    closed: tuple[bool, ...]
    devices: tuple[Coords, ...]  # the chip of each device, in the order of the mesh

    @classmethod
    def of(cls, target: Target) -> "Torus":
        """The slice, devices in the order of `target.mesh(seq=...)`."""
        flat = target.mesh(seq=target.size).devices.flatten()
        axes = target.chip.torus_axes
        closed = tuple(size % 16 == 0 for size in target.shape)
        if axes == 3:
            closed = tuple(min(target.shape) >= 4 and size % 4 == 0 for size in target.shape)
        coords = tuple(tuple(device.coords)[:axes] for device in flat)
        return cls(target.chip, target.shape, closed, coords)

    @property
    def ports(self) -> int:
        """Links of the chip that has the fewest."""
        return sum(
            2 if closed and size > 2 else min(1, size - 1)
            for size, closed in zip(self.shape, self.closed, strict=True)
        )

    def seconds(self, transfers: Iterable[tuple[int, int, float]]) -> float:
        """`(from, to, bytes)` between devices, all at once."""
        load: dict[tuple[Coords, int, int], float] = {}
        hops = 0
        for source, target, nbytes in transfers:
            at, count = list(self.devices[source]), 0
            for axis, size in enumerate(self.shape):
                ways, steps = self._ways(axis, self.devices[target][axis] - at[axis])
                count += steps
                for way in ways:
                    place = list(at)
                    for _ in range(steps):
                        key = (tuple(place), axis, way)
                        load[key] = load.get(key, 0) + nbytes / len(ways)
                        place[axis] = (place[axis] + way) % size
                at[axis] = self.devices[target][axis]
            hops = max(hops, count)
        return max(load.values(), default=0) / self.chip.link_bytes_per_second + hops * HOP

    def _ways(self, axis, distance):
        """Directions along an axis, and steps."""
        size = self.shape[axis]
        if not self.closed[axis] or abs(distance) * 2 < size:
            return ((1,) if distance > 0 else (-1,)), abs(distance)
        if abs(distance) * 2 == size:
            return (1, -1), abs(distance)
        return ((-1,) if distance > 0 else (1,)), size - abs(distance)

    def rotation(self, nbytes: float, stride: int = 1, both_ways: bool = False) -> float:
        """Every device sends to the one `stride` further on (half each way), in circles."""
        n, part = len(self.devices), nbytes / (2 if both_ways else 1)
        hops = [(i, (i + stride) % n, part) for i in range(n)]
        if both_ways:
            hops += [(j, i, part) for i, j, _ in hops]
        return self.seconds(hops)

    def exchange(self, nbytes: float, size: int) -> float:
        """Groups of `size` neighbours; each device sends `nbytes` to each of its group."""
        groups = range(0, len(self.devices), size)
        return self.seconds(
            (g + i, g + j, nbytes)
            for g in groups
            for i in range(size)
            for j in range(size)
            if i != j
        )

    def gather(self, shard_bytes: float) -> float:
        """Seconds in which every device gets every shard; a reduce-scatter takes as long."""
        away = len(self.devices) - self.chip.devices_per_chip
        far = sum(
            size // 2 if closed else size - 1
            for size, closed in zip(self.shape, self.closed, strict=True)
        )
        rate = self.ports * self.chip.link_bytes_per_second
        return away * shard_bytes / rate + far * HOP
