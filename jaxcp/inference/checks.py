# SPDX-License-Identifier: Apache-2.0
"""Arguments, looked at before anything is cast, computed or changed."""

import math
import numbers
from typing import Any

import jax
import numpy as np

from jaxcp.processes import several


def token_ids(model: Any, tokens: Any) -> np.ndarray:
    """`tokens` as int32 on the host, in the shape that they have.

    Raises:
      ValueError: they are no integers, or the model has no embedding of them.
    """
    tokens, vocab = integers("token ids", tokens), model.config.vocab_size
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab):
        raise ValueError(
            f"token ids must lie in 0..{vocab - 1}; got {tokens.min()}..{tokens.max()}. "
            "Is it another tokenizer's?"
        )
    return tokens.astype(np.int32)


def integers(name: str, values: Any) -> np.ndarray:
    """`values` as an array of integers, of the width in which they came.

    Raises:
      ValueError: they are floats, bools, text or bytes, or rows of several lengths.
    """
    if isinstance(values, str | bytes | bytearray | memoryview):
        raise ValueError(f"{name} must be integers; got {type(values).__name__}")
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of integers: {error}") from error
    if not array.size and not hasattr(values, "dtype"):
        return array.astype(np.int32)  # an empty list says nothing of its type
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be integers; got {array.dtype}")
    if array is not values and (wrong := [x for x in jax.tree.leaves(values) if _is_cast(x)]):
        raise ValueError(f"{name} must be integers; got {wrong[0]!r} among them")
    return array


def integer(name: str, value: Any, least: int, most: float = np.inf, why: str = "") -> int:
    """`value`, which must be an integer in `least..most`; `why` there are so many.

    Raises:
      ValueError: it is not.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer; got {value!r}")
    number = int(value)
    if not least <= number <= most:
        limits = f"at least {least}" if most == np.inf else f"in {least}..{most}"
        raise ValueError(f"{name} must be {limits}{f' ({why})' if why else ''}; got {number}")
    return number


def seconds(name: str, value: Any) -> float:
    """`value`, which must be a positive number, infinity too.

    Raises:
      ValueError: it is not.
    """
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not float(value) > 0:
        raise ValueError(f"{name} must be positive seconds; got {value!r}")
    return float(value)


def longest_wait(given: float | None) -> float:
    """`Engine(max_wait=)`; infinite in several processes, which must cut prompts alike.

    Raises:
      ValueError: it is no time, or finite in several processes.
    """
    if given is None:
        return math.inf if several() else 0.25
    wait = seconds("max_wait", given)
    if several() and wait < math.inf:
        raise ValueError(
            "each of several processes has a clock of its own, by which they would cut prompts "
            f"in different places: leave max_wait out, or give math.inf; got {given}"
        )
    return wait


def check_decides_alike(memory: int | float | None, host_memory: int) -> None:
    """Refuse what each of several processes would decide by what it measures.

    Raises:
      ValueError: `memory` is a fraction.
      NotImplementedError: there is `host_memory`.
    """
    if not several():
        return
    if isinstance(memory, float):
        raise ValueError(
            "several processes may find different amounts of memory free: give memory in bytes, "
            f"or pool_tokens; got memory={memory}"
        )
    if host_memory:
        raise NotImplementedError(
            "host_memory is not there over several processes, which would decide by their own "
            "clocks what to copy back: leave it out"
        )


def check_mesh(model: Any) -> None:
    """Raise ValueError where the model lies on a mesh that is not in scope."""
    meshes = {getattr(x.sharding, "mesh", None) for x in jax.tree.leaves(model) if _is_there(x)}
    several = [mesh for mesh in meshes if mesh is not None and mesh.size > 1]
    if several and jax.sharding.get_abstract_mesh().empty:
        raise ValueError(
            f"the model lies on a mesh of {several[0].size} devices, and none is in scope: make "
            "the engine under `jax.set_mesh`, as the model was"
        )


def _is_cast(value: Any) -> bool:
    """Tell whether numpy makes integers of this, among others, though it is none."""
    of_bytes_or_bools = isinstance(value, bool | bytearray | memoryview)
    return of_bytes_or_bools or getattr(value, "dtype", None) == np.bool_


def _is_there(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
