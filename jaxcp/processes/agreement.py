# SPDX-License-Identifier: Apache-2.0
"""Decisions that all processes share. Each function is called by all of them, in the same order.

In one process they cost nothing. In several they are collectives, which wait for the steps that
were dispatched before: `Poll`, which does not wait, is for what is asked at every step.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

T = TypeVar("T")

HEADER, SHORT = 8, 256
"""Bytes of a message that say its length; those of a message that takes one collective."""
KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (ValueError, OSError, NotImplementedError, ImportError, FloatingPointError)
}
"""Errors that stay of their kind on their way to other processes; others become RuntimeError."""


def several() -> bool:
    """Tell whether there are more processes than this one."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Tell whether this is the process that writes, draws and decides."""
    return jax.process_index() == 0


def check_takes_all(devices: int) -> None:
    """Check that a mesh of so many devices leaves no process out.

    Raises:
      ValueError: there are several processes, and more or fewer devices.
    """
    if several() and devices != jax.device_count():
        raise ValueError(
            f"a mesh over several processes takes all of their devices, {jax.device_count()} in "
            f"{jax.process_count()} processes; got a mesh of {devices}. Set its axes to multiply "
            "to them (on CPUs JAX_NUM_CPU_DEVICES is those of a process)"
        )


def everywhere(tree: Any) -> Any:
    """Give arrays that every process can read: one whose parts lie in several goes to all devices.

    Without waiting; under the mesh of the arrays.
    """
    return jax.tree.map(_everywhere, tree) if several() else tree


def _everywhere(x: Any) -> Any:
    is_here = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
    return x if is_here else _whole(x)


@jax.jit
def _whole(x: jax.Array) -> jax.Array:
    return jax.sharding.reshard(x, P())


def gather(value: Any) -> list[Any]:
    """Give the JSON values of all processes, in their order."""
    if not several():
        return [value]
    text = json.dumps(value).encode()
    said = len(text).to_bytes(HEADER, "little") + text
    rows = _exchange(said, SHORT)
    sizes = [HEADER + int.from_bytes(row[:HEADER].tobytes(), "little") for row in rows]
    if max(sizes) > SHORT:
        rows = _exchange(said, 1 << max(sizes).bit_length())  # few sizes are few programs
    return [json.loads(row[HEADER:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def _exchange(said: bytes, size: int) -> np.ndarray:
    """Give the beginnings `[processes, size]` of what all have said."""
    room = np.zeros(size, np.uint8)
    part = np.frombuffer(said[:size], np.uint8)
    room[: part.size] = part
    return process_allgather(room)


def decide(value: T) -> T:
    """Give the first process's JSON value to all."""
    return gather(value if is_first() else None)[0]


def total(value: float) -> float:
    """Add up a number of all processes."""
    return sum(gather(value))


def together(act: Callable[[], T]) -> T:
    """Run something in each process; where it raises in one of them, raise in all.

    Only for what dispatches no collective: a process that has raised would be missing there.

    Raises:
      Exception: the process's own, or that of the lowest process that has one, naming it.
    """
    if not several():
        return act()
    return _outcome(act, gather)


def by_first(act: Callable[[], T]) -> T | None:
    """Run something in the first process while the others wait; they get None.

    Raises:
      Exception: what it raised, in all processes.
    """
    return together(act if is_first() else lambda: None)


def _outcome(act: Callable[[], T], exchange: Callable[[Any], list[Any]]) -> T:
    result, error = None, None
    try:
        result = act()
    except Exception as raised:
        error = raised
    told = exchange(None if error is None else _as_json(error))
    if error is not None:
        raise error
    for process, other in enumerate(told):
        if other is not None:
            raise KINDS.get(other["kind"], RuntimeError)(f"process {process}: {other['text']}")
    return result  # type: ignore[return-value]


def _as_json(error: Exception) -> dict[str, str]:
    kind = next((name for name, known in KINDS.items() if isinstance(error, known)), "")
    return {"kind": kind, "text": str(error) if kind else f"{type(error).__name__}: {error}"}


class Poll:
    """The greatest number that any process has named, known a turn later without waiting.

    Each turn sends a small all-reduce after the step that was dispatched before it, and reads that
    of the turn before, which came before this step. One process knows at once.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._sent: jax.Array | None = None

    def turn(self, number: int) -> int:
        """Name a number; give the greatest that was named a turn ago, 0 at the first."""
        if not several():
            return number
        before, self._sent = self._sent, _greatest(self._placed(number))
        return 0 if before is None else int(before)

    def _placed(self, number: int) -> jax.Array:
        sharding = NamedSharding(self._mesh, P(*self._mesh.axis_names))
        one = np.full((1,) * self._mesh.devices.ndim, number, np.int32)
        return jax.make_array_from_callback(self._mesh.devices.shape, sharding, lambda _: one)


@jax.jit
def _greatest(x: jax.Array) -> jax.Array:
    return x.max()
